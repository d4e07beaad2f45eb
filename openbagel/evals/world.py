"""The toy world's own benchmark: unseen exercises, exact verdicts, held-out ones apart.

An exercise is a conversation. What is given is heard; what the model writes is compared word for word, what
it draws is judged, what it films is measured; and its own texts and pictures go on in the conversation.
"""

import itertools
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from PIL import Image

import openbagel
from openbagel.checks import check_choice
from openbagel.config import to_json
from openbagel.inference.engine import Request
from openbagel.inference.pipeline import Answer, Bagel
from openbagel.picture_files import png
from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Step, Writes, views
from openbagel.world.judge import judge, locate
from openbagel.world.motion import score_clip, turned_frame
from openbagel.world.render import render_picture
from openbagel.world.rows import as_heard
from openbagel.world.samples import world_named
from openbagel.world.scene import Scene, View, World
from openbagel.world.tasks import TASKS, example
from openbagel.world.tell import as_told

SEED = 1_000_003
"""Far from every seed that training uses."""
BATCH = 16
CLOSE = 0.12
"""How far, as a share of the way that they go, objects of a right clip may be from where they should be."""
TURN_SEEDS = 1_000_003
"""Between the seed of one turn and that of the next; an example's first seed is its index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked: so many examples of each kind (none named: all that there are), with what is held out
    or without, thinking or not, in a world or the model's own.
    """

    kinds: tuple[str, ...] = ()
    samples: int = 50
    held_out: bool = False
    think: bool = False
    seed: int = SEED
    world: str | None = None

    def for_model(self, bagel: Bagel) -> "Plan":
        """The plan with its world and its kinds named. ValueError for those that there are not."""
        settings = bagel.config.settings
        name = self.world or settings.world or "nano"
        kinds = kinds_of(world_named(name), self.held_out)
        able = [kind for kind, decides in kinds.items() if settings.draws_by_itself or not decides]
        for kind in self.kinds:
            check_choice(f"world {name}: kind", kind, kinds)
            if kind not in able:
                raise ValueError(f"{kind!r} is for models that decide what comes next; this does not decide")
        return replace(self, world=name, kinds=self.kinds or tuple(able))


def kinds_of(world: World, held_out: bool = False) -> dict[str, bool]:
    """The kinds that a world has and that can be asked for (plain text is not), each with whether it leaves
    it to the model what comes next.
    """
    found: dict[str, bool] = {}
    for kind in TASKS:
        with suppress(ValueError):
            made = example(world, SEED, 0, kind, held_out)
            if isinstance(made.steps[0], Said | Shown):
                found[kind] = made.decides
    return found


