"""Learning-rate schedules, AdamW and the average of the weights; each rank works on its own rows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openbagel.checks import check_least, extra
from openbagel.train.parallel import like, local_part

LEAST_EPS_8BIT = 1e-8


class Shape(StrEnum):
    """After a linear warm-up: hold (CONSTANT), half a cosine to min_lr (COSINE), or hold and then half a
    cosine to zero over the last decay_steps (DECAY).
    """

    CONSTANT = "constant"
    COSINE = "cosine"
    DECAY = "decay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate of every step, counted from 0."""

    kind: Shape = Shape.CONSTANT
    lr: float = 1e-4
    min_lr: float = 1e-7
    warmup: int = 2000
    total: int = 500_000
    decay_steps: int = 0

    def __post_init__(self) -> None:
        check_least(self, lr=0, min_lr=0, warmup=0, decay_steps=0)

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.kind is Shape.CONSTANT:
            return self.lr
        cosine = self.kind is Shape.COSINE
        start, floor = (self.warmup, self.min_lr) if cosine else (self.total - self.decay_steps, 0.0)
        progress = min(max((step - start) / max(self.total - start, 1), 0.0), 1.0)
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The optimiser's settings; defaults from the paper (Table 3). eight_bit keeps its state in a quarter of
    the memory, approximately, and needs the extra `quant`.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    eight_bit: bool = False


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Optimizer:
    """AdamW over the trainable parameters. It sees this rank's rows alone, so sharding costs it nothing, and
    its state is there from the start. Make it once the model is sharded and has its values.
    """

    def __init__(self, model: nn.Module, settings: AdamW) -> None:
        self.parameters = learned(model)
        self.parts = {name: nn.Parameter(local_part(p)) for name, p in self.parameters.items()}
        if not self.parts:
            raise ValueError("nothing is trainable: every parameter is frozen")
        self.eight_bit = settings.eight_bit
        self.updates = torch.zeros((), dtype=torch.int64)
        """Steps taken, as a tensor of the checkpoint."""
        make = _adamw_8bit if settings.eight_bit else _adamw
        betas = (settings.beta1, settings.beta2)
        options = {"betas": betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
        self.adamw: Any = make(list(self.parts.values()), options)

    def step(self, lr: float) -> None:
        """One update from the parameters' gradients, which stay; parameters without one rest."""
        for name, part in self.parts.items():
            parameter = self.parameters[name]
            part.data = local_part(parameter)  # FSDP2 may move it when it pads or pins
            part.grad = None if parameter.grad is None else local_part(parameter.grad)
            if self.eight_bit:  # the only counter that is no tensor
                self.adamw.state[part]["step"] = int(self.updates)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.updates += 1
        self.adamw.zero_grad()

    def clear(self) -> None:
        """Drops the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The live state, by parameter and kind: loading copies into it. 8-bit blocks do not follow the rows
        of other numbers of ranks; `@rank` marks what belongs to one rank.
        """
        state: dict[str, Tensor] = {"updates": self.updates}
        for name, part in self.parts.items():
            parameter = self.parameters[name]
            whose = f"@{dist.get_rank()}" if isinstance(parameter, DTensor) else ""
            for kind, value in self.adamw.state[part].items():
                if isinstance(value, Tensor) and not kind.startswith("qmap"):
                    by_rows = value.shape == part.shape and value.dtype == torch.float32
                    key = f"{name}/{kind}" if by_rows or not value.dim() else f"{name}/{kind}{whose}"
                    state[key] = like(parameter, value) if by_rows else value
        return state


def _adamw(parts: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.AdamW:
    adamw = torch.optim.AdamW(parts, **options, fused=True)
    for part in parts:
        moments = {kind: torch.zeros_like(part, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
        adamw.state[part] = {"step": torch.zeros((), device=part.device), **moments}
    return adamw


def _adamw_8bit(parts: list[nn.Parameter], options: dict[str, Any]) -> Any:
    bitsandbytes = extra("bitsandbytes.optim.adamw", "quant", "an 8-bit optimiser")
    # a second moment that rounds to zero would divide a first moment that does not by eps
    options |= {"eps": max(options["eps"], LEAST_EPS_8BIT)}
    adamw = bitsandbytes.AdamW8bit(parts, **options)
    for index, part in enumerate(parts):
        adamw.init_state(adamw.param_groups[0], part, 0, index)
    return adamw


class EMA:
    """A float32 average of the trainable parameters: average ← d·average + (1 - d)·parameter.

    With `warmup`, d rises to `decay` as (1 + step) / (10 + step), so that a random start is soon forgotten;
    the reference has none. Make it once the model is sharded and has its values.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.average = {name: p.detach().float().clone() for name, p in learned(model).items()}

    def update(self, model: nn.Module, step: int) -> None:
        """After update number `step` of the weights; not called where a step was skipped."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for name, parameter in learned(model).items():
            local_part(self.average[name]).lerp_(local_part(parameter).float(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the averaged weights inside, exactly its own again after."""
        parts = {name: local_part(p) for name, p in learned(model).items()}
        own = {name: part.clone() for name, part in parts.items()}
        try:
            for name, part in parts.items():
                part.copy_(local_part(self.average[name]))
            yield
        finally:
            for name, part in parts.items():
                part.copy_(own[name])
