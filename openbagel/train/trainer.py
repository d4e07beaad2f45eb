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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openbagel.attention import Execution
from openbagel.data.loader import Batch, Cursor, Loader, merge_cursors
from openbagel.lora import seed_dropout
from openbagel.model.bagel import BagelModel
from openbagel.sequence import PackedSequence, Packer
from openbagel.train.checkpoint import Checkpoints, training_tensors
from openbagel.train.guards import Guard, Start, StopSignal, Watch, check_first
from openbagel.train.latents import LatentEncoder
from openbagel.train.metrics import Metrics, StepRecord, Track, peak_flops, say, train_flops
from openbagel.train.optim import EMA, AdamW, Optimizer, Schedule
from openbagel.train.parallel import Ranks, clip_gradients, hold_all_reduce
from openbagel.train.previews import Previews


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """Parts that do not learn: the whole decoder, the ViT, or (`und`) the understanding expert, which then
    computes without gradients."""

    llm: bool = False
    vit: bool = False
    und: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long and how fast; defaults are the official script's where it has one."""

    steps: int = 500_000
    schedule: Schedule = Schedule()
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    eight_bit: bool = False
    """Optimiser states in a quarter of the memory, approximately."""
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
        least = {"steps": 0, "accumulation": 1, "save_every": 1, "keep": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"train.{name} {getattr(self, name)} must be at least {bound}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a loop runs and what watches over it."""

    folder: Path
    checkpoints: Path
    ranks: Ranks
    guard: Guard = field(default_factory=Guard)
    track: Track = field(default_factory=Track)
    start: Start = Start.NOTHING
    report: Callable[[str], None] = say


class Loop(ABC):
    """Owns everything that changes during a run; its checkpoints hold all of it."""

    def __init__(self, model: nn.Module, training: Training, place: Place) -> None:
        self.model, self.training, self.place = model, training, place
        self.schedule = replace(training.schedule, total=training.steps)
        self.step = 0
        names = ("beta1", "beta2", "eps", "weight_decay", "eight_bit")
        self.optimizer = Optimizer(model, AdamW(**{name: getattr(training, name) for name in names}))
        self.ema = EMA(model, training.ema, warmup=training.ema_warmup) if training.ema is not None else None
        self.watch = Watch(place.guard)
        self.ranks = place.ranks
        self.previews: Previews | None = None

    @property
    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Of each loss in the sum that is learned from."""

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

    def more(self) -> dict[str, float]:
        """Counts of this rank to log, summed over all."""
        return {}

    def train_step(self) -> StepRecord:
        """One update, or none where its verdict is bad."""
        began = time.monotonic()
        batches = self.batches()
        counted = [self.counts(batch) for batch in batches]
        names = list(counted[0])
        more = self.more()
        local = [*(sum(c[name] for c in counted) for name in names), *more.values()]
        totals = self.ranks.all_sum(torch.tensor(local, dtype=torch.float64, device=self.ranks.device))
        count = dict(zip((*names, *more), totals.tolist(), strict=True))
        losses = self._backward(batches, count)
        norm = clip_gradients(list(self.optimizer.parameters.values()), self.training.max_grad_norm).item()
        if self.step == 0 and self.place.guard.check_first_losses:
            self.check_first(losses)
        verdict = self.watch.judge(losses, norm, step=self.step)
        lr = self.schedule.at(self.step)
        if verdict.good:
            self.optimizer.step(lr)
            if self.ema is not None:
                self.ema.update(self.model, int(self.optimizer.updates))
        elif self.ranks.is_first:
            self.place.report(f"step {self.step} is left out: {verdict.reason}")
        self.optimizer.clear()
        self.step += 1
        return StepRecord(
            step=self.step - 1,
            losses=losses,
            lr=lr,
            grad_norm=norm,
            tokens=int(count["tokens"]),
            room=int(count["room"]),
            samples=int(count["samples"]),
            flops=count["flops"],
            seconds=time.monotonic() - began,
            more={"bad_steps": self.watch.bad_steps, **{name: count[name] for name in more}},
        )

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
        means = (self.ranks.all_sum(sums) / torch.tensor(list(seen.values())).to(sums)).tolist()
        return {name: mean for name, mean in zip(seen, means, strict=True) if seen[name]}

    def check_first(self, losses: dict[str, float]) -> None:
        """Compares the very first losses with what they should be."""
        assert losses

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds its averaged weights inside, if there are any."""
        return self.ema.applied(self.model) if self.ema is not None else nullcontext()

    def run(self) -> None:
        """Trains to the last step, from the newest checkpoint if there is one; saves at the end.

        SIGTERM, SIGINT and SIGUSR1 end the run after their step; it is saved then too.
        """
        checkpoints = Checkpoints(self.place.checkpoints, self.ranks, keep=self.training.keep)
        state = self._resume(checkpoints)
        with StopSignal() as signals, _log(self, state) as metrics:
            minutes = self.training.max_minutes
            deadline = math.inf if minutes is None else time.monotonic() + minutes * 60
            saved = None if state is None else self.step
            while self.step < self.training.steps:
                record = self.train_step()
                if metrics is not None:
                    metrics.step(record)
                checkpoints.poll()
                if self.previews is not None and self.previews.due(self.step):
                    with self.averaged():
                        self.previews.draw(self.step)
                stop = self.ranks.any(signals.received is not None or time.monotonic() > deadline)
                if stop or self.step % self.training.save_every == 0:
                    checkpoints.save(self.step, self._tensors(), self._facts(metrics))
                    saved = self.step
                if stop:
                    break
            if saved != self.step:
                checkpoints.save(self.step, self._tensors(), self._facts(metrics))
            checkpoints.close()

    def _resume(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        path = checkpoints.latest()
        if path is None:
            return None
        if not self.training.auto_resume:
            raise ValueError(
                f"{path} is of an earlier run; set train.auto_resume=true to go on, or choose another folder"
            )
        state = checkpoints.load(self._tensors(), path)
        assert state is not None
        self.step = state["step"]
        self.place.report(f"going on from {path}")
        self.watch.load_state_dict(state["watch"])
        self.go_to(state["cursor"])
        return state

    def _tensors(self) -> dict[str, Tensor]:
        return training_tensors(self.model, self.ema, self.optimizer, frozen=False)

    def _facts(self, metrics: Metrics | None) -> dict[str, Any]:
        log = metrics.state_dict() if metrics is not None else None
        return {"cursor": self.cursor(), "watch": self.watch.state_dict(), "metrics": log}


@contextmanager
def _log(loop: Loop, state: dict[str, Any] | None) -> Iterator[Metrics | None]:
    """The run's log on the first rank, None on others."""
    place, ranks = loop.place, loop.ranks
    if not ranks.is_first:
        yield None
        return
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    peak = peak_flops(name, place.track.peak_device_tflops)
    with Metrics(
        place.folder,
        track=place.track,
        total_steps=loop.training.steps,
        start=loop.step,
        peak=peak and peak * ranks.size,
    ) as metrics:
        if state is not None and state["metrics"] is not None:
            metrics.load_state_dict(state["metrics"])
        yield metrics


@dataclass(frozen=True, slots=True, eq=False)
class Numbered:
    """A pack and its number in the run."""

    number: int
    pack: PackedSequence


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
        self.stream: Iterator[tuple[Batch, Cursor]] | None = None
        parts = {"llm": "language_model.", "vit": "vit_model."}
        self.frozen = {part for part, prefix in parts.items() if not self._learns(prefix)}
        self.after: Cursor = loader.state_dict()
        """The cursor after the last batch taken."""
        self.skipped = 0

    def _learns(self, prefix: str) -> bool:
        """Whether any weight of a part is trained; its adapters do not count."""
        return any(name.startswith(prefix) and ".lora." not in name for name in self.optimizer.parameters)

    @property
    def weights(self) -> dict[str, float]:
        return {"ce": self.training.ce_weight, "mse": self.training.mse_weight}

    def batches(self) -> list[Numbered]:
        return [self._next() for _ in range(self.training.accumulation)]

    def _next(self) -> Numbered:
        if self.stream is None:
            self.stream = iter(self.loader)
        batch, self.after = next(self.stream)
        self.skipped += len(batch.skipped)
        pack = self.packer.pack(self.encoder.segments(batch.samples))
        return Numbered(batch.number, pack.to(self.ranks.device))

    def counts(self, batch: Numbered) -> dict[str, float]:
        pack = batch.pack
        labels = pack.label_weights.sum().item() if self.training.ce_reweighting else len(pack.labels)
        return {
            "ce": labels,
            "mse": pack.targets.numel(),
            "tokens": len(pack),
            "room": self.loader.packing.max_num_tokens,
            "samples": len(pack.spans),
            "flops": train_flops(self.model.config, pack, self.frozen),
        }

    def train_step(self) -> StepRecord:
        record = super().train_step()
        seed_dropout(self.model, None)
        return record

    def sums(self, batch: Numbered) -> dict[str, Tensor]:
        options = {"execution": self.training.execution, "freeze_und": self.training.freeze.und}
        seed_dropout(self.model, random.Random(f"{self.training.seed}/{batch.number}").getrandbits(62))
        ce, mse = self.model.losses(batch.pack, **options)
        if self.training.ce_reweighting and len(batch.pack.labels):
            ce = ce * batch.pack.label_weights
        return {"ce": ce.sum(), "mse": mse.sum()}

    def check_first(self, losses: dict[str, float]) -> None:
        if self.ranks.is_first:
            check_first(losses, self.model.config, self.place.start)

    def cursor(self) -> Cursor:
        cursors, skipped = zip(*self.ranks.gather_objects((self.after, self.skipped)), strict=True)
        return {**merge_cursors(cursors), "skipped": sum(skipped)}

    def go_to(self, cursor: Cursor) -> None:
        self.loader.load_state_dict(cursor)
        self.skipped = cursor["skipped"] if self.ranks.is_first else 0
        self.after, self.stream = self.loader.state_dict(), None

    def more(self) -> dict[str, float]:
        return {"skipped_samples": self.skipped}
