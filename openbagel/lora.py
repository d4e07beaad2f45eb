"""Low-rank adapters (LoRA, QLoRA): bind, read and write in PEFT's format, merge.

A bound linear keeps its class, its names and its weights, so that the base's names stay the official ones. It
gains a child `lora`, and a hook that adds what the child computes:

    x ──> W x + b ──────────(+)──> y            A float32[rank, in], kaiming-uniform
     └──> A ──> B · alpha/rank ─┘               B float32[out, rank], zero: the start changes nothing

Order: load, perhaps `quantize` (QLoRA), `bind` or `load_adapter`, then sharding and other wrappers.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openbagel.checks import check_choice, nearest
from openbagel.config import from_json
from openbagel.files import read_json
from openbagel.model.transformer import GEN
from openbagel.quantize import LAYERS, precision_of
from openbagel.weights import Shapes, TensorFiles

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before every name it stores."""
STORED = re.compile(r"(?:base_model\.model\.)*(.+?)\.lora_([AB])(?:\.[^.]+)?\.weight")
"""A stored name: whose it is, which of the two, and perhaps the adapter's own name between."""
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LISTED = 3
"""Names of each kind that an error gives; it counts them all."""

NOTES = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
NOTES |= {"megatron_core", "qalora_group_size", "eva_config"}
"""Entries of PEFT's configuration that do not change what an adapter computes."""
UNUSED = (None, False, "none", {}, [])
"""Values of all other entries that say that they are not used."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; others (PiSSA, OLoRA, …) change it."""


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
        check_choice("preset", self.preset, [preset.value for preset in Preset])
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
    linears = choose(model, adapter)
    _require_unbound(model)
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


def choose(model: nn.Module, adapter: Adapter) -> dict[str, nn.Linear]:
    """The linears that an adapter is for, by name. ValueError for a target or a preset that finds none."""
    linears = _linears(model)
    leaves = {name: name.rpartition(".")[2].removesuffix(GEN) for name in linears if name.startswith(LAYERS)}
    sides = {name: Preset.GEN if GEN in name else Preset.UND for name in leaves}
    chosen: set[str] = set()
    for target in adapter.targets:
        if target in leaves.values():
            hits = {name for name, leaf in leaves.items() if leaf == target}
            chosen |= {name for name in hits if adapter.preset in (Preset.BOTH, sides[name])}
        elif hits := {name for name in linears if _fullmatch(target, name)}:
            chosen |= hits
        else:
            hint = nearest(target, {*leaves.values(), *linears})
            raise ValueError(
                f"target {target!r} is neither the name of a layer's linear "
                f"({', '.join(dict.fromkeys(leaves.values()))}) nor a pattern that matches any{hint}"
            )
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
    weights = {name: model.get_parameter(f"{name}.weight") for name in bound(model)}
    for name, low in bound(model).items():
        weight, product = weights[name], low.B.detach().float() @ low.A.detach().float()
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
        stored: live[f"{name}.lora.{part}"].detach().to("cpu", torch.float32).contiguous()
        for name in adapters
        for stored, part in zip(_stored_names(name), "AB", strict=True)
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_peft_config(adapters, base), indent=2)
    (folder / CONFIG_FILE).write_text(config + "\n", "utf-8")
    save_file(tensors, folder / TENSOR_FILE, {"format": "pt"})


def _peft_config(adapters: dict[str, LowRank], base: str) -> dict[str, Any]:
    """The first rank, alpha and dropout; other ranks and alphas stand under their linear's name."""
    low = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "bias": "none",
        "r": low.rank,
        "lora_alpha": _short(low.alpha),
        "lora_dropout": low.dropout,
        "target_modules": list(adapters),
        "rank_pattern": {re.escape(k): v.rank for k, v in adapters.items() if v.rank != low.rank},
        "alpha_pattern": {re.escape(k): _short(v.alpha) for k, v in adapters.items() if v.alpha != low.alpha},
    }


def load_adapter(model: nn.Module, path: str | Path, *, weight: float = 1.0) -> int:
    """Binds an adapter, made here or by a trainer that stores PEFT's names; returns for how many linears.
    Freezes the base.

    path is a folder, or a safetensors file alone: then shapes say the ranks, and its metadata alpha, which is
    else the rank. weight scales what the adapter adds. If one is bound already, both become their sum: one
    adapter of both ranks together. Every stored tensor must find its place and every place its tensor, else
    ValueError naming the first of each, and nothing is bound. So do settings of PEFT's that change the result
    and are not applied here.
    """
    path = Path(path)
    found = [f for f in (path, path / TENSOR_FILE) if f.is_file()] or list(path.glob("*.safetensors"))
    if not math.isfinite(weight):
        raise ValueError(f"the weight {weight} of {path} is no finite number")
    if len(found) != 1:
        raise ValueError(f"{path} is no adapter folder: it has no {TENSOR_FILE}")
    files, config = TensorFiles(found), found[0].with_name(CONFIG_FILE)
    names = {_peft_name(name): name for name in files.shapes()}
    if len(names) < len(files.shapes()):
        raise ValueError(f"{path} has several tensors for one place; save each adapter in a file of its own")
    shapes = {name: files.shapes()[stored] for name, stored in names.items()}
    linears = _as_named(_linears(model), shapes)
    if found[0].name == TENSOR_FILE and config.is_file():
        peft = _read_config(config)
        sizes = {name: _size(peft, name) for name in linears if _targeted(peft, name)}
    else:
        peft, sizes = PeftConfig(), _stored_sizes(found[0], shapes, linears)
    _check(path, shapes, sizes, linears)
    model.requires_grad_(False)
    for name, (_, alpha) in sizes.items():
        a, b = (files[names[stored]].float() for stored in _stored_names(name))
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


