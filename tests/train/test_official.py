"""The official flags: every one with its type and default, the guide's commands, and what they come to."""

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from openbagel.config import Experts, from_json, to_json
from openbagel.pretrained import Parts
from openbagel.train import official, stages
from openbagel.train.__main__ import main
from openbagel.train.recipe import Recipe, recipe_from
from openbagel.weights import save_checkpoint
from tests import tiny

# name, type, default: as published
PUBLISHED = """
model_path str hf/BAGEL-7B-MoT
llm_path str hf/Qwen2.5-0.5B-Instruct/
llm_qk_norm bool True
tie_word_embeddings bool False
layer_module str Qwen2MoTDecoderLayer
vae_path str flux/vae/ae.safetensors
vit_path str hf/siglip-so400m-14-980-flash-attn2-navit/
max_latent_size int 32
latent_patch_size int 2
vit_patch_size int 14
vit_max_num_patch_per_side int 70
connector_act str gelu_pytorch_tanh
interpolate_pos bool False
vit_select_layer int -2
vit_rope bool False
text_cond_dropout_prob float 0.1
vae_cond_dropout_prob float 0.3
vit_cond_dropout_prob float 0.3
-
dataset_config_file str data/configs/example.yaml
prefetch_factor int 2
num_workers int 4
max_num_tokens_per_sample int 16384
max_num_tokens int 36864
prefer_buffer_before int 16384
max_buffer_size int 50
data_seed int 42
-
visual_gen bool True
visual_und bool True
results_dir str results
checkpoint_dir str results/checkpoints
wandb_project str bagel
wandb_name str run
wandb_runid str 0
wandb_resume str allow
wandb_offline bool False
global_seed int 4396
auto_resume bool False
resume_from str None
resume_model_only bool False
finetune_from_ema bool False
finetune_from_hf bool False
log_every int 10
save_every int 2000
total_steps int 500000
warmup_steps int 2000
lr_scheduler str constant
lr float 1e-4
min_lr float 1e-7
beta1 float 0.9
beta2 float 0.95
eps float 1e-15
ema float 0.9999
max_grad_norm float 1.0
timestep_shift float 1.0
mse_weight float 1.0
ce_weight float 1.0
ce_loss_reweighting bool False
expected_num_tokens int 32768
gradient_accumulation_steps int 1
peak_device_tflops float 0.0
num_replicate int 1
num_shard int 8
sharding_strategy str HYBRID_SHARD
backward_prefetch str BACKWARD_PRE
cpu_offload bool False
freeze_llm bool False
freeze_vit bool False
freeze_vae bool True
freeze_und bool False
copy_init_moe bool True
use_flex bool False
"""
READ: dict[str, Any] = {
    "str": lambda text: None if text == "None" else text,
    "bool": lambda text: text == "True",
    "int": int,
    "float": float,
}
TABLE = [line.split() for line in PUBLISHED.split("\n") if len(line) > 1]

# from the official guide, the script's path and the launcher left out
PRETRAIN = """
  --dataset_config_file ./data/configs/example.yaml --llm_path $llm_path --vae_path $vae_path
  --vit_path $vit_path --layer_module Qwen2MoTDecoderLayer --use_flex True --resume_from $resume_from
  --results_dir $output_path --checkpoint_dir $ckpt_path --max_latent_size 64
"""
FINETUNE = """
  --dataset_config_file ./data/configs/example.yaml --model_path $model_path
  --layer_module Qwen2MoTDecoderLayer --max_latent_size 64 --resume-from $model_path --finetune_from_hf True
  --auto_resume True --resume-model-only True --finetune-from-ema True --log_every 1 --lr 2e-5 --num_worker 1
  --expected_num_tokens 10240 --max_num_tokens 11520 --max_num_tokens_per_sample 10240
"""


