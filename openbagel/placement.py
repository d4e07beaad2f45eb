"""Where a model's parts are while it runs, applied from outside after loading: streamed from host memory, or
spread over several devices. The numbers are those of a model that is whole on one device.

    offload="blocks"       one decoder block runs while the next one comes; ViT and autoencoder come when used
    offload="sequential"   every linear and embedding comes when it runs, and goes
    device="auto"          blocks over all devices, what finds no place there streams

        side stream   │ copy 1 │ copy 2 │ copy 3 │          a copy waits until the block before the last one
        computing     │ run 0  │ run 1  │ run 2  │          has gone, so two blocks are on the device at most

On a CPU the weights stay in the file's pages and are cast block by block.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from openbagel.checks import check_choice
from openbagel.config import BagelConfig
from openbagel.memory import BITS, OVERHEAD, Usage, Weights, Work, bytes_of, rehearse, told, weights_of
from openbagel.model.transformer import GEN, RMSNorm, Route
from openbagel.quantize import PARTS, PackedLinear, precision_of
from openbagel.weights import Checkpoint

OFFLOADS = ("blocks", "sequential")
HOST = torch.device("cpu")
Modules = Sequence[nn.Module]
PINNED = 0.8
"""The share of free host memory that weights may take page-locked, which lets their copies overlap."""
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Of every device's memory, the least with which all blocks find a place: the rest is for larger requests."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which device runs each decoder block; the first holds all else. The streamed blocks, and with them (if
    there are any) the ViT and the autoencoder, wait in host memory and come while they are used.
    """

    devices: tuple[str, ...]
    blocks: tuple[str, ...]
    streamed: frozenset[int] = frozenset()

    def __str__(self) -> str:
        counts = [f"{count} blocks on {device}" for device, count in Counter(self.blocks).items()]
        return f"{', '.join(counts)}, {len(self.streamed)} of them streamed"


def plan(config: BagelConfig, precision: str, memory: Mapping[str, int], usage: Usage) -> Plan:
    """Spreads a model over devices of so many bytes, with room for a request of this usage: blocks whole, all
    beside them together on the first device. "cpu", beside others, is where the blocks wait that find no
    place.

    ValueError says how much is missing, and what would fit.
    """
    found = _planned(weights_of(config, precision), memory, usage)
    if isinstance(found, Plan):
        return found
    lighter = (name for name in BITS if isinstance(_planned(weights_of(config, name), memory, usage), Plan))
    fitting = next(lighter, None)
    remedy = f"quantize={fitting!r} fits" if fitting else "ask for smaller pictures, or offload='sequential'"
    places = ", ".join(f"{name}: {told(size)}" for name, size in memory.items())
    raise ValueError(f"the model in {precision} does not fit {places}; {told(found)} are missing; {remedy}")


