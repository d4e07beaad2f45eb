"""A first training loop with an average of the weights, a time budget and exact resume."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openbagel.attention import Execution
from openbagel.model.bagel import BagelModel
from openbagel.sequence import Packer
from openbagel.train.optim import EMA, learning_rate
from openbagel.world.samples import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """lr warms up, holds, and falls to zero over the last decay_steps; samples is the size of a step."""

    steps: int
    samples: int = 32
    lr: float = 1e-3
    warmup: int = 200
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    max_grad_norm: float = 1.0
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    kl_weight: float = 1e-4
    ema: float = 0.999
    execution: Execution = Execution.DENSE
    seed: int = 0
    max_minutes: float = 60.0
    """The run stops here whatever the step; run again to go on."""
    save_every: int = 500
    log_every: int = 50


class Loop(ABC):
    """Everything that changes during a run; `state.pt` in its folder holds all of it."""

    def __init__(self, model: nn.Module, recipe: TrainRecipe) -> None:
        self.model, self.recipe, self.step = model, recipe, 0
        self.ema = EMA(model, recipe.ema)
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        betas = (recipe.beta1, recipe.beta2)
        self.optimizer = torch.optim.AdamW(
            self.learned, lr=recipe.lr, betas=betas, eps=recipe.eps, weight_decay=0.0, fused=True
        )

    @abstractmethod
    def losses(self) -> dict[str, Tensor]:
        """The loss of this step first, then what else is worth logging: scalars."""

    def run(self, folder: Path, report: Callable[[str], None]) -> None:
        """Trains until recipe.steps or the time is up, from the folder's state if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "state.pt"
        if state.is_file():
            self.load_state_dict(torch.load(state, weights_only=True))
        started, sums = time.monotonic(), None
        while self.step < self.recipe.steps and time.monotonic() - started < self.recipe.max_minutes * 60:
            losses = self.train_step()
            values = torch.stack(list(losses.values()))
            sums = values if sums is None else sums + values
            if self.step % self.recipe.log_every == 0:
                means = (sums / self.recipe.log_every).tolist()
                row = {name: round(mean, 4) for name, mean in zip(losses, means, strict=True)}
                seconds = round(time.monotonic() - started)
                report(json.dumps({"step": self.step, **row, "lr": self.lr, "seconds": seconds}))
                sums = None
            if self.step % self.recipe.save_every == 0:
                self.save(state)
        self.save(state)

    @property
    def lr(self) -> float:
        r = self.recipe
        return learning_rate(self.step, peak=r.lr, warmup=r.warmup, total=r.steps, decay=r.decay_steps)

    def train_step(self) -> dict[str, Tensor]:
        """One update; returns the losses, detached."""
        losses = self.losses()
        next(iter(losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(self.learned, self.recipe.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.model, self.step)
        return {name: loss.detach() for name, loss in losses.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "ema"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def save(self, path: Path) -> None:
        """Replaces the state file as a whole, so that a crash leaves the last one."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "ema")}
        written = path.with_suffix(".tmp")
        torch.save(parts | {"step": self.step}, written)
        written.replace(path)


class Trainer(Loop):
    """Trains a BAGEL on packs of the toy world; step number n sees pack number n."""

    model: BagelModel

    def __init__(self, model: BagelModel, packer: Packer, teacher: Teacher, recipe: TrainRecipe) -> None:
        super().__init__(model, recipe)
        self.packer, self.teacher = packer, teacher

    def losses(self) -> dict[str, Tensor]:
        recipe = self.recipe
        pack = self.packer.pack(self.teacher.samples(self.step, recipe.samples))
        ce, mse = self.model.losses(pack, execution=recipe.execution)
        ce, mse = ce.sum() / max(len(ce), 1), mse.sum() / max(mse.numel(), 1)
        return {"loss": recipe.ce_weight * ce + recipe.mse_weight * mse, "ce": ce, "mse": mse}
