"""The toy world's own benchmark: unseen exercises, exact verdicts, held-out ones apart.

An exercise is a conversation. What is given is heard; what the model writes is compared word for word, what
it draws is judged, what it films is measured; and its own texts and pictures go on in the conversation.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any

from PIL import Image

from openbagel.checks import check_choice, check_least
from openbagel.config import to_json
from openbagel.evals.base import Sample, Suite, Turn, Verdict
from openbagel.inference.engine import Request
from openbagel.inference.pipeline import Answer, Bagel
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

    def __post_init__(self) -> None:
        check_least(self, samples=1)

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


# conversations ---------------------------------------------------------------------------------------------


def suite(plan: Plan) -> Suite:
    """The benchmark of a plan that `Plan.for_model` has completed."""
    return Suite(
        name="world",
        about="the toy world's exercises, judged exactly",
        needs="nothing",
        samples=lambda data: _samples(plan),
        converse=partial(_converse, plan),
        score=lambda sample, made, desk: _verdict(plan, sample, desk.values(made)),
        summary=lambda verdicts: {name: fmean(some) for name, some in _values(verdicts).items()},
        spread=lambda verdicts: {name: _interval(some) for name, some in _values(verdicts).items()},
        turns=lambda sample, made, verdict, desk: _turns(plan, sample, desk.values(made), verdict.reasons),
        plan=to_json(plan),
    )


def evaluate(bagel: Bagel, plan: Plan) -> Iterator[Verdict]:
    """Verdicts in order of kind and index, nothing of which is kept; the same plan on the same model gives
    the same ones.
    """
    plan = plan.for_model(bagel)
    samples = list(_samples(plan))
    for first in range(0, len(samples), BATCH):
        some = samples[first : first + BATCH]
        talks = [_converse(plan, bagel, sample, plan.think) for sample in some]
        for sample, made in zip(some, bagel.engine.drive_all(talks), strict=True):
            yield _verdict(plan, sample, made)


def _samples(plan: Plan) -> Iterator[Sample]:
    for kind in plan.kinds:
        for number in range(plan.samples):
            truth = {"kind": kind, "number": number}
            group = f"{kind} held out" if plan.held_out else kind
            yield Sample(id=f"{kind}-{number}", group=group, seed=number, truth=truth)


def _example(plan: Plan, sample: Sample) -> tuple[World, Example]:
    assert plan.world is not None
    world = world_named(plan.world)
    kind, number = sample.truth["kind"], sample.truth["number"]
    return world, example(world, plan.seed, number, kind, plan.held_out).without_thought()


def _converse(plan: Plan, bagel: Bagel, sample: Sample, think: bool) -> Request[list[Any]]:
    """All that the model makes of one exercise, in order."""
    world, exercise = _example(plan, sample)
    heard, made = list[Any](), list[Any]()
    for step in exercise.steps:
        if isinstance(step, Said | Shown):
            heard.append(as_heard(step, world.side))
            continue
        seed = sample.seed + TURN_SEEDS * len(made)
        if isinstance(step, Films):
            made.append((yield from bagel.film_request(heard, num_frames=len(step.views), seed=seed)))
            continue
        kind = "auto" if exercise.decides else "text" if isinstance(step, Writes) else "image"
        made += yield from bagel.chat_request(heard, reply=kind, size=None, seed=seed, think=think)
        if exercise.decides:
            break
        heard.append(made[-1])
    return made


def _verdict(plan: Plan, sample: Sample, made: Sequence[Any]) -> Verdict:
    """Right if everything that was made is."""
    world, exercise = _example(plan, sample)
    measures = dict[str, float]()
    if exercise.decides:
        kinds = [isinstance(step, Writes) for step in exercise.steps if isinstance(step, Writes | Draws)]
        measures["order"] = float([isinstance(value, str) for value in made] == kinds)
    goes_on = any(isinstance(step, Shown) for step in exercise.steps)
    reasons = list[str]()
    for step, value, problem in _wanted(world, exercise, made):
        if problem or step is None:
            reasons.append(problem)
        elif isinstance(step, Films):
            reasons.append(_clip(world, step.views, value, measures, goes_on))
        else:
            reasons.append(_wrong(world, step, value))
    reason = next(filter(None, reasons), "")
    scores = {"right": float(not reason), **measures}
    return Verdict(id=sample.id, group=sample.group, scores=scores, reason=reason, reasons=tuple(reasons))


def _turns(plan: Plan, sample: Sample, made: Sequence[Any], reasons: Sequence[str]) -> list[Turn]:
    """The conversation as it went, everything that was made beside one right answer."""
    world, exercise = _example(plan, sample)
    wanted = zip(_wanted(world, exercise, made), reasons, strict=True)
    parts = iter([_turn(world, step, value, reason) for (step, value, _), reason in wanted])
    turns = list[Turn]()
    for step in exercise.steps:
        heard = Turn(as_heard(step, world.side)) if isinstance(step, Said | Shown) else next(parts, None)
        turns += [heard] if heard else []
    return [*turns, *parts]


def _wanted(world: World, exercise: Example, made: Sequence[Any]) -> Iterator[tuple[Step | None, Any, str]]:
    """What was to be made, what was, and what is wrong before one looks at it. In a story the model's own
    words say what is right to show.
    """
    wanted = [step for step in exercise.steps if not isinstance(step, Said | Shown)]
    if not exercise.decides:
        yield from ((step, value, "") for step, value in zip(wanted, made, strict=True))
        return
    texts = [str(value) for value in made if isinstance(value, str)]
    for place, (step, value) in enumerate(itertools.zip_longest(wanted, made)):
        told, problem = wanted[: place + 1], ""
        if step is None:
            problem = "went on after the end"
        elif value is None:
            problem = "ended too early"
        elif isinstance(value, str) != isinstance(step, Writes):
            problem = "the wrong one of text and picture"
        elif any(isinstance(one, Writes) for one in told):
            try:
                step = as_told(world, replace(exercise, steps=tuple(told)), texts).steps[-1]
            except ValueError as error:
                problem = str(error)
        yield step, value, problem


def _wrong(world: World, step: Step, made: Any) -> str:
    """What is wrong with a text or a picture."""
    if isinstance(step, Writes):
        return "" if made.strip() == step.words else f"expected {step.words!r}"
    assert isinstance(step, Draws)
    return judge(step.spec, made, world).reason


def _clip(
    world: World, views: Sequence[View], frames: list[Image.Image], measures: dict[str, float], goes_on: bool
) -> str:
    """Measures a clip; what is wrong with it. Where no frame was given it may begin anywhere."""
    truth = [view for view in views if isinstance(view, Scene)]
    found = [locate(frame, scene.things, world) for frame, scene in zip(frames, truth, strict=True)]
    score = score_clip(truth, found)
    measures["lost"] = float(score.lost)
    if goes_on:
        measures["position error"] = score.error
    if score.lost or not (score.error <= CLOSE if goes_on else score.steered):
        return "an object is lost" if score.lost else f"the way is wrong (error {score.error:.2f})"
    turned = turned_frame(truth) if goes_on else None
    return judge(turned[1], frames[turned[0]], world).reason if turned else ""


def _turn(world: World, step: Step | None, made: Any, reason: str) -> Turn:
    """What was made beside one right answer."""
    truth: Any = step.words if isinstance(step, Writes) else ""
    if isinstance(step, Draws | Films):
        truth = [render_picture(view, world.side) for view in views([step])]
    some = made[0] if isinstance(made, list) else made
    thought = some.thought if isinstance(some, Answer) else some.info.get("thought") if some else None
    return Turn("" if made is None else made, truth, not reason, reason, thought)


# scores -----------------------------------------------------------------------------------------------------


def _values(verdicts: Sequence[Verdict]) -> dict[str, list[float]]:
    """Percent right of each kind and each group of kinds (draw, ask, edit …), and what else was measured."""
    found: dict[str, list[float]] = {}
    for label in (str, group_of):
        for verdict in verdicts:
            found.setdefault(label(verdict.group), []).append(100 * verdict.scores["right"])
    for verdict in verdicts:
        for name in verdict.scores.keys() - {"right"}:
            found.setdefault(f"{verdict.group}, {name}", []).append(verdict.scores[name])
    return dict(sorted(found.items(), key=lambda item: "(all)" in item[0]))


def group_of(kind: str) -> str:
    start, _, rest = kind.partition("_")
    return f"{start} (all{', held out' * rest.endswith('held out')})"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 %: Wilson's of percentages, else from the deviation of the mean."""
    if set(values) <= {0.0, 100.0}:
        low, high = wilson(round(sum(values) / 100), len(values))
        return 100 * low, 100 * high
    reach = 1.96 * pstdev(values) / len(values) ** 0.5
    return fmean(values) - reach, fmean(values) + reach


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, square = right / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    reach = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)