def _planned(weights: Weights, memory: Mapping[str, int], usage: Usage) -> Plan | int:
    """A plan, or the bytes that are missing."""
    main, *others = devices = tuple(name for name in memory if name != "cpu") or ("cpu",)
    one = weights.block + usage.kv_cache // weights.count
    beside = weights.resident + sum(weights.visitors) + max(usage.activations, usage.autoencoder)

    def places(share: float, taken: int, block: int) -> list[str]:
        """The devices, each as often as blocks fit it; on the first one so much is taken already."""
        rooms = [(main, taken, block), *((name, usage.activations, one) for name in others)]
        return [n for n, held, size in rooms for _ in range(max(0, int(share * memory[n]) - held) // size)]

    for share in SHARES:
        if len(found := places(share, beside, one)) >= weights.count:
            return Plan(devices, tuple(found[: weights.count]))
    needed = weights.peak("blocks", usage)
    found = places(1.0, needed, weights.block)[: weights.count - 1]
    away, waiting = [name for name in found if name != main], weights.count - len(found)
    host = waiting * weights.block + sum(weights.visitors) - memory.get("cpu", math.inf)
    if (missing := max(needed - memory[main], 0 if main == "cpu" else host)) > 0:
        return int(missing)
    here = weights.count - len(away)
    streamed = frozenset(i for i in range(here) if (i + 1) * waiting // here > i * waiting // here)
    return Plan(devices, (main,) * here + tuple(away), streamed)


def spreads(config: BagelConfig, sizes: Sequence[int], size: tuple[int, int] | None) -> Iterator[str]:
    """What --device auto makes of cards of so many bytes, a line for each precision."""
    memory = {f"cuda:{number}": size - OVERHEAD for number, size in enumerate(sizes)}
    for name in ("bfloat16", *BITS):
        found = _planned(weights_of(config, name), memory, rehearse(config, _largest(config, size)))
        yield f"  --device auto, {name}: {found if isinstance(found, Plan) else told(found) + ' are missing'}"


def _largest(config: BagelConfig, size: tuple[int, int] | None = None) -> Work:
    """The request that a plan leaves room for."""
    return Work("edit" if config.vae else "ask", size or config.settings.size)


def devices_here(limits: Mapping[int | str, int | str] | None = None) -> dict[str, int]:
    """The free bytes of the CUDA cards and the host, or what limits leave of those that they name."""
    cards = range(torch.cuda.device_count())
    free = {f"cuda:{i}": torch.cuda.mem_get_info(i)[0] - OVERHEAD for i in cards}
    free["cpu"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    named = {str(name): bytes_of(size) for name, size in (limits or {}).items()}
    named = {name if name in free else f"cuda:{name}": size for name, size in named.items()}
    if unknown := [name for name in named if name not in free]:
        raise ValueError(f"max_memory: there is no device {unknown[0]} here, only {', '.join(free)}")
    return {name: size - OVERHEAD * (name != "cpu") for name, size in named.items()} or free


# streaming --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slot:
    """A tensor of a module: where the module looks for it, itself in host memory, the type to bring it to,
    and whether the generation expert alone uses it.
    """

    table: dict[str, Any]
    leaf: str
    tensor: Tensor
    dtype: torch.dtype
    gen: bool

    def on(self, device: torch.device) -> Tensor:
        return self.tensor.detach().to(device, self.dtype, non_blocking=True)


def slots_of(module: nn.Module, dtype: torch.dtype) -> list[Slot]:
    """All tensors of a module; packed weights and integers keep their type."""
    found: list[Slot] = []
    for name, owner in module.named_modules():
        packed = PARTS if isinstance(owner, PackedLinear) else ()
        for table in (owner._parameters, owner._buffers):
            for leaf, tensor in ((leaf, tensor) for leaf, tensor in table.items() if tensor is not None):
                kind = dtype if tensor.is_floating_point() and leaf not in packed else tensor.dtype
                found.append(Slot(table, leaf, tensor, kind, GEN in name + leaf))
    return found


class Ring:
    """Modules that visit a device one after another; on CUDA the next one's copy is under way while one runs.

    A step without tokens of the generation expert leaves that expert's weights at home. A module holds
    the turn while it runs, so threads that share a model wait for each other here.
    """

    def __init__(self, modules: Modules, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.slots = [slots_of(module, dtype) for module in modules]
        self.coming: dict[tuple[int, bool], tuple[list[Tensor], Any]] = {}
        self.gen = True
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.gone: Any = None
        self.turn = RLock()
        every = [slot for slots in self.slots for slot in slots]
        if self.side and sum(slot.tensor.nbytes for slot in every) < PINNED * devices_here()["cpu"]:
            for slot in every:
                slot.table[slot.leaf] = slot.tensor = slot.on(HOST).pin_memory()

    def enter(self, index: int, module: nn.Module, given: tuple[Any, ...]) -> None:
        self.turn.acquire()
        self.gen = all(one.num_und < len(given[0]) for one in given if isinstance(one, Route))
        tensors, copied = self.coming.pop((index, self.gen), None) or self._copy(index)
        self.coming.clear()
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        for slot, tensor in zip(self._wanted(index), tensors, strict=True):
            slot.table[slot.leaf] = tensor

    def leave(self, index: int, *_: Any) -> None:
        """Sends for the next one while the device still computes, then lets go of this one: in this order the
        copy takes the memory of the one before, which it waits for.
        """
        if self.side and len(self.slots) > 1:
            after = (index + 1) % len(self.slots)
            self.coming[after, self.gen] = self._copy(after)
        for slot in self.slots[index]:
            slot.table[slot.leaf] = slot.tensor
        if self.side:
            self.gone = torch.cuda.current_stream(self.device).record_event()

    def _wanted(self, index: int) -> list[Slot]:
        return [slot for slot in self.slots[index] if self.gen or not slot.gen]

    def _copy(self, index: int) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self.side) if self.side else nullcontext():
            if self.side and self.gone:
                self.side.wait_event(self.gone)
            tensors = [slot.on(self.device) for slot in self._wanted(index)]
            return tensors, self.side.record_event() if self.side else None


class Placement:
    """A model whose parts are placed. `remove` takes the hooks away and leaves at home what streamed: then it
    runs no more, until it is placed again. It runs one module at a time: threads take turns.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.model, self.dtype = checkpoint.model, dtype
        vae = checkpoint.autoencoder
        self.vae = [vae.encoder, vae.decoder] if vae is not None else []
        names = ("vit_model", "connector", "vit_pos_embed") if checkpoint.config.vit else ()
        self.vit = [self.model.get_submodule(name) for name in names]
        self.layers = list(self.model.language_model.model.layers)
        self.handles: list[Any] = []
        self.rings: list[Ring] = []

    def spread(self, plan: Plan) -> None:
        main, streamed = torch.device(plan.devices[0]), sorted(plan.streamed)
        visitors = self.vit if streamed else []
        self.settle([self.model], main, but=[*self.layers, *visitors])
        for index, (layer, name) in enumerate(zip(self.layers, plan.blocks, strict=True)):
            self.move(layer, torch.device(name))
            if index not in plan.streamed:
                self.settle([layer], torch.device(name))
        for modules in ([self.layers[index] for index in streamed], *([one] for one in visitors)):
            self.stream(modules, main)
        if streamed:
            self.lend_vae(main)
        else:
            self.settle(self.vae, main)
        self.move(self.model.language_model.model, main, main)

    def one_by_one(self, device: torch.device) -> None:
        leaves = [leaf for child in self.model.children() for leaf in _leaves(child)]
        inside = {id(leaf) for layer in self.layers for leaf in layer.modules()}
        self.settle([self.model], device, but=leaves)
        # callers read the type of those outside of the layers
        self.settle([leaf for leaf in leaves if id(leaf) not in inside], HOST)
        for leaf in leaves:
            self.stream([leaf], device)
        self.lend_vae(device)

    def lend_vae(self, device: torch.device) -> None:
        """Leaves the autoencoder in host memory, from where its halves come when they run."""
        self.settle(self.vae, HOST)
        for module in self.vae:
            self.move(module, device, HOST)
            self.stream([module], device)

    def settle(self, modules: Modules, device: torch.device, but: Modules = ()) -> None:
        """Brings modules to a device for good, but for some of their parts."""
        away = {id(slot.table) for module in but for slot in slots_of(module, self.dtype)}
        for slot in (slot for module in modules for slot in slots_of(module, self.dtype)):
            if id(slot.table) not in away:
                moved = slot.on(device)
                kept = isinstance(slot.tensor, nn.Parameter)
                slot.table[slot.leaf] = nn.Parameter(moved, requires_grad=False) if kept else moved

    def stream(self, modules: Modules, device: torch.device) -> None:
        """Brings each of several modules when it runs."""
        ring = Ring(modules, device, self.dtype)
        self.rings.append(ring)
        for index, module in enumerate(modules):
            self.handles.append(module.register_forward_pre_hook(partial(ring.enter, index), prepend=True))
            for leave in (partial(ring.leave, index), lambda *_: ring.turn.release()):
                self.handles.append(module.register_forward_hook(leave, always_call=True))

    def move(self, module: nn.Module, device: torch.device, home: torch.device | None = None) -> None:
        """Brings what a module is given to its device, and what comes out home if it has one."""

        def moved(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(one.to(device) if isinstance(one, Tensor) else one for one in given)

        self.handles.append(module.register_forward_pre_hook(moved))
        if home is not None:
            self.handles.append(module.register_forward_hook(lambda module, given, output: output.to(home)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.rings = [], []


def _leaves(module: nn.Module) -> list[nn.Module]:
    """The topmost modules with tensors of their own, which adapters may be part of; norms are none."""
    if isinstance(module, (RMSNorm, nn.LayerNorm)):
        return []
    own = any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))
    return [module] if own else [leaf for child in module.children() for leaf in _leaves(child)]


def place(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    offload: str | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Placement:
    """Places a model that was loaded into host memory: offloaded to there from a device, or ("auto") spread
    over all devices, or those that max_memory names (0: "24GB", "cpu": "64GB").
    """
    placement, config = Placement(checkpoint, dtype), checkpoint.config
    spread = str(device) == "auto"
    if offload is not None:
        check_choice("offload", offload, OFFLOADS)
        if spread or max_memory:
            raise ValueError("offload and device 'auto' (or max_memory) exclude each other; take one of them")
    if offload == "sequential":
        placement.one_by_one(torch.device(device))
    elif offload == "blocks":
        count = len(placement.layers)
        placement.spread(Plan((str(device),), (str(device),) * count, frozenset(range(count))))
    else:
        kind = precision_of(checkpoint.model) or ("float32" if dtype is torch.float32 else "bfloat16")
        usage = rehearse(config, _largest(config), dtype)
        placement.spread(plan(config, kind, devices_here(max_memory), usage))
    return placement
