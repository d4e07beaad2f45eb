"""Low-rank adapters (LoRA, QLoRA): bind, read and write in PEFT's format, merge.

A bound linear keeps its class, its names and its weights, so that the base's names stay the official ones. It
gains a child `lora`, and a hook that adds what the child computes:

    x ──> W x + b ──────────(+)──> y            A float32[rank, in], kaiming-uniform
     └──> A ──> B · alpha/rank ─┘               B float32[out, rank], zero: the start changes nothing

Order: load, perhaps `quantize` (QLoRA), `bind` or `load_adapter`, then sharding and other wrappers.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.checks import check_choice, nearest, retold
from openbagel.config import from_json
from openbagel.files import read_json, write_json
from openbagel.model.transformer import GEN
from openbagel.quantize import LAYERS, precision_of, require_plain, require_weights
from openbagel.weights import Shapes, TensorFiles, misfits, on_cpu, save_tensors

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before every name it stores."""
STORED = re.compile(r"(?:base_model\.model\.)*(.+?)\.lora_([AB])(?:\.[^.]+)?\.weight")
"""A stored name: whose it is, which of the two, and perhaps the adapter's own name between."""
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PATTERN = re.compile(r"\^?(\w|\\?\.|\|)+")
"""What is taken of PEFT's patterns: names, or their ends. Others could take for ever to match."""

NOTES = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
NOTES |= {"megatron_core", "qalora_group_size", "eva_config"}
"""Entries of PEFT's configuration that do not change what an adapter computes."""
UNUSED = (None, False, "none", {}, [])
"""Values of all other entries that say that they are not used."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; others (PiSSA, OLoRA, …) change it."""
Linears = dict[str, nn.Linear]
"""By name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What of `adapter_config.json` is applied; defaults are PEFT's."""

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | str | None = ()
    exclude_modules: tuple[str, ...] | str | None = ()
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


