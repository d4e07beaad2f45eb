"""A training loop of a few lines over random packs, the same global batch on any number of ranks."""

import copy
import random
from typing import Any

import torch
from torch import Tensor

from openbagel.model.bagel import BagelModel
from openbagel.sequence import PackedSequence
from openbagel.train.optim import EMA, AdamW, Optimizer
from openbagel.train.parallel import Parallel, Ranks, clip_gradients, hold_all_reduce, shard
from tests import tiny

PACKS = 4
"""Per step, shared among the ranks."""


def packs(step: int) -> list[PackedSequence]:
    """The first with everything, the second text only, the third only pictures to draw, then as it comes."""
    rng = random.Random(step)
    kinds = (tiny.KINDS, ("text",), ("noised",), *[tiny.KINDS] * (PACKS - 3))
    return [
        tiny.packer().pack([tiny.segments(rng, 4, kind), tiny.segments(rng, 1, ("text",))]) for kind in kinds
    ]


class Run:
    """A model with its optimiser and average; `advance` returns the loss of each step."""

    def __init__(self, ranks: Ranks, parallel: Parallel | None = None, **adamw: Any) -> None:
        self.ranks, self.parallel, self.step = ranks, parallel or Parallel(), 0
        self.model: BagelModel = shard(copy.deepcopy(tiny.model()).train(), self.parallel, ranks)
        self.optimizer = Optimizer(self.model, AdamW(**adamw))
        self.ema = EMA(self.model, 0.9, warmup=False)

    def advance(self, steps: int) -> list[float]:
        return [self._advance() for _ in range(steps)]

    def _advance(self) -> float:
        mine = packs(self.step)[self.ranks.rank :: self.ranks.size]
        counts = torch.tensor([[len(p.labels), p.targets.numel()] for p in mine], dtype=torch.float32).sum(0)
        counts = self.ranks.all_sum(counts).clamp(min=1)
        total = torch.zeros(())
        for i, pack in enumerate(mine):
            hold_all_reduce(self.model, hold=i + 1 < len(mine))
            ce, mse = self.model.losses(pack)
            loss = 0.25 * ce.sum() / counts[0] + mse.sum() / counts[1]
            loss.backward()
            total += loss.detach()
        clip_gradients(list(self.model.parameters()), 1.0)
        self.optimizer.step(1e-3)
        self.optimizer.clear()
        self.step += 1
        self.ema.update(self.model, self.step)
        return self.ranks.all_sum(total).item()


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor in full, on every rank."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in state.items()}  # pyright: ignore
