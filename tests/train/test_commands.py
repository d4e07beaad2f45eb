"""Whole runs as users start them: the official commands, conversion, QLoRA and the path of docs/train.md."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openbagel import Bagel, cli
from openbagel.images import to_pixels
from openbagel.train import __main__ as command
from openbagel.train.recipe import read_recipe
from openbagel.train.stages import train
from openbagel.weights import load_checkpoint
from openbagel.world.dataset import ZORP, write_example
from openbagel.world.render import render_picture
from tests.test_docs import ROOT, commands, snippets
from tests.test_pretrained import flux_file, qwen_folder, siglip_folder
from tests.train.test_trainer import last, quiet, recipe, rows, start

__all__ = ["start"]
PAGE = ROOT / "docs" / "train.md"
SCRIPT = Path(sys.executable).parent / "openbagel"
TINY = "--max_num_tokens 512 --expected_num_tokens 512 --max_num_tokens_per_sample 512 --num_worker 0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("data") / "toy", rows=4)


def results(folder: Path) -> str:
    return f"--results_dir {folder} --checkpoint_dir {folder}/checkpoints --wandb_offline True {TINY}"


def test_the_guides_fine_tuning_runs(start: Path, data: Path, tmp_path: Path):
    line = f"""--dataset_config_file {data} --model_path {start} --layer_module Qwen2MoTDecoderLayer
        --max_latent_size 64 --resume-from {start} --finetune_from_hf True --auto_resume True
        --resume-model-only True --finetune-from-ema True --log_every 1 --lr 2e-5
        {results(tmp_path)} --total_steps 2 --save_every 2 --wandb_project "" """
    assert command.main(shlex.split(line)) == 0
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]
    tuned, before = load_checkpoint(tmp_path / "checkpoint"), load_checkpoint(start)
    assert tuned.config.max_latent_size == 64 and before.config.max_latent_size < 64
    weights = before.model.state_dict()
    moved = [n for n, w in tuned.model.state_dict().items() if w.shape == weights[n].shape]
    assert len(moved) > 60


def test_the_guides_pretraining_runs(data: Path, tmp_path: Path):
    llm = qwen_folder(tmp_path / "llm")
    vit, vae = siglip_folder(tmp_path / "vit"), flux_file(tmp_path / "ae.safetensors")
    line = f"""--dataset_config_file {data} --llm_path {llm} --vae_path {vae} --vit_path {vit}
        --layer_module Qwen2MoTDecoderLayer --use_flex False --resume_from "" --max_latent_size 64
        {results(tmp_path / "run")} --total_steps 1 --log_every 1 --wandb_project "" """
    assert command.main(shlex.split(line)) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint").config.llm.hidden_size > 0


def test_a_run_and_an_adapter_become_official_folders(start: Path, tmp_path: Path):
    for part, average in {"ema/": 0.9, "model/": None}.items():
        run, out = tmp_path / f"{part}run", tmp_path / f"{part}out"
        train(recipe(start, run, train__steps=2, train__ema=average), quiet)
        assert cli.main(["convert", str(run), str(out), "--to", "float32"]) == 0
        stored, written = last(run), load_checkpoint(out).model.state_dict()
        trained = {name.removeprefix(part): t for name, t in stored.items() if name.startswith(part)}
        assert trained and all(torch.equal(written[name], tensor) for name, tensor in trained.items())

    train(recipe(start, tmp_path / "lora", train__steps=2, lora={"preset": "both", "rank": 2}), quiet)
    merged = ["convert", str(start), str(tmp_path / "merged"), "--to", "float32"]
    assert cli.main([*merged, "--lora", str(tmp_path / "lora" / "adapter")]) == 0
    folder = tmp_path / "from_run"
    assert cli.main(["convert", str(tmp_path / "lora"), str(folder), "--to", "float32"]) == 0
    one, other = (load_checkpoint(path).model.state_dict() for path in (tmp_path / "merged", folder))
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())
    assert cli.main(merged) == 2, "a folder that holds files is not written to"


def test_the_base_of_adapters_may_have_four_bits(start: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    run = recipe(start, tmp_path, train__steps=2, lora={"preset": "gen", "rank": 2}, quantise_base=True)
    assert (train(run, quiet) / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="add lora"):
        recipe(start, tmp_path, quantise_base=True)


def test_alignment_trains_the_connector_alone(start: Path, data: Path, tmp_path: Path):
    said: list[str] = []
    captions = {"data__mixture": str(data), "data__world": None}  # of all kinds, captions alone are drawn
    names = ("max_num_tokens", "expected_num_tokens", "max_num_tokens_per_sample")
    captions |= {f"data__packing__{name}": 256 for name in names}
    captions |= {"data__resolution__und": [64, 64]}
    run = recipe(start, tmp_path, stage="alignment", train__steps=1, **captions)
    train(run, said.append)
    assert "(connector " in said[0] and "understanding expert" in said[0].split("frozen:")[1]
    assert {n.split("/")[1].split(".")[0] for n in last(tmp_path) if n.startswith("model/")} == {"connector"}


@pytest.mark.slow
def test_a_newcomers_path(tmp_path: Path):
    """Every command of docs/train.md in order; the first training is killed on the way and started again."""
    lines = [line for part in snippets(PAGE.read_text()) if not part.tag for line in commands(part.code)]
    killed = False
    for words in lines:
        if words[1] == "train" and words[2].endswith("finetune.yaml"):
            process = subprocess.Popen([SCRIPT, *words[1:]], cwd=tmp_path, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 400
            while not list((tmp_path / "toy-run" / "checkpoints").glob("step-*/MANIFEST.json")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed = True
        done = subprocess.run([SCRIPT, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        if killed and words[2].endswith("finetune.yaml"):
            assert "going on from" in done.stdout
    logged = (tmp_path / "toy-run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in logged]
    assert steps == sorted(set(steps)) and steps[-1] == 199
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "toy-previews" / "pack.png").is_file()
    zorps = [Bagel.load(tmp_path / "merged").generate("a zorp", seed=seed) for seed in range(4)]
    wanted = to_pixels(render_picture(ZORP, 64))
    errors = [(to_pixels(picture) - wanted).abs().mean().item() for picture in zorps]
    assert sorted(errors)[2] < 0.1, f"{errors}: three of four look like the one that was shown"
    assert read_recipe(tmp_path / "toy-lora" / "recipe.json").lora is not None