Content = str | tuple[bytes, ...]
"""A text, or pictures as PNG: one, or the frames of a clip."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One part of a conversation as it went. right is None for what was given; what the model made stands
    beside one right answer.
    """

    content: Content
    truth: Content = ""
    right: bool | None = None
    reason: str = ""
    thought: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One example's verdict: right if every turn is; reason: why the first wrong one is wrong.

    measures: what else was measured, such as whether texts and pictures came in the right order.
    """

    kind: str
    index: int
    held_out: bool
    right: bool
    reason: str
    turns: tuple[Turn, ...]
    measures: dict[str, float]


def evaluate(bagel: Bagel, plan: Plan, progress: Callable[[int], object] | None = None) -> Iterator[Record]:
    """Records in order of kind and index; the same plan on the same model gives the same records."""
    plan = plan.for_model(bagel)
    assert plan.world is not None
    world = world_named(plan.world)
    for kind in plan.kinds:
        for first in range(0, plan.samples, BATCH):
            numbers = range(first, min(first + BATCH, plan.samples))
            talks = [_Talk(world, i, example(world, plan.seed, i, kind, plan.held_out)) for i in numbers]
            while waiting := [talk for talk in talks if talk.hear()]:
                requests = [talk.request(bagel, plan.think) for talk in waiting]
                for talk, reply in zip(waiting, bagel.engine.drive_all(requests), strict=True):
                    talk.take(reply)
            yield from (talk.record(plan.held_out) for talk in talks)
            if progress is not None:
                progress(len(talks))


@dataclass(slots=True)
class _Talk:
    """One exercise while it is done."""

    world: World
    number: int
    example: Example
    steps: list[Step] = field(init=False)
    """Those still to come, without thoughts."""
    heard: list[Any] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = list(self.example.without_thought().steps)

    def hear(self) -> bool:
        """Takes in what is given next; whether something is to be made then."""
        while self.steps and isinstance(step := self.steps[0], Said | Shown):
            self.steps.pop(0)
            part = as_heard(step, self.world.side)
            self.heard.append(part)
            self.turns.append(Turn(_content(part)))
        return bool(self.steps)

    def request(self, bagel: Bagel, think: bool) -> Request[Any]:
        settings, made = bagel.config.settings, sum(turn.right is not None for turn in self.turns)
        seed = self.number + TURN_SEEDS * made
        if self.example.decides:
            return bagel.interleave_request(self.heard, size=None, seed=seed, think=think)
        if isinstance(self.steps[0], Writes):
            return bagel.write_request(self.heard, seed=seed, think=think)
        both = len({isinstance(part, str) for part in self.heard}) == 2
        sampling = settings.edit if both else settings.draw
        if isinstance(self.steps[0], Films):
            count = len(self.steps[0].views)
            return bagel.film_request(self.heard, num_frames=count, seed=seed, sampling=sampling)
        return bagel.draw_request(self.heard, size=None, seed=seed, think=think, sampling=sampling)

    def take(self, reply: Any) -> None:
        """Judges what was made for the next step, or for all of them where the model decides."""
        if not self.example.decides:
            self._judge(self.steps.pop(0), reply)
            self.heard += reply if isinstance(reply, list) else [reply]
            return
        wanted, self.steps = self.steps, []
        kinds = [isinstance(step, Writes) for step in wanted]
        self.measures["order"] = float([isinstance(made, str) for made in reply] == kinds)
        texts = [str(made) for made in reply if isinstance(made, str)]
        for place, (step, made) in enumerate(itertools.zip_longest(wanted, reply)):
            told = wanted[: place + 1]
            try:
                if made is None or step is None or isinstance(made, str) != kinds[place]:
                    wrong = "went on after the end" if step is None else "the wrong one of text and picture"
                    raise ValueError("ended too early" if made is None else wrong)
                if any(kinds[: place + 1]):  # then the model's own words say what is right
                    told = as_told(self.world, replace(self.example, steps=tuple(told)), texts).steps
                self._judge(told[-1], made)
            except ValueError as error:
                self.turns.append(Turn(_content(made), _truth(step, self.world), False, str(error)))

    def _judge(self, step: Step, made: Any) -> None:
        if isinstance(step, Writes):
            reason = "" if made.strip() == step.words else f"expected {step.words!r}"
        elif isinstance(step, Films):
            reason = self._clip(step.views, made)
        else:
            assert isinstance(step, Draws)
            reason = judge(step.spec, made, self.world).reason
        some = made[0] if isinstance(made, list) else made
        thought = some.thought if isinstance(some, Answer) else some.info.get("thought")
        self.turns.append(Turn(_content(made), _truth(step, self.world), not reason, reason, thought))

    def _clip(self, views: Sequence[View], frames: list[Image.Image]) -> str:
        """Measures a clip; what is wrong with it. Where no frame was given it may begin anywhere."""
        truth = [view for view in views if isinstance(view, Scene)]
        found = [locate(f, scene.things, self.world) for f, scene in zip(frames, truth, strict=True)]
        score, goes_on = score_clip(truth, found), any(not isinstance(part, str) for part in self.heard)
        self.measures["lost"] = float(score.lost)
        if goes_on:
            self.measures["position error"] = score.error
        if score.lost or not (score.error <= CLOSE if goes_on else score.steered):
            return "an object is lost" if score.lost else f"the way is wrong (error {score.error:.2f})"
        turned = turned_frame(truth) if goes_on else None
        return judge(turned[1], frames[turned[0]], self.world).reason if turned else ""

    def record(self, held_out: bool) -> Record:
        kind, turns = self.example.kind, tuple(self.turns)
        reason = next((turn.reason for turn in turns if turn.right is False), "")
        return Record(kind, self.number, held_out, not reason, reason, turns, self.measures)


def _content(part: Any) -> Content:
    if part is None or isinstance(part, str):
        return str(part or "")
    pictures = part if isinstance(part, list) else [part]
    return tuple(png(picture.quantize(32)) for picture in pictures)  # enough colours to look at


def _truth(step: Step | None, world: World) -> Content:
    if step is None or isinstance(step, Writes):
        return step.words if step else ""
    return _content([render_picture(view, world.side) for view in views([step])])


# scores -----------------------------------------------------------------------------------------------------


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Those of each kind, then of each group of kinds (draw, ask, edit …), held-out examples apart."""
    found: dict[str, list[Record]] = {}
    for name in (str, group_of):
        for record in records:
            label = f"{name(record.kind)}{' held out' * record.held_out}"
            found.setdefault(label, []).append(record)
    return found


def group_of(kind: str) -> str:
    return f"{kind.partition('_')[0]} (all)"


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, square = right / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    reach = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return centre - reach, centre + reach


def table(records: Sequence[Record]) -> str:
    """A line per kind and one per group of kinds, with what else was measured."""
    rows = [f"{'kind':<24}{'right':>8}{'of':>6}   95 % interval"]
    for label, some in grouped(records).items():
        right, total = sum(record.right for record in some), len(some)
        low, high = wilson(right, total)
        more = ""
        for name in dict.fromkeys(name for record in some for name in record.measures):
            more += f"   {name} {fmean(r.measures[name] for r in some if name in r.measures):.3f}"
        interval = f"{low:.1%} - {high:.1%}"
        rows.append(f"{label:<24}{right / total:>8.1%}{total:>6}   {interval:<15}{more}".rstrip())
    return "\n".join(rows)


def report(records: Sequence[Record], plan: Plan, bagel: Bagel, model: str) -> dict[str, Any]:
    """Everything needed to repeat the table: settings, versions, per-sample verdicts. Of a picture there is
    its number of frames.
    """
    versions = {"openbagel": openbagel.__version__, "torch": torch.__version__}
    return {
        "model": model,
        "plan": to_json(plan.for_model(bagel)),
        "settings": to_json(bagel.config.settings),
        "versions": {**versions, "python": platform.python_version()},
        "records": [_listed(record) for record in records],
    }


def _listed(record: Record) -> dict[str, Any]:
    def words(content: Content) -> str | int:
        return content if isinstance(content, str) else len(content)

    turns = [replace(turn, content=words(turn.content), truth=words(turn.truth)) for turn in record.turns]
    return to_json(replace(record, turns=tuple(turns)))
