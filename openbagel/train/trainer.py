"""A first training loop: packed sequences, both losses, an average of the weights, a time budget and exact
resume.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openbagel.attention import Execution
from openbagel.model.bagel import BagelModel
from openbagel.sequence import Packer
from openbagel.train.optim import EMA, learning_rate, trainable
from openbagel.world.samples import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """lr warms up, holds, and falls to zero over the last decay_steps; samples is the size of a pack."""

    steps: int
    samples: int = 32
    lr: float = 1e-3
    warmup: int = 200
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    ema: float = 0.999
    execution: Execution = Execution.DENSE
    seed: int = 0
    max_minutes: float = 60.0
    """The run stops here whatever the step; run again to go on."""
    save_every: int = 1000
    log_every: int = 50


class Trainer:
    """Everything that changes during a run; `state.pt` in the folder holds all of it."""

    def __init__(self, model: BagelModel, packer: Packer, teacher: Teacher, recipe: TrainRecipe) -> None:
        self.model, self.packer, self.teacher, self.recipe = model, packer, teacher, recipe
        self.optimizer = torch.optim.AdamW(
            trainable(model),
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.ema = EMA(model, recipe.ema)
        self.step = 0

    def run(self, folder: Path, report: Callable[[str], None]) -> None:
        """Trains until recipe.steps or the time is up, from the folder's state if there is one; saves at the
        end.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "state.pt"
        if state.is_file():
            self.load_state_dict(torch.load(state, weights_only=True))
        started, tokens, totals = time.monotonic(), 0, torch.zeros(2)
        while self.step < self.recipe.steps and time.monotonic() - started < self.recipe.max_minutes * 60:
            losses, size = self.train_step()
            totals, tokens = totals + losses, tokens + size
            if self.step % self.recipe.log_every == 0:
                ce, mse = (totals / self.recipe.log_every).tolist()
                seconds = time.monotonic() - started
                row = {
                    "step": self.step,
                    "ce": round(ce, 4),
                    "mse": round(mse, 4),
                    "lr": self.lr,
                    "seconds": round(seconds),
                }
                report(json.dumps(row | {"tokens": tokens}))
                totals = torch.zeros(2)
            if self.step % self.recipe.save_every == 0:
                self.save(state)
        self.save(state)

    @property
    def lr(self) -> float:
        r = self.recipe
        return learning_rate(self.step, peak=r.lr, warmup=r.warmup, total=r.steps, decay=r.decay_steps)

    def train_step(self) -> tuple[Tensor, int]:
        """One pack, one update; returns (mean cross-entropy, mean squared velocity error) and the pack's
        tokens.
        """
        recipe = self.recipe
        pack = self.packer.pack(self.teacher.samples(self.step, recipe.samples))
        ce, mse = self.model.losses(pack, execution=recipe.execution)
        means = torch.stack([ce.sum() / max(len(ce), 1), mse.sum() / max(mse.numel(), 1)])
        (recipe.ce_weight * means[0] + recipe.mse_weight * means[1]).backward()
        torch.nn.utils.clip_grad_norm_(trainable(self.model), recipe.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.model, self.step)
        return means.detach(), len(pack)

    def state_dict(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def save(self, path: Path) -> None:
        """Replaces the state file as a whole, so that a crash leaves the last one."""
        written = path.with_suffix(".tmp")
        torch.save(self.state_dict(), written)
        written.replace(path)
