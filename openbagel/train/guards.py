"""Guard rails: what is trained, whether it starts where it should, which steps to leave out, when to stop.

Source: reference/reliability.md §4; the spike rule is OLMo's (6 sigma over 128 steps), for each loss apart.
"""

import math
import os
import signal
import statistics
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from openbagel.checks import check_least
from openbagel.config import BagelConfig

# steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Which steps are left out. A spike lies spike_sigma deviations above the mean of the last spike_window
    steps; before spike_min_seen steps nothing is a spike."""

    max_bad_steps: int = 10
    """In a row; one more ends the run."""
    skip_spikes: bool = False
    spike_sigma: float = 6.0
    spike_window: int = 128
    spike_min_seen: int = 64
    check_first_losses: bool = True

    def __post_init__(self) -> None:
        check_least(self, max_bad_steps=0)
        if not 2 <= self.spike_min_seen <= self.spike_window:
            raise ValueError(f"spike_min_seen {self.spike_min_seen} must lie in [2, {self.spike_window}]")


class Watch:
    """Judges steps. Losses and norms that are the same on every rank are judged alike there."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.seen: dict[str, deque[float]] = {}
        self.bad_steps = self.bad_in_a_row = 0

    def fault(self, losses: Mapping[str, float], grad_norm: float, *, step: int) -> str:
        """Why a step is left out, before its update; "" if it is good. ValueError when too many in a row are
        bad.
        """
        values = {**losses, "grad_norm": grad_norm}
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        bad = bad or [f"{name} jumped to {loss}" for name, loss in losses.items() if self._jumped(name, loss)]
        self.bad_steps += bool(bad)
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if self.bad_in_a_row > (most := self.guard.max_bad_steps):
            told = f"{', '.join(bad)}; that is more than max_bad_steps {most} in a row"
            raise ValueError(f"step {step}: {told}: resume from before with a lower lr, or check the data")
        return ", ".join(bad)

    def _jumped(self, name: str, loss: float) -> bool:
        """Whether a loss is a spike. It enters the window all the same: a lasting change of level is skipped
        a few times only."""
        seen = self.seen.setdefault(name, deque(maxlen=self.guard.spike_window))
        judged = self.guard.skip_spikes and len(seen) >= self.guard.spike_min_seen
        jumped = judged and loss > statistics.fmean(seen) + self.guard.spike_sigma * statistics.stdev(seen)
        seen.append(loss)
        return jumped

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        seen = {name: list(losses) for name, losses in self.seen.items()}
        return {"seen": seen, "bad_steps": self.bad_steps, "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = {name: deque(losses, self.guard.spike_window) for name, losses in state["seen"].items()}
        self.bad_steps, self.bad_in_a_row = state["bad_steps"], state["bad_in_a_row"]


def overfit_fault(history: Sequence[Mapping[str, float]]) -> str:
    """Which losses of one pack, repeated with the same noise, did not fall below half of their first value,
    and the remedy; "" if all did.
    """
    first, last = history[0], history[-1]
    stuck = [f"{n} went from {first[n]:.4g} to {last[n]:.4g}" for n in first if not 2 * last[n] <= first[n]]
    advice = "raise lr or the steps, then check labels and what is frozen"
    return f"{', '.join(stuck)} in {len(history)} steps on one pack; {advice}" if stuck else ""


# the start --------------------------------------------------------------------------------------------------


class Start(StrEnum):
    """Where the weights come from."""

    NOTHING = "training from nothing"
    PARTS = "training from a language model and an encoder"
    CHECKPOINT = "fine-tuning"


LIKELY = {
    ("ce", "above"): "the weights did not load, the tokenizer is another model's, or the labels are wrong",
    ("ce", "below"): "the answers leak into what the model sees, or the labels are wrong",
    ("mse", "above"): "the weights did not load, or scale and shift of vae_config do not fit the autoencoder",
    ("mse", "below"): "the latents are almost constant: a wrong scale in vae_config, or blank pictures",
}


def expected_first_losses(config: BagelConfig, start: Start) -> dict[str, tuple[float, float]]:
    """(low, high) of each loss, unweighted, before the first update.

    A random head gives ln(vocabulary), and half the variance of its logits more. A zero `llm2vae` predicts
    zero, so the error is the variance of noise - latents: 1 + 1. The official log starts with MSE 0.38-0.41
    and CE 0.55-1.34; other data may be harder.
    """
    chance = math.log(config.llm.vocab_size)
    bands = {"ce": (0.8 * chance if start is Start.NOTHING else 0.0, chance + 2), "mse": (1.2, 4.0)}
    if start is Start.CHECKPOINT:
        bands = {"ce": (0.0, 0.6 * chance), "mse": (0.0, 1.2)}
    return bands if config.vae else {"ce": bands["ce"]}


def check_first(losses: Mapping[str, float], config: BagelConfig, start: Start) -> None:
    """Warns, in one line each, of first losses outside their bands and of what is likely wrong."""
    for name, (low, high) in expected_first_losses(config, start).items():
        if not low <= (loss := losses.get(name, low)) <= high:
            likely = LIKELY[name, "below" if loss < low else "above"]
            band = f"outside {low:.2f}-{high:.2f}, where {start.value} begins"
            warnings.warn(f"the first {name} is {loss:.3f}, {band}: {likely}", stacklevel=2)


PART_OF = {
    "lora": "adapters",
    "_moe_gen": "generation expert",
    "language_model.": "understanding expert",
    "vit_model.": "ViT",
    "connector.": "connector",
    "": "latent projections",
}
"""The parts of a model, by what the names of their parameters contain; the first that fits counts."""


def banner(model: nn.Module, *, start: Start, source: str = "", rank: int | None = None) -> str:
    """What is trained and from where, in one line, such as "fine-tuning from ema.safetensors; 14.1 B
    trainable (…); frozen: …". rank is that of adapters. ValueError when everything is frozen."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for key, parameter in model.named_parameters():
        if not key.endswith("pos_embed.pos_embed"):  # tables, never learned
            part = next(part for mark, part in PART_OF.items() if mark in key)
            counts[parameter.requires_grad][part] += parameter.numel()
    lists = {side: ", ".join(f"{k} {_short(n)}" for k, n in parts.items()) for side, parts in counts.items()}
    if not lists[True]:
        raise ValueError("everything is frozen; unfreeze a part, for example with freeze_llm=False")
    method = "" if rank is None else f" with LoRA of rank {rank}"
    head = f"{start.value}{method}" + (f" from {source}" if source else "")
    trainable = f"{_short(counts[True].total())} trainable ({lists[True]})"
    return f"{head}; {trainable}" + (f"; frozen: {lists[False]}" if lists[False] else "")


def _short(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


# the end ----------------------------------------------------------------------------------------------------


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only set `received`, to be asked at the end of a step.

    A second one exits at once with 128 + its number. Leaving restores the old handlers. Processes that are
    forked inside (data workers) still end on SIGTERM and leave the others to their parent. Enter in the main
    thread.
    """

    SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]
    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        self.owner = os.getpid()
        self.old = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        forked = os.getpid() != self.owner
        if number == signal.SIGTERM if forked else self.received:
            os._exit(128 + number)
        if not forked:
            self.received = signal.Signals(number)
            # not print, which this very handler may have interrupted
            os.write(2, f"{self.received.name}: stopping after this step; again to exit at once\n".encode())
