"""The official training script's flags: names, types, defaults, and their places in the recipe's tree.

`parse` reads a command line as the script does: `True`, `False` or nothing after a switch, dashes for
underscores, unambiguous beginnings of names (`--num_worker`). A path or name whose value is empty (a shell
variable that is not set) keeps its default. Source: reference/training.md.

`dataset_info_file` is the one flag that the script does not have: a YAML file with the paths that its users
write into its Python (group, data set, `data_dir` and so on). Without it they are looked for under
`dataset_info` in the mixture's own file.
"""

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from openbagel.attention import Execution
from openbagel.checks import check_choice, nearest
from openbagel.data.packing import Packing
from openbagel.train.recipe import nested
from openbagel.weights import TOP_LEVEL, describe


@dataclass(frozen=True, slots=True)
class Flag:
    """place: the recipe's value that it is; idle: why it has no effect."""

    default: Any
    place: str = ""
    idle: str = ""


def _at(section: str, **defaults: Any) -> dict[str, Flag]:
    """Flags that the recipe calls the same, in one of its sections."""
    return {name: Flag(default, f"{section}.{name}") for name, default in defaults.items()}


FLAGS = {
    **_at("start.parts", layer_module="Qwen2MoTDecoderLayer", max_latent_size=32),
    **_at("start.parts", latent_patch_size=2, vit_max_num_patch_per_side=70),
    **_at("start.parts", connector_act="gelu_pytorch_tanh", interpolate_pos=False),
    **_at("start.parts", vit_select_layer=-2),
    **_at("data", prefetch_factor=2),
    **_at("data.packing", max_num_tokens_per_sample=16384, max_num_tokens=36864),
    **_at("data.packing", prefer_buffer_before=16384, max_buffer_size=50),
    **_at("data.packing", expected_num_tokens=32768),
    **_at("train", visual_gen=True, visual_und=True, auto_resume=False, save_every=2000, beta1=0.9),
    **_at("train", beta2=0.95, eps=1e-15, ema=0.9999, max_grad_norm=1.0, timestep_shift=1.0),
    **_at("train", mse_weight=1.0, ce_weight=1.0),
    **_at("track", wandb_project="bagel", wandb_name="run", wandb_resume="allow"),
    **_at("track", wandb_offline=False, log_every=10, peak_device_tflops=0.0),
    **_at("train.schedule", lr=1e-4, min_lr=1e-7),
    **_at("parallel", num_replicate=1, num_shard=8, cpu_offload=False),
    "model_path": Flag("hf/BAGEL-7B-MoT", "start.facts"),
    "llm_path": Flag("hf/Qwen2.5-0.5B-Instruct/", "start.parts.llm"),
    "llm_qk_norm": Flag(True, "start.parts.qk_norm"),
    "tie_word_embeddings": Flag(False, idle="the head is always a matrix of its own, a copy if tied"),
    "vae_path": Flag("flux/vae/ae.safetensors", "start.parts.vae"),
    "vit_path": Flag("hf/siglip-so400m-14-980-flash-attn2-navit/", "start.parts.vit"),
    "vit_patch_size": Flag(14, idle="the ViT's config.json states it"),
    "vit_rope": Flag(False),
    "text_cond_dropout_prob": Flag(0.1, "data.dropout.text"),
    "vae_cond_dropout_prob": Flag(0.3, "data.dropout.vae"),
    "vit_cond_dropout_prob": Flag(0.3, "data.dropout.vit"),
    "dataset_config_file": Flag("data/configs/example.yaml", "data.mixture"),
    "dataset_info_file": Flag(None, "data.dataset_info"),
    "num_workers": Flag(4, "data.workers"),
    "data_seed": Flag(42, "data.seed"),
    "results_dir": Flag("results", "folder"),
    "checkpoint_dir": Flag("results/checkpoints", "checkpoints"),
    "wandb_runid": Flag("0", "track.wandb_run_id"),
    "global_seed": Flag(4396, "train.seed"),
    "resume_from": Flag(None, "start.checkpoint"),
    "resume_model_only": Flag(False),
    "finetune_from_ema": Flag(False),
    "finetune_from_hf": Flag(False),
    "total_steps": Flag(500_000, "train.steps"),
    "warmup_steps": Flag(2000, "train.schedule.warmup"),
    "lr_scheduler": Flag("constant", "train.schedule.kind"),
    "ce_loss_reweighting": Flag(False, "train.ce_reweighting"),
    "gradient_accumulation_steps": Flag(1, "train.accumulation"),
    "sharding_strategy": Flag("HYBRID_SHARD"),
    "backward_prefetch": Flag("BACKWARD_PRE", idle="FSDP2 fetches the next block ahead by itself"),
    "freeze_llm": Flag(False, "train.freeze.llm"),
    "freeze_vit": Flag(False, "train.freeze.vit"),
    "freeze_vae": Flag(True, idle="the autoencoder only encodes and is never trained"),
    "freeze_und": Flag(False, "train.freeze.und"),
    "copy_init_moe": Flag(True, "start.parts.copy_experts"),
    "use_flex": Flag(False),
}
ONLY_FROM_PARTS = ("llm_path", "vit_path", "vae_path", "llm_qk_norm", "vit_select_layer", "copy_init_moe")
STRATEGIES = ("HYBRID_SHARD", "FULL_SHARD")
"""What the reference can save, too."""
TRUTHS = {word: True for word in ("true", "t", "yes", "y", "1")}
TRUTHS |= {word: False for word in ("false", "f", "no", "n", "0")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Every flag's value on a command line; ValueError says what is wrong and names the nearest flag."""
    parser = _Parser(prog="python -m openbagel.train", argument_default=argparse.SUPPRESS)
    for name, f in FLAGS.items():
        kind = str if f.default is None else type(f.default)
        alone = {"nargs": "?", "const": True if kind is bool else f.default} if kind in (bool, str) else {}
        parser.add_argument(f"--{name}", type=partial(_read, kind, f.default), **alone)
        if f.default is True:
            parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    parsed, left = parser.parse_known_args([_underscored(word) for word in arguments])
    if left:
        unknown = next((word for word in left if word.startswith("-")), left[0])
        hint = nearest(unknown.lstrip("-").partition("=")[0], FLAGS)
        raise ValueError(f"unknown argument {unknown!r}{hint}")
    return {name: f.default for name, f in FLAGS.items()} | vars(parsed)


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _read(kind: type, default: Any, text: str) -> Any:
    if kind is str:
        return text or default
    try:
        return TRUTHS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = "True or False" if kind is bool else f"a value of type {kind.__name__}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None


def recipe_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's tree, of JSON values. Flags that change nothing warn; unsupported values are a ValueError.

    num_shard at its default means as many shards as the ranks allow.
    """
    if flags["vit_rope"]:
        raise ValueError("--vit_rope True: ViTs with rotary positions are not supported; leave it out")
    check_choice("--sharding_strategy", flags["sharding_strategy"], STRATEGIES)
    places = {f.place: flags[name] for name, f in FLAGS.items() if f.place}
    if flags["sharding_strategy"] == "FULL_SHARD":
        places |= {"parallel.num_shard": None, "parallel.num_replicate": 1}
    elif flags["num_shard"] == FLAGS["num_shard"].default:
        places["parallel.num_shard"] = None
    execution = Execution.FLEX if flags["use_flex"] else Execution.SPLITS
    tree = nested(places | {"data.packing.method": "official", "train.execution": execution.value})
    idle = {name: f.idle for name, f in FLAGS.items() if f.idle}
    for name, why in (idle | _complete_start(tree["start"], flags)).items():
        if flags[name] != FLAGS[name].default:
            warnings.warn(f"--{name} {flags[name]} has no effect: {why}", stacklevel=2)
    return tree


def _complete_start(start: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, str]:
    """What the weights are before the first step, unless auto_resume finds a checkpoint of this very run.
    Returns the flags that have no effect then, and why.

    checkpoint, weights, state    a folder or None; its "ema" or "model"; its optimizer, data, step too?
    facts, settings               the folder of configuration, tokenizer and autoencoder; overrides
    parts                         instead of facts: `openbagel.pretrained.Parts`; with a checkpoint only
                                  their configuration counts
    """
    bare = flags["resume_model_only"]
    start |= {"weights": "ema" if bare and flags["finetune_from_ema"] else "model", "state": not bare}
    idle = {} if bare else {"finetune_from_ema": "it needs --resume_model_only True"}
    if flags["finetune_from_hf"]:
        if not start["checkpoint"]:
            added = f"--resume_from {start['facts']} --resume_model_only True --finetune_from_ema True"
            reads = "--finetune_from_hf True reads the configuration alone and would train random weights"
            raise ValueError(f"{reads}; add {added}")
        start["settings"] = {n: flags[n] for n in TOP_LEVEL if flags[n] != FLAGS[n].default}
        start["parts"] = None
        return idle | dict.fromkeys(ONLY_FROM_PARTS, "--finetune_from_hf True takes all from --model_path")
    start |= {"facts": None, "settings": {}}
    start["parts"]["seed"] = flags["global_seed"]
    for part, wanted in (("vit", flags["visual_und"]), ("vae", flags["visual_gen"])):
        start["parts"][part] = start["parts"][part] if wanted else None
    return idle | {"model_path": "only --finetune_from_hf True reads it"}


def recipe(arguments: Sequence[str]) -> dict[str, Any]:
    """A command line to a recipe's tree, checked against the checkpoint that it names.

    ValueError when --max_latent_size is smaller than the checkpoint's grid of positions. Left out, the
    checkpoint's grid stays. A larger one is computed anew: the sin-cos table gives a row and a column the
    same numbers whatever its side, so that nothing learned is lost. As no flag sets the streams of packs,
    they are so many that the ranks of torchrun can share them.
    """
    tree = recipe_of(parse(arguments))
    facts, wanted = tree["start"]["facts"], tree["start"]["settings"].get("max_latent_size")
    if wanted and wanted < (stored := describe(Path(facts))["config"]["max_latent_size"]):
        smaller = f"--max_latent_size {wanted} is smaller than the {stored}x{stored} grid of {facts}"
        remedy = f"larger pictures would have no positions; give --max_latent_size {stored}"
        raise ValueError(f"{smaller}: {remedy}")
    streams = Packing().streams
    tree["data"]["packing"]["streams"] = streams + -streams % int(os.environ.get("WORLD_SIZE", "1"))
    if find_spec("wandb") is None:
        warnings.warn("no Weights & Biases log: pip install 'openbagel[track]'", stacklevel=2)
        tree["track"]["wandb_project"] = None
    return tree