def _as_named(linears: dict[str, nn.Linear], stored: Iterable[str]) -> dict[str, nn.Linear]:
    """The linears by a trainer's names for them: it may have wrapped the model, or held a part of it alone.

    Only if one way of naming explains every stored name, else by their own.
    """
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in stored}
    one = min(names, default="")
    within = [name.removesuffix(one) for name in linears if name.endswith(f".{one}")]
    around = [one.removesuffix(name) for name in linears if one.endswith(f".{name}")]
    views = [{k.removeprefix(cut): v for k, v in linears.items() if k.startswith(cut)} for cut in within]
    views += [{more + k: v for k, v in linears.items()} for more in around]
    fitting = [view for view in (linears, *views) if names <= view.keys()]
    return fitting[0] if len(fitting) == 1 else linears


def _stored_sizes(file: Path, shapes: Shapes, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each linear without a configuration."""
    with safe_open(file, "pt") as handle:
        told = handle.metadata() or {}
    alpha = told.get("lora_alpha", told.get("alpha"))
    if alpha is None:
        warnings.warn(f"{file} has no {CONFIG_FILE} and tells no alpha: taken to be its rank", stacklevel=3)
    ranks = {name: shapes.get(_stored_names(name)[0], ())[:1] for name in names}
    return {name: (rank[0], float(alpha or rank[0])) for name, rank in ranks.items() if rank}


def _read_config(path: Path) -> PeftConfig:
    """PEFT's configuration; ValueError for what is not applied here, and for values of another kind."""
    stored = {"peft_type": None, **read_json(path)}
    applied = {key: stored.pop(key) for key in list(stored) if key in {f.name for f in fields(PeftConfig)}}
    plain = {"peft_type": ("LORA",), "init_lora_weights": PLAIN_STARTS}
    refused = [k for k, v in stored.items() if k not in NOTES and v not in plain.get(k, UNUSED)]
    if refused:
        values = ", ".join(f"{key}={stored[key]!r}" for key in refused)
        raise ValueError(f"{path}: {values} is not supported, only plain LoRA; merge it with PEFT instead")
    return from_json(PeftConfig, applied, str(path))


def _check(
    folder: Path, stored: Shapes, sizes: dict[str, tuple[int, float]], linears: dict[str, nn.Linear]
) -> None:
    """ValueError unless the stored tensors are exactly those of these linears at these ranks."""
    wanted: Shapes = {}
    for name, (rank, alpha) in sizes.items():
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"{folder}: rank {rank} and alpha {alpha} of {name} make no sense")
        shapes = (rank, linears[name].in_features), (linears[name].out_features, rank)
        wanted.update(zip(_stored_names(name), shapes, strict=True))
    homeless = [name for name in stored if name not in wanted]
    both = {name: (stored[name], wanted[name]) for name in wanted if name in stored}
    faults = {
        "stored without a place": [n + _hint(n, linears) for n in homeless[:LISTED]] + homeless[LISTED:],
        "missing": [name for name in wanted if name not in stored],
        "misshapen": [f"{name} {a}, expected {b}" for name, (a, b) in both.items() if a != b],
    }
    if any(faults.values()) or not stored:
        placed = sum(a == b for a, b in both.values())
        told = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:LISTED])}{' …' if len(names) > LISTED else ''}"
            for kind, names in faults.items()
            if names
        )
        raise ValueError(
            f"{folder} does not fit this model: {placed} of {len(stored)} stored tensors fit; {told}. "
            "Load it on the model that it was made for, with all its parts, or save it anew"
        )


def _hint(stored: str, linears: dict[str, nn.Linear]) -> str:
    name = stored.removeprefix(PREFIX).rpartition(".lora_")[0]
    return f" (no target module in {CONFIG_FILE})" if name in linears else nearest(name, linears)


def _peft_name(stored: str) -> str:
    """A stored name as PEFT spells it: one prefix, and no name of the adapter inside."""
    match = STORED.fullmatch(stored)
    return f"{PREFIX}{match[1]}.lora_{match[2]}.weight" if match else stored


def _stored_names(name: str) -> tuple[str, str]:
    """PEFT's names of a linear's A and B."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _targeted(config: PeftConfig, name: str) -> bool:
    """Whether PEFT would adapt this linear: lists hold whole names or their ends, a string is a pattern."""

    def named(wanted: tuple[str, ...] | str | None) -> bool:
        if isinstance(wanted, str):
            return _fullmatch(wanted, name)
        return any(name == end or name.endswith(f".{end}") for end in wanted or ())

    return named(config.target_modules) and not named(config.exclude_modules)


def _size(config: PeftConfig, name: str) -> tuple[int, float]:
    """Rank and alpha: of the first pattern that fits the end of a name, as PEFT looks them up."""

    def patterned(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        found = (v for k, v in (patterns or {}).items() if _fullmatch(rf"(.*\.)?({k})", name))
        return next(found, default)

    rank = patterned(config.rank_pattern, config.r)
    alpha = patterned(config.alpha_pattern, config.lora_alpha)
    return rank, alpha * (max(rank, 0) ** 0.5 if config.use_rslora else 1)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None


def _short(number: float) -> float:
    return int(number) if number == int(number) else number


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _require_unbound(model: nn.Module) -> None:
    if bound(model):
        raise ValueError("this model has an adapter already; merge or remove it first")
