"""The training loop: batches to losses to updates, with guard rails, a log, previews and exact resume.

    batches ─> counts ──all ranks──> global counts ─┐
       └─────> sums of losses ──────────────────────┴─> loss ─> backward ─> judged ─> AdamW ─> EMA

A loss is a sum over this rank's batches divided by the count of *all* ranks' and accumulated batches, so any
number of ranks takes the steps that one process with accumulation takes.
"""

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openbagel.attention import Execution
from openbagel.checks import check_least
from openbagel.data.loader import Cursor, Loader, merge_cursors
from openbagel.lora import seed_dropout
from openbagel.model.bagel import BagelModel
from openbagel.sequence import PackedSequence, Packer
from openbagel.train.checkpoint import Checkpoints, training_tensors
from openbagel.train.guards import Guard, Start, StopSignal, Watch, check_first
from openbagel.train.latents import LatentEncoder
from openbagel.train.metrics import Metrics, StepRecord, Track, peak_flops, train_flops
from openbagel.train.optim import EMA, AdamW, Optimizer, Schedule
from openbagel.train.parallel import Ranks, clip_gradients, hold_all_reduce
from openbagel.train.previews import Previews

SUMMED = ("tokens", "room", "samples", "flops")
"""What is counted in each batch, beside what its losses are averaged over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """Parts that do not learn: the whole decoder, the ViT, or (`und`) the understanding expert, which then
    computes without gradients."""

    llm: bool = False
    vit: bool = False
    und: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(AdamW):
    """How long and how fast; defaults are the official script's where it has one."""

    steps: int = 500_000
    schedule: Schedule = Schedule()
    max_grad_norm: float = 1.0
    accumulation: int = 1
    """Packs of each rank in one step."""
    ce_weight: float = 1.0
    mse_weight: float = 1.0
    ce_reweighting: bool = False
    """A label counts 1/√(labels of its text)."""
    ema: float | None = 0.9999
    """Decay of the averaged weights; None keeps no average."""
    ema_warmup: bool = False
    timestep_shift: float = 1.0
    marker_loss: bool = False
    """Also learn when to write and when to draw (see `Packer`)."""
    execution: Execution = Execution.SPLITS
    freeze: Freeze = Freeze()
    visual_gen: bool = True
    visual_und: bool = True
    seed: int = 4396
    auto_resume: bool = True
    """Go on from the newest checkpoint of the run; else it is an error that there is one."""
    save_every: int = 2000
    keep: int = 2
    max_minutes: float | None = None
    """The run saves and ends after the step that exceeds this; run again to go on."""

    def __post_init__(self) -> None:
        check_least(self, steps=0, accumulation=1, save_every=1, keep=1, ce_weight=0, mse_weight=0)
        check_least(self, ema=0, max_grad_norm=1e-9, timestep_shift=1e-9)
        if (self.ema or 0) >= 1:
            raise ValueError(f"ema {self.ema} must be below 1; null keeps no average")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a loop runs and what watches over it."""

    folder: Path
    checkpoints: Path
    ranks: Ranks
    guard: Guard = field(default_factory=Guard)
    track: Track = field(default_factory=Track)
    start: Start = Start.NOTHING


class Loop(ABC):
    """Owns everything that changes during a run; its checkpoints hold all of it."""

    weights: dict[str, float]
    """Of each loss in the sum that is learned from."""

    def __init__(self, model: nn.Module, training: Training, place: Place) -> None:
        self.model, self.training, self.place = model, training, place
        self.schedule = replace(training.schedule, total=training.steps)
        self.step = 0
        self.optimizer = Optimizer(model, training)
        self.ema = EMA(model, training.ema, warmup=training.ema_warmup) if training.ema is not None else None
        self.watch = Watch(place.guard)
        self.ranks = place.ranks
        self.previews: Previews | None = None
        self.tally: dict[str, float] = {}
        """Counts of this rank since the start, logged as their sum over all."""

    @abstractmethod
    def batches(self) -> list[Any]:
        """What this rank learns from in this step."""

    @abstractmethod
    def counts(self, batch: Any) -> dict[str, float]:
        """What each loss of a batch is averaged over, and `tokens`, `room`, `samples` and `flops`."""

    @abstractmethod
    def sums(self, batch: Any) -> dict[str, Tensor]:
        """Each loss summed over a batch."""

    def cursor(self) -> Any:
        """The place in the data after the last step, the same on every rank: JSON values."""
        return None

    def go_to(self, cursor: Any) -> None:
        """Continues the data there."""
        assert cursor is None

    def train_step(self) -> StepRecord:
        """One update, or none where it has a fault."""
        began = time.monotonic()
        batches = self.batches()
        counted = [self.counts(batch) for batch in batches]
        local = {name: sum(one[name] for one in counted) for name in counted[0]} | self.tally
        numbers = torch.tensor(list(local.values()), dtype=torch.float64, device=self.ranks.device)
        count = dict(zip(local, self.ranks.all_sum(numbers).tolist(), strict=True))
        losses = self._backward(batches, count)
        norm = clip_gradients(list(self.optimizer.parameters.values()), self.training.max_grad_norm).item()
        fault, lr = self.watch.fault(losses, norm, step=self.step), self.schedule.at(self.step)
        if fault:
            self.ranks.report(f"step {self.step} is left out: {fault}")
        else:
            self.optimizer.step(lr)
            if self.ema is not None:
                self.ema.update(self.model, int(self.optimizer.updates))
        self.optimizer.clear()
        self.step += 1
        sums = {"seconds": time.monotonic() - began, **{name: int(count[name]) for name in SUMMED}}
        told = {"bad_steps": self.watch.bad_steps, **{name: count[name] for name in self.tally}}
        return StepRecord(step=self.step - 1, losses=losses, lr=lr, grad_norm=norm, sums=sums, more=told)

    def _backward(self, batches: Sequence[Any], count: dict[str, float]) -> dict[str, float]:
        """Gradients of the global loss; the mean of each loss over all ranks, those that have any."""
        seen = {name: count[name] for name in self.weights}
        sums = torch.zeros(len(seen), dtype=torch.float64, device=self.ranks.device)
        for index, batch in enumerate(batches):
            hold_all_reduce(self.model, index + 1 < len(batches))
            parts = self.sums(batch)
            terms = [self.weights[name] * parts[name] / (seen[name] or 1) for name in seen]
            loss = torch.stack(terms).sum()
            if loss.requires_grad:
                loss.backward()
            sums += torch.stack([parts[name].detach() for name in seen])
        totals = dict(zip(seen, self.ranks.all_sum(sums).tolist(), strict=True))
        return {name: totals[name] / seen[name] for name in seen if seen[name]}

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds its averaged weights inside, if there are any."""
        return self.ema.applied(self.model) if self.ema is not None else nullcontext()

    def run(self, begun: Callable[[], object] = lambda: None) -> None:
        """Trains to the last step, from the newest checkpoint if there is one; saves at the end. begun is
        called once the run has found that it can go on.

        SIGTERM, SIGINT and SIGUSR1 end the run after their step; it is saved then too.
        """
        checkpoints = Checkpoints(self.place.checkpoints, self.ranks, keep=self.training.keep)
        state = self._resume(checkpoints)
        begun()
        with StopSignal() as signals, self._log(state) as metrics:
            minutes = self.training.max_minutes
            deadline = math.inf if minutes is None else time.monotonic() + minutes * 60
            stop = self.step >= self.training.steps
            if stop and state is None:
                self._save(checkpoints, metrics)
            while not stop:
                record = self.train_step()
                if metrics is not None:
                    metrics.step(record)
                checkpoints.poll()
                if self.previews is not None and self.previews.due(self.step):
                    with self.averaged():
                        self.previews.draw(self.step)
                asked = self.ranks.any(signals.received is not None or time.monotonic() > deadline)
                stop = asked or self.step >= self.training.steps
                if stop or self.step % self.training.save_every == 0:
                    self._save(checkpoints, metrics)
            checkpoints.close()
        if self.step < (steps := self.training.steps):
            self.ranks.report(f"stopped after step {self.step} of {steps}; the same command goes on")

    def _resume(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        path = checkpoints.latest()
        if path is None:
            return None
        if not self.training.auto_resume:
            remedy = "set train.auto_resume=true to go on, or choose another folder"
            raise ValueError(f"{path} is of an earlier run; {remedy}")
        state = checkpoints.load(self._tensors(), path)
        self.step = state["step"]
        self.ranks.report(f"going on from {path}")
        self.watch.load_state_dict(state["watch"])
        self.go_to(state["cursor"])
        return state

    def _tensors(self) -> dict[str, Tensor]:
        return training_tensors(self.model, self.ema, self.optimizer)

    def _save(self, checkpoints: Checkpoints, metrics: Metrics | None) -> None:
        log = metrics and metrics.state_dict()
        facts = {"cursor": self.cursor(), "watch": self.watch.state_dict(), "metrics": log}
        checkpoints.save(self.step, self._tensors(), facts)

    def _log(self, state: dict[str, Any] | None) -> AbstractContextManager[Metrics | None]:
        """The run's log on the first rank, None on others."""
        place, device = self.place, self.ranks.device
        if not self.ranks.is_first:
            return nullcontext()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = (peak_flops(name, place.track.peak_device_tflops) or 0) * self.ranks.size
        steps = self.training.steps
        metrics = Metrics(place.folder, track=place.track, total_steps=steps, start=self.step, peak=peak)
        if state is not None:
            metrics.load_state_dict(state["metrics"])
        return metrics


Numbered = tuple[int, PackedSequence]
"""A pack after its number in the run."""


class Trainer(Loop):
    """Trains a BAGEL on a loader's batches."""

    model: BagelModel

    def __init__(
        self,
        model: BagelModel,
        training: Training,
        place: Place,
        *,
        loader: Loader,
        encoder: LatentEncoder,
        packer: Packer,
    ) -> None:
        super().__init__(model, training, place)
        self.loader, self.encoder, self.packer = loader, encoder, packer
        self.stream = iter(loader)
        self.weights = {"ce": training.ce_weight, "mse": training.mse_weight}
        learned = [name for name in self.optimizer.parameters if ".lora." not in name]
        parts = {"llm": "language_model.", "vit": "vit_model."}
        self.frozen = {part for part in parts if not any(name.startswith(parts[part]) for name in learned)}
        self.after: Cursor = loader.state_dict()
        """The cursor after the last batch taken."""
        self.tally = {"skipped_samples": 0}

    def batches(self) -> list[Numbered]:
        return [self._next() for _ in range(self.training.accumulation)]

    def _next(self) -> Numbered:
        batch, self.after = next(self.stream)
        self.tally["skipped_samples"] += len(batch.skipped)
        pack = self.packer.pack(self.encoder.segments(batch.samples))
        return batch.number, pack.to(self.ranks.device)

    def counts(self, batch: Numbered) -> dict[str, float]:
        _, pack = batch
        labels = pack.label_weights.sum().item() if self.training.ce_reweighting else len(pack.labels)
        room = self.loader.reading.packing.max_num_tokens
        flops = train_flops(self.model.config, pack, self.frozen)
        seen = {"tokens": len(pack), "room": room, "samples": len(pack.spans), "flops": flops}
        return {"ce": labels, "mse": pack.targets.numel(), **seen}

    def train_step(self) -> StepRecord:
        record = super().train_step()
        seed_dropout(self.model, None)
        if record.step == 0 and self.place.guard.check_first_losses and self.ranks.is_first:
            check_first(record.losses, self.model.config, self.place.start)
        return record

    def sums(self, batch: Numbered) -> dict[str, Tensor]:
        (number, pack), training = batch, self.training
        seed_dropout(self.model, random.Random(f"{training.seed}/{number}").getrandbits(62))
        ce, mse = self.model.losses(pack, execution=training.execution, freeze_und=training.freeze.und)
        if training.ce_reweighting and len(pack.labels):
            ce = ce * pack.label_weights
        return {"ce": ce.sum(), "mse": mse.sum()}

    def cursor(self) -> Cursor:
        mine = self.after, self.tally["skipped_samples"], self.loader.bad_rows.listed
        cursors, skipped, listed = zip(*self.ranks.gather_objects(mine), strict=True)
        return {**merge_cursors(cursors), "skipped": sum(skipped), "listed": listed}

    def go_to(self, cursor: Cursor) -> None:
        self.loader.load_state_dict(cursor)
        self.tally["skipped_samples"] = cursor["skipped"] if self.ranks.is_first else 0
        self.loader.bad_rows.listed = dict(enumerate(cursor.get("listed", ()))).get(self.ranks.rank, 0)
        self.after, self.stream = self.loader.state_dict(), iter(self.loader)
