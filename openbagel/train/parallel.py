"""Many processes, one model: ranks, FSDP2 shards, recomputation and precision, all applied from outside.

`shard` leaves the model's names, state dict and mathematics as they are. Gradients come out as *sums* over
the ranks, so a loss normalised by global counts (`Ranks.all_sum`) needs no factor for the number of ranks.

    whole tensor      rank 0 │ rank 1 │ rank 2       every parameter is split along its first dimension;
    rows 0 … n        0 … a  │ a … b  │ b … n        HSDP repeats that split num_replicate times
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from openbagel.config import BagelConfig
from openbagel.images import sincos_table
from openbagel.model.bagel import BagelModel
from openbagel.model.transformer import Block
from openbagel.model.vit import EncoderLayer
from openbagel.sequence import PackedSequence
from openbagel.train.metrics import Report, say
from openbagel.weights import MAY_BE_MISSING, TensorFiles, default_device

LAYERS = (Block, EncoderLayer)
TIMEOUT_S = 1800.0
"""A collective that waits longer than this fails: some rank is gone."""
ROOM = 0.9
"""The share of a device's memory that a run may plan with."""


class Ranks:
    """The processes of a run as torchrun started them; one process alone has no process group.

    Objects and flags travel over gloo, tensors over NCCL on CUDA and gloo elsewhere. Only the first reports.
    """

    def __init__(
        self, device: str | None = None, *, timeout_s: float = TIMEOUT_S, report: Report = say
    ) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_first = self.rank == 0
        self.report = report if self.is_first else lambda _: None
        kind = device or default_device().type
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(kind)
        self.device, self.timeout = torch.device(kind), timedelta(seconds=timeout_s)
        self.control: Any = None
        if self.size > 1:
            self.start_group()

    def start_group(self) -> None:
        """Joins the other ranks; a lone process makes a group of its own, which sharding needs."""
        if dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        alone: dict[str, Any] = {} if self.size > 1 else {"store": dist.HashStore()}  # pyright: ignore
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=self.timeout, **alone)
        self.control = self.new_group()

    def new_group(self) -> Any:
        """A gloo group of all ranks, for a thread of its own; None for one process. All ranks call this."""
        return dist.new_group(backend="gloo", timeout=self.timeout) if dist.is_initialized() else None

    def memory(self) -> int:
        """Bytes that this rank may fill, of its card or of its share of the machine."""
        if self.device.type == "cuda":
            return int(ROOM * torch.cuda.get_device_properties(self.device).total_memory)
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(ROOM * whole) // int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=group or self.control)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank: the same answer on all of them."""
        return any(self.gather_objects(flag))

    def barrier(self) -> None:
        """Waits for all ranks; RuntimeError names one that did not come in time."""
        if self.size > 1:
            dist.monitored_barrier(self.control, timeout=self.timeout)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class Precision(StrEnum):
    """Master weights, gradients and optimiser are float32 in all three.

    BFLOAT16 computes in bfloat16 throughout (norms, rotary positions and losses stay float32 by code).
    PRODUCTS rounds the operands of linear layers alone: the faster one on CPUs with bfloat16 instructions.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    PRODUCTS = "bfloat16_products"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a run spreads its model. num_shard None: as many as there are ranks per replica."""

    num_shard: int | None = None
    num_replicate: int = 1
    cpu_offload: bool = False
    recompute: float | None = None
    """Share of the layers, evenly spaced, whose activations are computed again in the backward pass: 0 none,
    1 all (as the reference does). None: so many as memory asks for, by `memory_estimate`.
    """
    precision: Precision = Precision.FLOAT32

    def shards(self, num_ranks: int) -> int:
        """Ranks that share one copy of the model; ValueError where the numbers do not fit the ranks."""
        shards = self.num_shard or max(num_ranks // self.num_replicate, 1)
        if shards * self.num_replicate != num_ranks:
            product = f"num_shard {shards} x num_replicate {self.num_replicate}"
            remedy = f"leave num_shard out, or start {shards * self.num_replicate} processes"
            raise ValueError(f"{product} is not the number of ranks, {num_ranks}; {remedy}")
        return shards


def shard(model: BagelModel, parallel: Parallel, ranks: Ranks) -> BagelModel:
    """Prepares the model in place and returns it: complete gradients, recomputation, precision, FSDP2.

    The model may be on the meta device; give it its values with `materialise` then. One process shards only
    where bfloat16 or offloading need it. Later, `forward` or `losses` run first, then the other methods.
    """
    parallel.shards(ranks.size)
    offload = parallel.cpu_offload and ranks.device.type != "cpu"
    if offload != parallel.cpu_offload:
        warnings.warn("cpu_offload has no effect: the model trains on the CPU", stacklevel=2)
    if parallel.precision is Precision.PRODUCTS:
        bfloat16_products(model)
    _complete(model, always=ranks.size > 1)
    _recompute(model, parallel.recompute or 0.0)
    if ranks.size > 1 or offload or parallel.precision is Precision.BFLOAT16:
        _fully_shard(model, parallel, ranks, fsdp.CPUOffloadPolicy() if offload else fsdp.OffloadPolicy())
    elif not next(model.parameters()).is_meta:
        model.to(ranks.device)
    return model


def _recompute(model: BagelModel, share: float) -> None:
    for kind in LAYERS:
        layers = [module for module in model.modules() if isinstance(module, kind)]
        for i, layer in enumerate(layers):
            if round((i + 1) * share) > round(i * share):
                again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
                _override(layer, "forward", again)


def _fully_shard(model: BagelModel, parallel: Parallel, ranks: Ranks, offload: fsdp.OffloadPolicy) -> None:
    """One unit per layer and per module beside the layers, so that the root owns no parameters: every method
    of the model gathers what it uses, not `forward` alone.
    """
    ranks.start_group()
    shape, names = (parallel.num_replicate, parallel.shards(ranks.size)), ("replicate", "shard")
    single = parallel.num_replicate == 1
    mesh = init_device_mesh(ranks.device.type, shape[single:], mesh_dim_names=names[single:])
    low = torch.bfloat16 if parallel.precision is Precision.BFLOAT16 else None
    policy = fsdp.MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for module in (*_units(model), model):
        unit = fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no average, and counts are global already
        unit.set_gradient_divide_factor(1.0)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, LAYERS) or not any(isinstance(part, LAYERS) for part in module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _units(child)


def _override(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    module.__dict__[name] = function  # an attribute of the instance, which its class knows nothing of


def _complete(model: BagelModel, *, always: bool) -> None:
    """Lets every pack pass through every part, on no rows where it has none for it.

    Then each trainable parameter gets a gradient (zero, if it was not used) and all ranks gather and reduce
    in the same order, whatever their packs hold. `always`: without gradients too, as many ranks need.
    """
    embed, losses = model.embed, model.losses

    def complete_embed(sequence: PackedSequence) -> Tensor:
        if not (always or torch.is_grad_enabled()):
            return embed(sequence)
        x_TD = embed(replace(sequence, latents=sequence.latents[:0]))
        if model.config.vit and not len(sequence.patches):
            origin = sequence.position_ids.new_zeros(1)
            patch = sequence.patches.new_zeros(1, sequence.patches.shape[1])
            blank = replace(sequence, patches=patch, patch_position_ids=origin, patch_counts=(1,))
            x_TD = x_TD + 0 * model.look(blank).sum()
        return torch.cat([x_TD, model.embed_latents(sequence)]) if model.config.vae else x_TD

    def complete_losses(sequence: PackedSequence, **options: Any) -> tuple[Tensor, Tensor]:
        ce, mse = losses(sequence, **options)
        if model.config.vae and not len(sequence.targets):
            # as hidden states it has a gradient, so that its unit is reduced at the same moment
            none_MD = torch.zeros(0, model.config.llm.hidden_size, device=ce.device, requires_grad=True)
            ce = ce + model.velocity(none_MD).sum()
        return ce, mse

    _override(model, "embed", complete_embed)
    _override(model, "losses", complete_losses)
    for block in model.language_model.model.layers:
        assert isinstance(block, Block)
        _override(block, "forward", partial(_complete_block, block, block.forward))


def _complete_block(block: Block, forward: Any, x_TD: Tensor, route: Any, attend: Any) -> Tensor:
    out_TD = forward(x_TD, route, attend)
    und, gen = block.experts
    if gen is und or route.num_und < len(x_TD) or not torch.is_grad_enabled():
        return out_TD
    q, k, v = gen.project(x_TD[:0])
    return out_TD + sum(part.sum() for part in (q, k, v, gen.output(q), gen.feed_forward(x_TD[:0])))


def _multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    out = F.linear(x.bfloat16(), linear.weight.bfloat16()).to(x.dtype)
    return out if linear.bias is None else out + linear.bias


def bfloat16_products(model: nn.Module, on: bool = True) -> None:
    """Makes every `nn.Linear` multiply in bfloat16, or gives it back its own product."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__.pop("forward", None)
            if on:
                _override(module, "forward", partial(_multiply, module))


def hold_all_reduce(model: nn.Module, hold: bool) -> None:
    """Before each backward pass of an accumulated step but the last: replicas exchange gradients once."""
    if isinstance(model, fsdp.FSDPModule):
        model.set_requires_all_reduce(not hold)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scales the gradients to this global norm at most; returns the norm before, float32[]."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# whole tensors and their parts ------------------------------------------------------------------------------


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; the tensor itself where it is whole."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """This rank's rows as a tensor that is sharded as the given one."""
    if not isinstance(tensor, DTensor):
        return part
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, **shape)


def rows_of(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """This rank's rows, sharing memory (a scalar is one row); the first one's number; and whether this rank
    is the one of its replicas that stores them.
    """
    part = local_part(tensor)
    if not isinstance(tensor, DTensor):
        return part if part.dim() else part[None], 0, not dist.is_initialized() or dist.get_rank() == 0
    place = tensor.device_mesh.get_coordinate()
    assert place and tensor.placements[-1] == Shard(0)
    *replicas, index = place
    rows, count = tensor.shape[0], tensor.device_mesh.size(-1)
    return part, min(math.ceil(rows / count) * index, rows), not any(replicas)


def stored_weights(files: TensorFiles, config: BagelConfig) -> Callable[[str], Tensor]:
    """Reads memory-mapped weights by official name; position tables are computed, for another grid than the
    files' as well.
    """
    grids = config.max_latent_size, config.vit_max_num_patch_per_side
    sides = dict(zip(MAY_BE_MISSING, grids, strict=True))

    def read(name: str) -> Tensor:
        return sincos_table(sides[name], config.llm.hidden_size) if name in sides else files[name]

    return read


def materialise(model: nn.Module, read: Callable[[str], Tensor], device: torch.device | str) -> None:
    """Gives a model on the meta device its memory on `device` and copies this rank's rows into it.

    `read` returns whole tensors by name; memory-mapped ones are touched in those rows alone, so all ranks of
    a machine together read one model.
    """
    assert all(not module._non_persistent_buffers_set for module in model.modules())
    model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        whole, (part, start, _) = read(name), rows_of(tensor)
        assert whole.shape == tensor.shape, name
        part.copy_(whole[start : start + len(part)])


# memory -----------------------------------------------------------------------------------------------------


def memory_estimate(
    model: BagelModel, plan: Parallel, *, ranks: int, tokens: int, labels: int = 0, eight_bit: bool = False
) -> dict[str, int]:
    """Bytes on one rank's device, by kind; the model may be on the meta device.

    Of P parameters, P' of them trained, on s shards: weights 4P/s, gradients 4P'/s, optimiser 8P'/s (2P'/s
    with 8-bit states), EMA 4P'/s; cpu_offload keeps these in host memory. `gathered`: two of the largest unit
    in the compute dtype and one such gradient in float32. `activations`, with b bytes per value: a token
    keeps b·(6D + 5·NH + 4·KH + 4F) and, below float32, 4·(2D + NH + KH) for the norms' copies in each block;
    a recomputed block keeps b·D, and one at a time the whole. `logits`: (2b + 8)·vocabulary per label. The
    ViT is left out.
    """
    shards, b = plan.shards(ranks), 2 if plan.precision is Precision.BFLOAT16 else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    llm, blocks = model.config.llm, model.language_model.model.layers
    heads, kv = (n * llm.head_dim for n in (llm.num_attention_heads, llm.num_key_value_heads))
    width = llm.hidden_size
    block = b * (6 * width + 5 * heads + 4 * kv + 4 * llm.intermediate_size)
    block += 4 * (2 * width + heads + kv) * (b < 4)
    again = round(len(blocks) * (plan.recompute or 0.0))
    units = [*blocks, model.language_model.lm_head]
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
    return {
        "weights": 4 * sum(p.numel() for p in model.parameters()) // shards,
        "gradients": 4 * trained // shards,
        "optimizer": (2 if eight_bit else 8) * trained // shards,
        "ema": 4 * trained // shards,
        "gathered": (2 * b + 4) * largest if shards > 1 or b == 2 else 0,
        "activations": tokens * (block * (len(blocks) - again + bool(again)) + b * width * again),
        "logits": labels * llm.vocab_size * (2 * b + 8),
    }