def expanded(command: str, **variables: str) -> list[str]:
    """A shell's words: a variable that is not set leaves nothing behind."""
    script = " ".join(command.split())
    done = subprocess.run(
        ["sh", "-c", f'for word in {script}; do printf "%s\\0" "$word"; done'],
        env=variables,
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


def flags(line: str) -> dict[str, Any]:
    return official.parse(shlex.split(line))


def quietly(line: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return official.recipe_of(official.parse(shlex.split(line)))


# reading ----------------------------------------------------------------------------------------------------


def test_every_flag_is_there_with_its_type_and_default() -> None:
    ours = {name: flag.default for name, flag in official.FLAGS.items()}
    published = {name: READ[kind](default) for name, kind, default in TABLE}
    assert ours == published | {"dataset_info_file": None}
    for name, kind, _ in TABLE:
        assert ours[name] is None or type(ours[name]).__name__ == kind, name


@pytest.mark.parametrize(("name", "kind", "default"), TABLE)
def test_every_flag_is_read_in_every_spelling(name: str, kind: str, default: str) -> None:
    given, value = {"str": ("x", "x"), "bool": ("False", False), "int": ("7", 7), "float": ("0.5", 0.5)}[kind]
    dashed = name.replace("_", "-")
    assert flags("") == {name: flag.default for name, flag in official.FLAGS.items()}
    for line in (f"--{name} {given}", f"--{dashed} {given}", f"--{name}={given}", f"--{dashed}={given}"):
        assert flags(line) == flags("") | {name: value}, line


@pytest.mark.parametrize("word", ["True", "true", "1", "yes", "t", "y"])
def test_switches_that_are_on(word: str) -> None:
    assert flags(f"--auto_resume {word}")["auto_resume"] is True
    assert flags("--auto-resume --lr 1")["auto_resume"] is True, "alone"


@pytest.mark.parametrize(
    "line", ["--visual_und False", "--visual-und=no", "--no_visual_und", "--no-visual-und"]
)
def test_switches_that_are_off(line: str) -> None:
    assert flags(line)["visual_und"] is False


def test_beginnings_of_names() -> None:
    assert flags("--num_worker 1")["num_workers"] == 1
    assert flags("--resume-mod --finetune-from-e")["finetune_from_ema"] is True
    assert flags("--ema 0.9")["ema"] == 0.9 and flags("--lr 2e-5")["lr"] == 2e-5, (
        "whole names are no beginnings"
    )
    with pytest.raises(ValueError, match="ambiguous option: --max_num could match"):
        flags("--max_num 3")


def test_numbers_are_read_as_python_does() -> None:
    assert flags("--vit_select_layer -3 --total_steps 500_000")["vit_select_layer"] == -3
    assert flags("--lr 1 --lr 2")["lr"] == 2.0, "the last one counts"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rat 1", "unknown argument '--learning_rat'"),
        ("--num_token 4", "unknown argument '--num_token'; did you mean 'max_num_tokens'"),
        ("--visual_gne True", "did you mean 'visual_gen'"),
        ("--lr 1 stray", "unknown argument 'stray'"),
        ("--lr fast", "argument --lr: 'fast' is not a value of type float"),
        ("--total_steps 1e4", "argument --total_steps: '1e4' is not a value of type int"),
        ("--use_flex maybe", "argument --use_flex: 'maybe' is not True or False"),
        ("--lr", "argument --lr: expected one argument"),
        ("--lr ''", "argument --lr: '' is not"),
    ],
)
def test_mistakes_say_what_to_write(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flags(line)


def test_an_empty_path_keeps_its_default() -> None:
    for line in ("--resume_from --lr 1", "--resume_from '' --lr 1", "--lr 1 --resume_from"):
        assert flags(line)["resume_from"] is None and flags(line)["lr"] == 1
    assert flags("--llm_path --lr 1")["llm_path"] == "hf/Qwen2.5-0.5B-Instruct/"


# the guide --------------------------------------------------------------------------------------------------


def test_the_guides_pretraining() -> None:
    variables = {"llm_path": "/m/qwen", "vae_path": "/m/ae.safetensors", "vit_path": "/m/siglip"}
    command = expanded(PRETRAIN, **variables, output_path="/out", ckpt_path="/out/ckpt")
    assert "--resume_from" in command and command[command.index("--resume_from") + 1] == "--results_dir"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = official.recipe(command)
    assert tree["folder"] == "/out" and tree["checkpoints"] == "/out/ckpt"
    assert tree["start"] == {
        "checkpoint": None,
        "weights": "model",
        "state": True,
        "facts": None,
        "settings": {},
        "parts": {
            "llm": "/m/qwen",
            "vit": "/m/siglip",
            "vae": "/m/ae.safetensors",
            "layer_module": "Qwen2MoTDecoderLayer",
            "max_latent_size": 64,
            "qk_norm": True,
            "latent_patch_size": 2,
            "vit_max_num_patch_per_side": 70,
            "vit_select_layer": -2,
            "connector_act": "gelu_pytorch_tanh",
            "interpolate_pos": False,
            "copy_experts": True,
            "seed": 4396,
        },
    }
    assert from_json(Parts, tree["start"]["parts"], "start.parts").layer_module is Experts.MOT
    assert tree["train"]["execution"] == "flex"
    assert recipe_from(tree).start.parts == from_json(Parts, tree["start"]["parts"], "start.parts")
    continued = official.recipe(expanded(PRETRAIN, **variables, resume_from="/out/ckpt/0002000"))["start"]
    assert (continued["checkpoint"], continued["weights"], continued["state"]) == (
        "/out/ckpt/0002000",
        "model",
        True,
    )
    assert continued["parts"]["llm"] == "/m/qwen"


def test_the_guides_fine_tuning(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    folder = str(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = official.recipe(expanded(FINETUNE, model_path=folder))
    assert tree["start"] == {
        "checkpoint": folder,
        "weights": "ema",
        "state": False,
        "facts": folder,
        "settings": {"max_latent_size": 64},
        "parts": None,
    }
    assert tree["data"] == {
        "mixture": "./data/configs/example.yaml",
        "dataset_info": None,
        "seed": 42,
        "workers": 1,
        "prefetch_factor": 2,
        "dropout": {"text": 0.1, "vit": 0.3, "vae": 0.3},
        "packing": {
            "method": "official",
            "expected_num_tokens": 10240,
            "max_num_tokens": 11520,
            "max_num_tokens_per_sample": 10240,
            "prefer_buffer_before": 16384,
            "max_buffer_size": 50,
            "streams": 64,
        },
    }
    assert tree["train"]["schedule"] == {"kind": "constant", "lr": 2e-5, "min_lr": 1e-7, "warmup": 2000}
    assert tree["train"]["auto_resume"] is True and tree["track"]["log_every"] == 1
    recipe = recipe_from(tree)
    assert recipe.train.schedule.lr == 2e-5 and recipe.data.packing.max_num_tokens == 11520
    assert to_json(recipe_from(to_json(recipe))) == to_json(recipe), "the resolved recipe is a recipe"


# what flags come to -----------------------------------------------------------------------------------------


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        deeper = isinstance(value, dict) and value
        found |= leaves(value, f"{path}{key}.") if deeper else {path + key: value}
    return found


@pytest.mark.parametrize(("name", "kind", "default"), TABLE)
def test_every_flag_changes_the_recipe_or_warns(name: str, kind: str, default: str) -> None:
    """A flag that did nothing in silence would be the reference's worst habit."""
    other = {"str": "x", "bool": str(default != "True"), "int": "7", "float": "0.5"}[kind]
    given = {"sharding_strategy": "FULL_SHARD", "layer_module": "Qwen2DecoderLayer"}.get(name, other)
    base = "--resume_from c " + ("--resume_model_only " if name == "finetune_from_ema" else "")
    base += "--finetune_from_hf " if name == "model_path" else ""
    base += "--num_shard 4 " if name == "sharding_strategy" else ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = official.recipe_of(official.parse(base.split()))
        try:
            after = official.recipe_of(official.parse([*base.split(), f"--{name}", given]))
        except ValueError as error:
            assert name == "vit_rope" and "--vit_rope" in str(error)
            return
    json.dumps(after)
    idle = {"tie_word_embeddings", "vit_patch_size", "freeze_vae", "backward_prefetch"}
    messages = [str(warning.message) for warning in warned]
    assert (before == after) == (name in idle)
    assert [f"--{name} " in message and "has no effect: " in message for message in messages] == [True] * (
        name in idle
    )


def test_places_are_distinct() -> None:
    places = [flag.place for flag in official.FLAGS.values() if flag.place]
    assert len(set(places)) == len(places)
    tree = leaves(quietly(""))
    assert set(places) <= set(tree)
    extra = {"data.packing.method", "train.execution", "start.parts.seed"}
    assert set(tree) - set(places) == extra | {"start.weights", "start.state", "start.settings"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", (None, "model", True)),
        ("--resume_from c", ("c", "model", True)),
        ("--resume_from c --resume_model_only True", ("c", "model", False)),
        ("--resume_from c --resume_model_only True --finetune_from_ema True", ("c", "ema", False)),
    ],
)
@pytest.mark.parametrize("from_hf", [False, True])
def test_what_a_run_starts_from(line: str, expected: tuple[Any, ...], from_hf: bool) -> None:
    if from_hf and not line:
        with pytest.raises(ValueError, match="would train random weights; add --resume_from m "):
            quietly("--finetune_from_hf --model_path m")
        return
    start = quietly(line + (" --finetune_from_hf True --model_path m" if from_hf else ""))["start"]
    assert (start["checkpoint"], start["weights"], start["state"]) == expected
    assert (start["facts"], start["parts"] is None) == (("m", True) if from_hf else (None, False))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--resume_from c --finetune_from_ema True", "--finetune_from_ema True .*--resume_model_only True"),
        ("--model_path /m/BAGEL", "--model_path /m/BAGEL has no effect: only --finetune_from_hf"),
        ("--resume_from c --finetune_from_hf --llm_path q", "--llm_path q has no effect: --finetune_from_hf"),
        ("--resume_from c --finetune_from_hf --llm_qk_norm False", "--llm_qk_norm False has no effect"),
    ],
)
def test_starts_that_are_not_meant_warn(line: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        official.recipe_of(official.parse(line.split()))


def test_parts_that_are_not_wanted_are_not_read() -> None:
    assert quietly("--visual_gen False")["start"]["parts"]["vae"] is None
    assert quietly("--visual_und False")["start"]["parts"]["vit"] is None
    from_json(Parts, quietly("--visual_und False")["start"]["parts"], "start.parts")


def test_only_what_is_set_overrides_a_checkpoint() -> None:
    base = "--finetune_from_hf --resume_from c"
    assert quietly(base)["start"]["settings"] == {}
    changed = quietly(f"{base} --layer_module Qwen2MoEDecoderLayer --interpolate_pos --max_latent_size 16")
    assert changed["start"]["settings"] == {
        "layer_module": "Qwen2MoEDecoderLayer",
        "interpolate_pos": True,
        "max_latent_size": 16,
    }


def test_shards() -> None:
    def parallel(line: str) -> dict[str, Any]:
        return quietly(line)["parallel"]

    assert parallel("") == {"num_shard": None, "num_replicate": 1, "cpu_offload": False}
    assert parallel("--num_shard 4 --num_replicate 2 --cpu_offload") == {
        "num_shard": 4,
        "num_replicate": 2,
        "cpu_offload": True,
    }
    assert parallel("--sharding_strategy FULL_SHARD --num_shard 4 --num_replicate 2")["num_replicate"] == 1
    with pytest.raises(ValueError, match="'HYBRID_SHRAD' is none of .*did you mean 'HYBRID_SHARD'"):
        parallel("--sharding_strategy HYBRID_SHRAD")


def test_a_grid_smaller_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint())
    line = f"--finetune_from_hf --resume_from {tmp_path} --model_path {tmp_path} --resume_model_only"
    with pytest.raises(ValueError, match="4 is smaller than the 8x8 grid .*give --max_latent_size 8"):
        official.recipe([*line.split(), "--max_latent_size", "4"])
    for size in ("8", "16"):
        official.recipe([*line.split(), "--max_latent_size", size])
    assert official.recipe(line.split())["start"]["settings"] == {}, "left out, the checkpoint's stays"
    with pytest.raises(ValueError, match="no such model folder"):
        official.recipe([*line.split(), "--max_latent_size", "8", "--model_path", str(tmp_path / "no")])