class Preset(StrEnum):
    """Whose projections learn. What both sides share (MoE's attention) has no suffix and counts as `und`."""

    UND = "und"
    GEN = "gen"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Which linears get how large an adapter.

    A target is the leaf name of a decoder layer's linear, without the generation expert's suffix, and taken
    on the preset's side; or a regular expression over whole official names, which the preset does not narrow.
    """

    preset: Preset = Preset.BOTH
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LEAVES

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, Preset)
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1 or not self.targets:
            raise ValueError(
                f"rank {self.rank} must be at least 1, alpha {self.alpha} above 0, dropout {self.dropout} "
                f"in [0, 1), and targets {self.targets} not empty"
            )


class LowRank(nn.Module):
    """One linear's adapter. Making it binds it: it becomes the child `lora` and a forward hook of the linear.

    Parameters are float32, arithmetic has the input's dtype. Dropout acts only between `seed_dropout(model,
    seed)` and `seed_dropout(model, None)`.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        device = linear.weight.device
        self.A = nn.Parameter(torch.zeros(rank, linear.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device=device))
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.seed: int | None = None
        linear.add_module("lora", self)
        self.hook = linear.register_forward_hook(self)

    def forward(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if self.dropout and self.seed is not None:  # a new generator: recomputation draws the same mask
            generator = torch.Generator(x.device).manual_seed(self.seed)
            kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
            x = x * kept / (1 - self.dropout)
        low = F.linear(x, self.A.to(x.dtype))
        return torch.add(output, F.linear(low, self.B.to(x.dtype)), alpha=self.alpha / self.rank)


def bound(model: nn.Module) -> dict[str, LowRank]:
    """The adapters by the official name of their linear, in the model's order."""
    modules = model.named_modules()
    return {name.removesuffix(".lora"): module for name, module in modules if isinstance(module, LowRank)}


def bind(model: nn.Module, adapter: Adapter, *, generator: torch.Generator) -> int:
    """Freezes the model and gives the chosen linears new adapters; returns how many.

    Only adapters learn afterwards. On the meta device they get no values: give them those of `initial`.
    """
    require_plain(model)
    linears = choose(model, adapter)
    model.requires_grad_(False)
    for linear in linears.values():
        LowRank(linear, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout)
    for name, value in initial(model, generator).items():
        model.get_parameter(name).data.copy_(value)
    return len(linears)


def initial(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Start values of all adapters by parameter name: whole, on the CPU, the same on every rank."""
    values = {}
    for name, low in bound(model).items():
        limit = low.A.shape[1] ** -0.5
        a = torch.empty(low.A.shape, dtype=torch.float32, device="cpu")
        values[f"{name}.lora.A"] = a.uniform_(-limit, limit, generator=generator)
        values[f"{name}.lora.B"] = torch.zeros(low.B.shape, dtype=torch.float32, device="cpu")
    return values


def seed_dropout(model: nn.Module, seed: int | None) -> None:
    """Switches dropout on, with masks that depend on the seed and the linear alone, or off (None).

    A trainer passes another seed with each pack.
    """
    for name, low in bound(model).items():
        low.seed = None if seed is None else Random(f"{seed}/{name}").getrandbits(62)


def choose(model: nn.Module, adapter: Adapter) -> Linears:
    """The linears that an adapter is for, by name. ValueError for a target or a preset that finds none."""
    linears = _linears(model)
    leaves = {name: name.rpartition(".")[2].removesuffix(GEN) for name in linears if name.startswith(LAYERS)}
    sided = {n for n in leaves if adapter.preset in (Preset.BOTH, Preset.GEN if GEN in n else Preset.UND)}
    chosen: set[str] = set()
    for target in adapter.targets:
        with retold(f"{target!r} is no regular expression ({{error}})", re.error):
            hits = set(filter(re.compile(target).fullmatch, linears))
        if target not in leaves.values() and not hits:
            hint = nearest(target, {*leaves.values(), *linears})
            raise ValueError(
                f"target {target!r} is neither the name of a layer's linear "
                f"({', '.join(dict.fromkeys(leaves.values()))}) nor a pattern that matches any{hint}"
            )
        chosen |= hits | {name for name in sided if leaves[name] == target}
    if not chosen:
        raise ValueError(
            f"preset '{adapter.preset}' finds no {', '.join(adapter.targets)} in this model, whose experts "
            "share them; choose 'und' or 'both'"
        )
    return {name: linear for name, linear in linears.items() if name in chosen}


def merge(model: nn.Module) -> int:
    """Adds every adapter to its weight (in float32, kept in the weight's dtype) and removes it."""
    if (precision := precision_of(model)) is not None:
        raise ValueError(f"{precision} weights cannot take an adapter in; merge it into the original ones")
    for name, low in bound(model).items():
        weight = model.get_parameter(f"{name}.weight")
        product = low.B.detach().float() @ low.A.detach().float()
        weight.data = (weight.detach().float() + low.alpha / low.rank * product).to(weight.dtype)
    return remove(model)


def remove(model: nn.Module) -> int:
    """Takes every adapter off, so that the model is its base again; returns how many."""
    adapters = bound(model)
    for name, low in adapters.items():
        low.hook.remove()
        del model.get_submodule(name)._modules["lora"]
    return len(adapters)


def save_adapter(
    model: nn.Module, folder: str | Path, *, base: str = "", state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the bound adapters as PEFT does. base is the model they belong to (folder or Hugging Face id).

    state replaces live values by parameter name: averaged ones, or shards gathered by the caller.
    """
    adapters = bound(model)
    if not adapters:
        raise ValueError("no adapter is bound to this model; bind one, or save the whole checkpoint")
    live = state if state is not None else dict(model.named_parameters())
    tensors = {
        PREFIX + stored: on_cpu(live[f"{name}.lora.{part}"], torch.float32)
        for name in adapters
        for stored, part in zip(_stored_names(name), "AB", strict=True)
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, _peft_config(adapters, base))
    save_tensors(folder / TENSOR_FILE, tensors)


def _peft_config(adapters: dict[str, LowRank], base: str) -> dict[str, Any]:
    """The first rank, alpha and dropout; other ranks and alphas stand under their linear's name."""
    low = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "bias": "none",
        "r": low.rank,
        "lora_alpha": low.alpha,
        "lora_dropout": low.dropout,
        "target_modules": list(adapters),
        "rank_pattern": {re.escape(k): v.rank for k, v in adapters.items() if v.rank != low.rank},
        "alpha_pattern": {re.escape(k): v.alpha for k, v in adapters.items() if v.alpha != low.alpha},
    }


def load_adapter(model: nn.Module, path: str | Path, *, weight: float = 1.0) -> int:
    """Binds an adapter, made here or by a trainer that stores PEFT's names; returns for how many linears.
    Freezes the base.

    path is a folder, or a safetensors file alone: then shapes say the ranks, and its metadata alpha, which is
    else the rank. weight scales what the adapter adds. If one is bound already, both become their sum: one
    adapter of both ranks together. Every stored tensor must find its place and every place its tensor, else
    ValueError naming the first of each, and nothing is bound. So do settings of PEFT's that change the result
    and are not applied here, and weights that CUDA decodes from DFloat11.
    """
    require_weights(model)
    path = Path(path)
    found = [f for f in (path, path / TENSOR_FILE) if f.is_file()] or list(path.glob("*.safetensors"))
    if not math.isfinite(weight):
        raise ValueError(f"the weight {weight} of {path} is no finite number")
    if len(found) != 1:
        raise ValueError(f"{path} is no adapter folder: it has no {TENSOR_FILE}")
    files, config = TensorFiles(found), found[0].with_name(CONFIG_FILE)
    stored = files.shapes()
    names = {_usual(name): name for name in stored}
    if len(names) < len(stored):
        raise ValueError(f"{path} has several tensors for one place; save each adapter in a file of its own")
    shapes = {name: stored[theirs] for name, theirs in names.items()}
    linears = _as_named(_linears(model), shapes)
    ranks = {name: shapes[a][0] for name in linears if shapes.get(a := _stored_names(name)[0])}
    if found[0].name == TENSOR_FILE and config.is_file():
        peft = _read_config(config)
        sizes = {name: _size(peft, name, ranks.get(name)) for name in _targeted(peft, linears, ranks)}
    else:
        peft, alpha = PeftConfig(), _told_alpha(files)
        sizes = {name: (rank, float(alpha or rank)) for name, rank in ranks.items()}
    _check(path, shapes, sizes, linears)
    model.requires_grad_(False)
    for name, (_, alpha) in sizes.items():
        a, b = (files[names[half]].float() for half in _stored_names(name))
        _join(linears[name], a, b, alpha=weight * alpha, dropout=peft.lora_dropout)
    for low in bound(model).values():
        low.requires_grad_(True)
    return len(sizes)


def _join(linear: nn.Linear, a: Tensor, b: Tensor, *, alpha: float, dropout: float) -> None:
    """Binds an adapter. With one that is there it shares a wider one: ranks side by side, scales in B."""
    if isinstance(old := linear._modules.get("lora"), LowRank):
        b = torch.cat([old.B.detach().cpu() * (old.alpha / old.rank), b * (alpha / len(a))], 1)
        a = torch.cat([old.A.detach().cpu(), a])
        alpha, dropout = len(a), 0.0
        old.hook.remove()
    low = LowRank(linear, rank=len(a), alpha=alpha, dropout=dropout)
    low.A.data.copy_(a)
    low.B.data.copy_(b)


def _as_named(linears: Linears, stored: Iterable[str]) -> Linears:
    """The linears by a trainer's names for them: it may have wrapped the model, or held a part of it alone.

    Only if one way of naming explains every stored name, else by their own.
    """
    names = {name.rpartition(".lora_")[0] for name in stored}
    one = min(names, default="")
    within = [name.removesuffix(one) for name in linears if name.endswith(f".{one}")]
    around = [one.removesuffix(name) for name in linears if one.endswith(f".{name}")]
    views = [{k.removeprefix(cut): v for k, v in linears.items() if k.startswith(cut)} for cut in within]
    views += [{more + k: v for k, v in linears.items()} for more in around]
    fitting = [view for view in (linears, *views) if names <= view.keys()]
    return fitting[0] if len(fitting) == 1 else linears


def _told_alpha(files: TensorFiles) -> str | None:
    """Without a configuration: what the metadata say."""
    told = next((handle.metadata() for handle in files.handles.values()), None) or {}
    if (alpha := told.get("lora_alpha", told.get("alpha"))) is None:
        warnings.warn(f"{files.where} tells no alpha: taken to be its rank", stacklevel=3)
    return alpha


def _read_config(path: Path) -> PeftConfig:
    """PEFT's configuration; ValueError for what is not applied here, and for values of another kind."""
    stored = {"peft_type": None, **read_json(path)}
    applied = {key: stored.pop(key) for key in list(stored) if key in {f.name for f in fields(PeftConfig)}}
    plain = {"peft_type": ("LORA",), "init_lora_weights": PLAIN_STARTS}
    if refused := [k for k, v in stored.items() if k not in NOTES and v not in plain.get(k, UNUSED)]:
        values = ", ".join(f"{key}={stored[key]!r}" for key in refused)
        raise ValueError(f"{path}: {values} is not supported, only plain LoRA; merge it with PEFT instead")
    config = from_json(PeftConfig, applied, str(path))
    alphas = config.alpha_pattern or {}
    if strange := [pattern for pattern in alphas if not PATTERN.fullmatch(pattern)]:
        raise ValueError(f"{path}: alpha_pattern {strange[0]!r} is not supported; give names, or their ends")
    ends = {key.removeprefix("^").replace("\\", ""): alpha for key, alpha in alphas.items()}
    return replace(config, alpha_pattern=ends)


def _check(folder: Path, stored: Shapes, sizes: dict[str, tuple[int, float]], linears: Linears) -> None:
    """ValueError unless the stored tensors are exactly those of these linears at these ranks."""
    wanted: Shapes = {}
    for name, (rank, alpha) in sizes.items():
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"{folder}: rank {rank} and alpha {alpha} of {name} make no sense")
        shapes = (rank, linears[name].in_features), (linears[name].out_features, rank)
        wanted.update(zip(_stored_names(name), shapes, strict=True))
    if (faults := misfits(stored, wanted)) or not stored:
        placed = sum(stored.get(name) == shape for name, shape in wanted.items())
        hint = next((_hint(name, linears) for name in stored if name not in wanted), "")
        raise ValueError(
            f"{folder} does not fit this model: {placed} of {len(stored)} stored tensors fit; {faults}{hint};"
            " load it on the model that it was made for, with all its parts, or save it anew"
        )


def _hint(stored: str, linears: Linears) -> str:
    name = stored.rpartition(".lora_")[0]
    return f" (no target module in {CONFIG_FILE})" if name in linears else nearest(name, linears)


def _usual(stored: str) -> str:
    """A stored name without what trainers put before it, and without the adapter's own name inside."""
    match = STORED.fullmatch(stored)
    return f"{match[1]}.lora_{match[2]}.weight" if match else stored


def _stored_names(name: str) -> tuple[str, str]:
    """Of a linear's A and B."""
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _targeted(config: PeftConfig, linears: Iterable[str], stored: Iterable[str]) -> list[str]:
    """The linears that PEFT would adapt: its lists hold whole names or their ends. Patterns in their place
    could take for ever to match: there what is stored tells.
    """
    wanted, unwanted = config.target_modules, config.exclude_modules or ()
    if not isinstance(wanted, tuple) or isinstance(unwanted, str):
        return list(stored)
    wanted, unwanted = set(wanted), set(unwanted)
    return [name for name in linears if wanted & _ends(name) and not unwanted & _ends(name)]


def _ends(name: str) -> set[str]:
    """The whole name, and what follows each of its dots."""
    leaves = name.split(".")
    return {".".join(leaves[i:]) for i in range(len(leaves))}


def _size(config: PeftConfig, name: str, stored: int | None) -> tuple[int, float]:
    """Rank and alpha. The rank is the stored one where it is among the patterns', alpha that of the first
    pattern that fits the end of the name, as PEFT looks it up.
    """
    rank = stored if stored and stored in (config.rank_pattern or {}).values() else config.r
    ends, patterns = _ends(name), config.alpha_pattern or {}
    alphas = (alpha for pattern, alpha in patterns.items() if not ends.isdisjoint(pattern.split("|")))
    return rank, next(alphas, config.lora_alpha) * (max(rank, 0) ** 0.5 if config.use_rslora else 1)


def _linears(model: nn.Module) -> Linears:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
