"""The toy world's own benchmark: unseen scenes, exact verdicts, held-out pairs apart."""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

import openbagel
from openbagel.config import to_json
from openbagel.inference.engine import Request
from openbagel.inference.pipeline import Answer, Bagel
from openbagel.world.judge import judge
from openbagel.world.render import render_picture
from openbagel.world.scene import World, nano_world
from openbagel.world.tasks import TASKS, Example, example

SEED = 1_000_003
"""Far from every seed that training uses."""
BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked: so many examples of each kind, with held-out pairs or without, thinking or not."""

    kinds: tuple[str, ...] = tuple(TASKS)
    samples: int = 50
    held_out: bool = False
    think: bool = False
    seed: int = SEED


@dataclass(frozen=True, slots=True)
class Record:
    """One example's verdict. output: the answer, or the picture's seed; reason: why it is wrong."""

    kind: str
    index: int
    prompt: str
    output: str
    right: bool
    reason: str
    held_out: bool


def evaluate(bagel: Bagel, plan: Plan, progress: Callable[[int], object] | None = None) -> Iterator[Record]:
    """Records in order of kind and index; the same plan on the same model gives the same records."""
    world = nano_world()
    for kind in plan.kinds:
        for first in range(0, plan.samples, BATCH):
            numbers = range(first, min(first + BATCH, plan.samples))
            made = [example(world, plan.seed, i, kind, held_out=plan.held_out) for i in numbers]
            requests = [
                _request(bagel, world, m, seed=i, think=plan.think)
                for i, m in zip(numbers, made, strict=True)
            ]
            replies = bagel.engine.drive_all(requests)
            for number, one, reply in zip(numbers, made, replies, strict=True):
                yield _judged(world, one, reply, number=number, held_out=plan.held_out)
            if progress is not None:
                progress(len(numbers))


def _request(bagel: Bagel, world: World, made: Example, *, seed: int, think: bool) -> Request[Any]:
    parts: list[Any] = [*(render_picture(scene, world.side) for scene in made.pictures), made.prompt]
    if made.target is None:
        return bagel.write_request(parts, seed=seed, think=think)
    settings = bagel.config.settings
    sampling = settings.edit if made.pictures else settings.draw
    return bagel.draw_request(parts, size=None, seed=seed, think=think, sampling=sampling)


def _judged(
    world: World, made: Example, reply: Answer | Image.Image, *, number: int, held_out: bool
) -> Record:
    if isinstance(reply, str):
        right = reply.strip() == made.answer
        output, reason = str(reply), "" if right else f"expected {made.answer!r}"
    else:
        assert made.spec is not None
        verdict = judge(made.spec, reply, world)
        right, output, reason = verdict.ok, f"seed {number}", verdict.reason
    return Record(made.kind, number, made.prompt, output, right, reason, held_out)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, square = right / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    reach = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return centre - reach, centre + reach


def table(records: Sequence[Record]) -> str:
    """A line per kind and one per group of kinds (draw, ask, edit), held-out examples apart."""
    rows = [f"{'kind':<24}{'right':>8}{'of':>6}   95 % interval"]
    for held_out in sorted({record.held_out for record in records}):
        mine = [record for record in records if record.held_out == held_out]
        groups = dict.fromkeys(record.kind.split("_")[0] for record in mine)
        for name in (*dict.fromkeys(record.kind for record in mine), *(f"{group} (all)" for group in groups)):
            some = [r for r in mine if name in (r.kind, f"{r.kind.split('_')[0]} (all)")]
            right = sum(record.right for record in some)
            low, high = wilson(right, len(some))
            label = f"{name}{' held out' if held_out else ''}"
            rows.append(f"{label:<24}{right / len(some):>8.1%}{len(some):>6}   {low:.1%} - {high:.1%}")
    return "\n".join(rows)


def report(records: Sequence[Record], plan: Plan, model: str) -> dict[str, Any]:
    """Everything needed to repeat the table: settings, versions, per-sample verdicts."""
    versions = {
        "openbagel": openbagel.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {
        "model": model,
        "plan": to_json(plan),
        "versions": versions,
        "records": [asdict(r) for r in records],
    }
