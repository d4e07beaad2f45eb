"""How much memory a model takes, told from its configuration alone, before anything is loaded.

Weights are counted by part and precision. What a request takes besides is not estimated by formulas that
age: the request itself runs on the meta device, which computes nothing, and the bytes alive are counted.

    peak  =  weights on the device  +  KV cache  +  activations of a forward, or of the autoencoder
"""

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openbagel.config import BagelConfig, bagel_0_5b, bagel_1_5b, bagel_7b
from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Read, Request, Row, in_pieces, take_in
from openbagel.inference.image import Branches, denoise
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.quantize import BLOCK, GROUP, LAYERS
from openbagel.sequence import Packer, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec
from openbagel.weights import GENERATION_PARTS

Task = Literal["draw", "edit", "ask"]
Mode = Literal["device", "blocks", "sequential"]
PRESETS = {"bagel_7b": bagel_7b, "bagel_1_5b": bagel_1_5b, "bagel_0_5b": bagel_0_5b}
"""Models that are described without their weights."""
VIT, VAE = "ViT and connector", "autoencoder"
PARTS = dict.fromkeys(GENERATION_PARTS, "generation expert") | {LAYERS: "understanding expert"}
PARTS |= dict.fromkeys(("vit_", "connector."), VIT)
"""The part of a parameter is that of the first entry which its name contains."""
BITS = {"int8": (8, 0), "fp8": (8, 0), "nf4": (4, BLOCK), "int4": (4, GROUP)}
"""Of a packed weight, and how many weights share a scale of 4 bytes (0: a row)."""
DFLOAT11 = 0.70
"""Of bfloat16's bytes."""
OVERHEAD = 600_000_000
"""Bytes of a card that CUDA, its libraries and gaps between tensors take; assumed, not measured."""
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
BUFFERS: dict[Any, Callable[[Tensor, Tensor], int]] = {
    torch.ops.aten.convolution.default: lambda given, out: max(given.nbytes, out.nbytes),
    torch.ops.aten._safe_softmax.default: lambda given, out: out.numel(),
}
"""What operators take for themselves while they run: a copy in another layout, a mask."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request: size (height, width) in pixels of the picture that is drawn and of each that is given; text
    and answer in tokens, markers included; batch such requests at once.
    """

    task: Task
    size: tuple[int, int]
    pictures: int = 1
    text: int = 64
    answer: int = 512
    batch: int = 1
    tiled_vae: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes beside the weights: of the contexts at the end, the most that a forward takes beside them, and
    the most that the autoencoder takes.
    """

    kv_cache: int
    activations: int
    autoencoder: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes by part, of one of `count` decoder blocks, and of the largest tensor in and beside the blocks."""

    parts: Mapping[str, int]
    count: int
    block: int
    largest: tuple[int, int]

    @property
    def whole(self) -> int:
        return sum(self.parts.values())

    @property
    def visitors(self) -> tuple[int, int]:
        """ViT and autoencoder, which are needed for a moment only."""
        return self.parts.get(VIT, 0), self.parts.get(VAE, 0)

    @property
    def resident(self) -> int:
        """All beside the blocks and the visitors."""
        return self.whole - self.count * self.block - sum(self.visitors)

    def peak(self, mode: Mode, usage: Usage) -> int:
        """Bytes on the device at most. Of streamed blocks two are there: one runs, the next one comes."""
        vit, vae = self.visitors
        act, decoding, held = usage.activations, usage.autoencoder, self.resident + self.block
        moments = {
            "device": (self.whole + act, self.whole + decoding),
            "blocks": (held + max(self.block, vit) + act, held + vae + decoding),
            "sequential": (self.largest[0] + act, self.largest[1], vae + decoding),
        }
        return usage.kv_cache + max(moments[mode])


@cache
def weights_of(config: BagelConfig, precision: str) -> Weights:
    """Of the model in float32, bfloat16, a precision of `openbagel.quantize`, or DFloat11, which decodes one
    block at a time.
    """
    parts: Counter[str] = Counter()
    with torch.device("meta"):
        model, vae = BagelModel(config), AutoEncoder(config.vae) if config.vae else torch.nn.Module()
    sizes = {name: _stored(name, p.shape, precision) for name, p in model.named_parameters()}
    for name, size in sizes.items():
        parts[next((PARTS[piece] for piece in PARTS if piece in name), "embeddings, heads")] += size
    block = sum(size for name, size in sizes.items() if name.startswith(f"{LAYERS}0."))
    inside, outside = (max(sizes[n] for n in sizes if n.startswith(LAYERS) is one) for one in (True, False))
    if precision == "dfloat11":
        parts["a decoded block"] = round(block / DFLOAT11)
    parts[VAE] = sum(_stored("", p.shape, precision) for p in vae.parameters())
    return Weights(dict(parts), config.llm.num_hidden_layers, block, (inside, outside))


