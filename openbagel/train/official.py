"""The official training script's flags: names, types, defaults, and their places in the recipe's tree.

`parse` reads a command line as the script does: `True`, `False` or nothing after a switch, dashes for
underscores, unambiguous beginnings of names (`--num_worker`). A path or name whose value is empty (a shell
variable that is not set) keeps its default. Source: reference/training.md.

`dataset_info_file` is the one flag that the script does not have: a YAML file with the paths that its users
write into its Python (group, data set, `data_dir` and so on). Without it they are looked for under
`dataset_info` in the mixture's own file.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from openbagel.attention import Execution
from openbagel.config import nearest
from openbagel.train.presets import nested
from openbagel.weights import TOP_LEVEL, describe


def flag(default: Any, place: str | None = None, *, idle: str = "") -> Any:
    """A flag that is the recipe's value at `place`; idle says why it has no effect."""
    return dataclasses.field(default=default, metadata={"place": place, "idle": idle})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    model_path: str = flag("hf/BAGEL-7B-MoT", "start.facts")
    llm_path: str = flag("hf/Qwen2.5-0.5B-Instruct/", "start.parts.llm")
    llm_qk_norm: bool = flag(True, "start.parts.qk_norm")
    tie_word_embeddings: bool = flag(False, idle="the head is always a matrix of its own, a copy if tied")
    layer_module: str = flag("Qwen2MoTDecoderLayer", "start.parts.layer_module")
    vae_path: str = flag("flux/vae/ae.safetensors", "start.parts.vae")
    vit_path: str = flag("hf/siglip-so400m-14-980-flash-attn2-navit/", "start.parts.vit")
    max_latent_size: int = flag(32, "start.parts.max_latent_size")
    latent_patch_size: int = flag(2, "start.parts.latent_patch_size")
    vit_patch_size: int = flag(14, idle="the ViT's config.json states it")
    vit_max_num_patch_per_side: int = flag(70, "start.parts.vit_max_num_patch_per_side")
    connector_act: str = flag("gelu_pytorch_tanh", "start.parts.connector_act")
    interpolate_pos: bool = flag(False, "start.parts.interpolate_pos")
    vit_select_layer: int = flag(-2, "start.parts.vit_select_layer")
    vit_rope: bool = flag(False)
    text_cond_dropout_prob: float = flag(0.1, "data.dropout.text")
    vae_cond_dropout_prob: float = flag(0.3, "data.dropout.vae")
    vit_cond_dropout_prob: float = flag(0.3, "data.dropout.vit")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArguments:
    dataset_config_file: str = flag("data/configs/example.yaml", "data.mixture")
    dataset_info_file: str | None = flag(None, "data.dataset_info")
    prefetch_factor: int = flag(2, "data.prefetch_factor")
    num_workers: int = flag(4, "data.workers")
    max_num_tokens_per_sample: int = flag(16384, "data.packing.max_num_tokens_per_sample")
    max_num_tokens: int = flag(36864, "data.packing.max_num_tokens")
    prefer_buffer_before: int = flag(16384, "data.packing.prefer_buffer_before")
    max_buffer_size: int = flag(50, "data.packing.max_buffer_size")
    data_seed: int = flag(42, "data.seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingArguments:
    visual_gen: bool = flag(True, "train.visual_gen")
    visual_und: bool = flag(True, "train.visual_und")
    results_dir: str = flag("results", "folder")
    checkpoint_dir: str = flag("results/checkpoints", "checkpoints")
    wandb_project: str = flag("bagel", "track.wandb_project")
    wandb_name: str = flag("run", "track.wandb_name")
    wandb_runid: str = flag("0", "track.wandb_run_id")
    wandb_resume: str = flag("allow", "track.wandb_resume")
    wandb_offline: bool = flag(False, "track.wandb_offline")
    global_seed: int = flag(4396, "train.seed")
    auto_resume: bool = flag(False, "train.auto_resume")
    resume_from: str | None = flag(None, "start.checkpoint")
    resume_model_only: bool = flag(False)
    finetune_from_ema: bool = flag(False)
    finetune_from_hf: bool = flag(False)
    log_every: int = flag(10, "track.log_every")
    save_every: int = flag(2000, "train.save_every")
    total_steps: int = flag(500_000, "train.steps")
    warmup_steps: int = flag(2000, "train.schedule.warmup")
    lr_scheduler: str = flag("constant", "train.schedule.kind")
    lr: float = flag(1e-4, "train.schedule.lr")
    min_lr: float = flag(1e-7, "train.schedule.min_lr")
    beta1: float = flag(0.9, "train.beta1")
    beta2: float = flag(0.95, "train.beta2")
    eps: float = flag(1e-15, "train.eps")
    ema: float = flag(0.9999, "train.ema")
    max_grad_norm: float = flag(1.0, "train.max_grad_norm")
    timestep_shift: float = flag(1.0, "train.timestep_shift")
    mse_weight: float = flag(1.0, "train.mse_weight")
    ce_weight: float = flag(1.0, "train.ce_weight")
    ce_loss_reweighting: bool = flag(False, "train.ce_reweighting")
    expected_num_tokens: int = flag(32768, "data.packing.expected_num_tokens")
    gradient_accumulation_steps: int = flag(1, "train.accumulation")
    peak_device_tflops: float = flag(0.0, "track.peak_device_tflops")
    num_replicate: int = flag(1, "parallel.num_replicate")
    num_shard: int = flag(8, "parallel.num_shard")
    sharding_strategy: str = flag("HYBRID_SHARD")
    backward_prefetch: str = flag("BACKWARD_PRE", idle="FSDP2 fetches the next block ahead by itself")
    cpu_offload: bool = flag(False, "parallel.cpu_offload")
    freeze_llm: bool = flag(False, "train.freeze.llm")
    freeze_vit: bool = flag(False, "train.freeze.vit")
    freeze_vae: bool = flag(True, idle="the autoencoder only encodes and is never trained")
    freeze_und: bool = flag(False, "train.freeze.und")
    copy_init_moe: bool = flag(True, "start.parts.copy_experts")
    use_flex: bool = flag(False)


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]
GROUPS = (ModelArguments, DataArguments, TrainingArguments)
FLAGS = {f.name: f for group in GROUPS for f in dataclasses.fields(group)}
ONLY_FROM_PARTS = ("llm_path", "vit_path", "vae_path", "llm_qk_norm", "vit_select_layer", "copy_init_moe")
STRATEGIES = ("HYBRID_SHARD", "FULL_SHARD")
"""What the reference can save, too."""
TRUTHS = {word: True for word in ("true", "t", "yes", "y", "1")}
TRUTHS |= {word: False for word in ("false", "f", "no", "n", "0")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> Arguments:
    """The flags of a command line; ValueError says what is wrong and names the nearest flag."""
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
    given = vars(parsed)
    return tuple(group(**{n: given[n] for n in group.__slots__ if n in given}) for group in GROUPS)  # pyright: ignore


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


def recipe_of(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> dict[str, Any]:
    """The recipe's tree, of JSON values. Flags that change nothing warn; unsupported values are a ValueError.

    num_shard at its default means as many shards as the ranks allow.
    """
    flags = {name: getattr(group, name) for group in (model, data, training) for name in group.__slots__}
    if model.vit_rope:
        raise ValueError("--vit_rope True: ViTs with rotary positions are not supported; leave it out")
    strategy = training.sharding_strategy
    if strategy not in STRATEGIES:
        hint = nearest(strategy, STRATEGIES)
        raise ValueError(f"--sharding_strategy {strategy!r} is not {' or '.join(STRATEGIES)}{hint}")
    places = {f.metadata["place"]: flags[name] for name, f in FLAGS.items() if f.metadata["place"]}
    if strategy == "FULL_SHARD":
        places |= {"parallel.num_shard": None, "parallel.num_replicate": 1}
    elif training.num_shard == FLAGS["num_shard"].default:
        places["parallel.num_shard"] = None
    execution = Execution.FLEX if training.use_flex else Execution.SPLITS
    tree = nested(places | {"data.packing.method": "official", "train.execution": execution.value})
    idle = {name: f.metadata["idle"] for name, f in FLAGS.items() if f.metadata["idle"]}
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
            raise ValueError(
                "--finetune_from_hf True reads the configuration alone and would train random weights; add "
                f"--resume_from {start['facts']} --resume_model_only True --finetune_from_ema True"
            )
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
    same numbers whatever its side, so that nothing learned is lost.
    """
    tree = recipe_of(*parse(arguments))
    facts, wanted = tree["start"]["facts"], tree["start"]["settings"].get("max_latent_size")
    if wanted and wanted < (stored := describe(Path(facts))["config"]["max_latent_size"]):
        raise ValueError(
            f"--max_latent_size {wanted} is smaller than the {stored}x{stored} grid of {facts}: "
            f"larger pictures would have no positions; give --max_latent_size {stored}"
        )
    if find_spec("wandb") is None:
        warnings.warn("no Weights & Biases log: pip install 'openbagel[track]'", stacklevel=2)
        tree["track"]["wandb_project"] = None
    return tree