@pytest.mark.parametrize(("ranks", "streams"), [("1", 64), ("3", 66), ("8", 64), ("48", 96)])
def test_streams_are_shared_by_the_ranks(
    ranks: str, streams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    line = f"--finetune_from_hf --resume_from {tmp_path} --model_path {tmp_path} --resume_model_only"
    assert official.recipe(line.split())["data"]["packing"]["streams"] == streams


# the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Recipes that the command would have trained."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(stages, "train", lambda recipe, report: recipes.append(recipe))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command replaces it
    return recipes


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "openbagel.train", "--visual_gne", "True"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr == "openbagel.train: unknown argument '--visual_gne'; did you mean 'visual_gen'?\n"


def test_the_command_takes_flags(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint())
    assert main([*expanded(FINETUNE, model_path=str(tmp_path)), "--freeze_vae", "False"]) == 0
    assert [recipe.start.checkpoint for recipe in trained] == [str(tmp_path)]
    said = capsys.readouterr().err
    assert said == (
        "warning: --freeze_vae False has no effect: the autoencoder only encodes and is never trained\n"
    )


def test_the_command_takes_recipes(trained: list[Recipe], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("folder: runs/mine\nstage: finetuning\n")
    assert main([str(path), "train.steps=3"]) == 0
    assert (trained[0].folder, trained[0].train.steps, trained[0].train.ema) == ("runs/mine", 3, 0.995)
    assert main([str(tmp_path / "nowhere.yaml")]) == 2 and len(trained) == 1


def test_only_the_first_rank_speaks(
    trained: list[Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["--lr", "fast"]) == 2 and not trained
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"--{name} " in listed for name in official.FLAGS)