def parameters_of(config: BagelConfig) -> dict[str, int]:
    """Their numbers by part, and of all."""
    weights = weights_of(config, "float32")
    return {name: size // 4 for name, size in [*weights.parts.items(), ("all", weights.whole)]}


def _stored(name: str, shape: torch.Size, precision: str) -> int:
    count, packed = shape.numel(), name.startswith(LAYERS) and len(shape) == 2
    if packed and precision in BITS:
        bits, shared = BITS[precision]
        return math.ceil(count * bits / 8) + 4 * math.ceil(count / (shared or shape[1]))
    if precision == "dfloat11" and (packed or any(part in name for part in ("tokens", "head", "r.layers."))):
        return round(2 * DFLOAT11 * count)
    return count * (4 if precision == "float32" else 2)


class Living(TorchDispatchMode):
    """Counts the bytes of tensors on the meta device that are alive: now, and at most so far.

    Attention is its result alone (there torch would plan whole matrices, as it must for inputs that no kernel
    takes), and BUFFERS are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func is ATTENTION and args[0].is_meta and args[0].stride(-1) == 1:
            heads_inside = args[0].transpose(1, 2)
            out = heads_inside.new_empty(heads_inside.shape).transpose(1, 2)
        elif torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if storage.device.type == "meta" and key not in self.known | given:  # else a view
                self.known.add(key)
                weakref.finalize(storage, self._gone, key, size)
                self.now += size
        self.most = max(self.most, self.now + BUFFERS.get(func, lambda given, out: 0)(args[0], out))
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@cache
def rehearse(config: BagelConfig, work: Work, dtype: torch.dtype = torch.bfloat16) -> Usage:
    """Runs a request on the meta device, one denoising step or one word of it, and counts."""
    engine = _engine(config, dtype)
    with Living() as living:
        contexts = engine.drive_all([request(config, work) for _ in range(work.batch)])
        kv_cache = living.now
    del contexts
    return Usage(kv_cache, living.most - kv_cache, autoencoder_peak(config, work, dtype))


@cache
def _engine(config: BagelConfig, dtype: torch.dtype) -> Engine:
    markers = SimpleNamespace(start=0, end=0, vision_start=0, vision_end=0, end_of_text=0)
    with torch.device("meta"):
        return Engine(BagelModel(config).to(dtype).eval(), Packer(config, cast(TextCodec, markers)))


def request(config: BagelConfig, work: Work, device: str = "meta") -> Request[object]:
    """What the verbs of `Bagel` ask for, ended early, with blank pictures; its value is what stays alive."""
    width, height = config.settings.vit_limits.fit(*reversed(work.size))
    shown = work.pictures if work.task != "draw" else 0
    looks = [VitImage(torch.zeros(3, height, width, device=device)) for _ in range(shown)]
    text, context = in_pieces((0,) * work.text), Context(config.llm)
    if work.task == "ask":
        yield from take_in([context], [*looks, *text])
        context.reserve(work.answer + 2)
        yield Forward((Row(context, (Text((0,), bare=True),), keep=True, read=Read.LOGITS),))
        return context
    grid = work.size[0] // config.latent_stride, work.size[1] // config.latent_stride
    noise = torch.zeros(grid[0] * grid[1], config.latent_channels, device=device)
    branches = Branches.of(context)
    yield from branches.hear([*([VaeImage.clean(noise, grid), look] for look in looks), text])
    sampling = config.settings.draw if work.task == "draw" else config.settings.edit
    yield from denoise(branches, noise, grid, replace(sampling, num_timesteps=2), torch.Generator())
    return branches


@torch.inference_mode()
def autoencoder_peak(config: BagelConfig, work: Work, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of taking in the pictures that are given and decoding the one that is drawn."""
    if config.vae is None or work.task == "ask":
        return 0
    with torch.device("meta"):
        autoencoder = AutoEncoder(config.vae).to(dtype)
        with Living() as living:
            grid = [side // config.vae.downsample for side in work.size]
            latents = torch.empty(1, config.vae.z_channels, *grid, dtype=dtype)
            autoencoder.decode(latents, tiled=work.tiled_vae)
            if work.task == "edit":
                autoencoder.encode(torch.empty(1, 3, *work.size, dtype=dtype), latents, tiled=work.tiled_vae)
    return living.most


def fit(config: BagelConfig, model: str, memory: int, size: tuple[int, int] | None = None) -> Iterator[str]:
    """What fits a device of so many bytes, line by line: weights, requests, the peak with each set of options
    (starred where it fits), the command to take. size: (height, width), by default the model's own, and half.
    """
    full = config.settings.size
    sizes = [size] if size else [(full[0] // 2, full[1] // 2), full]
    tasks: list[Task] = ["ask", "draw", "edit"] if config.vae else ["ask"]
    usages = {work: rehearse(config, work) for work in (Work(task, s) for s in sizes for task in tasks)}
    precisions = {name: weights_of(config, name) for name in ("bfloat16", "dfloat11", *BITS)}
    unit, name = (1e9, "GB") if precisions["bfloat16"].whole >= 1e9 else (1e6, "MB")

    def line(label: str, cells: Iterable[object]) -> str:
        shown = (f"{cell / unit:.2f} " if isinstance(cell, int) else str(cell) for cell in cells)
        return f"{label:<38}" + "".join(f"{cell:>16}" for cell in shown).rstrip()

    yield line(f"weights ({name})", (f"{precision} " for precision in precisions))
    for part in precisions["dfloat11"].parts:
        yield line("  " + part, (weights.parts.get(part, 0) for weights in precisions.values()))
    yield line("  all", (weights.whole for weights in precisions.values()))
    yield line("beside the weights", (f"{work.task} {work.size[1]}x{work.size[0]} " for work in usages))
    for part in ("kv_cache", "activations", "autoencoder"):
        yield line("  " + part.replace("_", " "), (getattr(usage, part) for usage in usages.values()))
    taken = OVERHEAD if memory > 2 * OVERHEAD else 0
    yield f"peak; * fits {memory / unit:g} {name}, {taken / unit:g} of them for CUDA itself"
    best, *_, last = None, *usages
    for options, weights, mode in ways(config):
        asks_only = "understanding" in options
        peaks = {w: weights.peak(mode, usages[w]) for w in usages if w.task == "ask" or not asks_only}
        fitting = [work for work, peak in peaks.items() if peak <= memory - taken]
        marks = (f"{peaks[w] / unit:.2f}{'*' if w in fitting else ' '}" if w in peaks else "" for w in usages)
        yield line("  " + (options or "bfloat16"), marks)
        if not (best or "(" in options) and fitting and (fitting[-1] == last or asks_only):
            best = f"openbagel {fitting[-1].task} --model {model} {options}".rstrip()
    yield f"best that fits: {best}" if best else "nothing fits; draw smaller pictures, or with --tiled-vae"


def ways(config: BagelConfig) -> Iterator[tuple[str, Weights, Mode]]:
    """Options of the command line with what they load, best first."""
    packed = {"bfloat16": ""} | {name: f"--quantize {name} " for name in BITS}
    kinds: list[tuple[str, Mode, dict[str, str]]] = [
        ("", "device", {"bfloat16": "", "dfloat11": "(a DFloat11 folder)"} | packed),
        ("--offload blocks", "blocks", packed),
        ("--offload sequential", "sequential", {"bfloat16": ""}),
        ("--understanding-only", "device", packed if config.vae else {}),
    ]
    for option, mode, precisions in kinds:
        loaded = config.understanding_only() if "understanding" in option else config
        for name, prefix in precisions.items():
            yield (prefix + option).strip(), weights_of(loaded, name), mode


def told(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def bytes_of(size: int | str) -> int:
    """Of "24GB", "800MB", "16GiB", or a number of bytes."""
    units = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    text = f"{size}B" if isinstance(size, int) else size.strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text, re.IGNORECASE)
    if found is None or found[2].upper() not in units:
        raise ValueError(f"{size!r} is no size of memory; write for example 24GB, 800MB or 16GiB")
    return int(float(found[1]) * units[found[2].upper()])
