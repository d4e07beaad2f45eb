"""The world's benchmark: the truth is right, each kind of mistake is wrong, a repeat is exact."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from openbagel import cli
from openbagel.evals import base
from openbagel.evals import world as evals
from openbagel.evals.base import Desk, Made, Turn, Verdict
from openbagel.evals.page import page
from openbagel.evals.world import Plan, evaluate, kinds_of, wilson
from openbagel.inference.engine import Request
from openbagel.inference.pipeline import Answer, Bagel
from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Step, Writes
from openbagel.world.render import render_picture
from openbagel.world.samples import world_named
from openbagel.world.tasks import TASKS


@dataclass(frozen=True)
class Judged:
    """One example with everything that was found out about it."""

    kind: str
    verdict: Verdict
    turns: list[Turn]
    measures: dict[str, float]

    @property
    def right(self) -> bool:
        return bool(self.verdict.scores["right"])


def truth_of(example: Example, side: int) -> list[Any]:
    def made(step: Step) -> Any:
        if isinstance(step, Writes):
            return Answer(step.words)
        if isinstance(step, Films):
            return [render_picture(view, side) for view in step.views]
        assert isinstance(step, Draws)
        return render_picture(step.view, side)

    return [made(step) for step in example.steps if not isinstance(step, Said | Shown)]


def judged(spoil: Any = list, world: str = "nano", **plan: Any) -> list[Judged]:
    """The verdicts on the truth, or on what `spoil` makes of it."""
    kinds = plan.pop("kinds", tuple(kinds_of(world_named(world))))
    asked = Plan(world=world, kinds=kinds, **plan)
    found = []
    for sample in evals._samples(asked):
        place, example = evals._example(asked, sample)
        made = spoil(truth_of(example, place.side))
        verdict = evals._verdict(asked, sample, made)
        turns = evals._turns(asked, sample, made, verdict.reasons)
        measures = {name: value for name, value in verdict.scores.items() if name != "right"}
        found.append(Judged(sample.truth["kind"], verdict, turns, measures))
    return found


@pytest.mark.parametrize("name", ["nano", "full"])
def test_the_truth_is_right_in_every_kind(name: str) -> None:
    records = judged(world=name, samples=3)
    assert {record.kind for record in records} == set(TASKS) - {"tell_text"}
    wrong = [(r.verdict.id, r.verdict.reason) for r in records if not r.right]
    assert wrong == []
    story, film = (next(r for r in records if r.kind == kind) for kind in ("tell_story", "film_move"))
    assert story.measures == {"order": 1.0}
    assert film.measures["lost"] == 0 and film.measures["position error"] < 0.05
    assert [turn.right for turn in film.turns] == [None, None, None, True]
    assert len(film.turns[-1].content) == 10 and film.turns[-1].content == film.turns[-1].truth
    assert film.verdict.scores == {"right": 1.0, **film.measures} and film.verdict.group == "film_move"


def test_mistakes_are_wrong_and_told() -> None:
    def spoiled(value: Any) -> Any:
        if isinstance(value, str):
            return Answer(value + "!")
        if isinstance(value, list):
            return [value[0]] * len(value)
        return Image.new("RGB", value.size, (0, 0, 0))

    kinds = ("ask_count", "draw_two", "edit_turns", "film_move", "walk_map")
    for record in judged(lambda made: list(map(spoiled, made)), samples=2, kinds=kinds):
        assert not record.right and record.verdict.reason
        first = next(turn for turn in record.turns if turn.right is not None)
        assert first.reason == record.verdict.reason and not first.right


def test_no_samples_are_no_plan() -> None:
    with pytest.raises(ValueError, match="samples 0 must be at least 1"):
        Plan(samples=0)


def test_a_story_may_be_another_one_but_must_hold_together() -> None:
    def first_of(how: Any) -> Judged:
        return judged(how, samples=1, kinds=("tell_story",))[0]

    swapped = first_of(lambda made: [*made[:-2], made[-1], made[-2]])
    assert not swapped.right and swapped.measures == {"order": 0.0}
    assert "text and picture" in swapped.verdict.reason
    longer = first_of(lambda made: [*made, Answer("more")])
    assert longer.verdict.reason == "went on after the end" and longer.measures == {"order": 0.0}
    shorter = first_of(lambda made: made[:-1])
    assert shorter.verdict.reason == "ended too early"
    nonsense = first_of(lambda made: [Answer("so.") if isinstance(r, str) else r for r in made])
    assert nonsense.measures == {"order": 1.0} and "does not go on with 'so.'" in nonsense.verdict.reason

    def on_another_ground(made: list[Any]) -> list[Any]:
        words = str(made[0])
        old = next(ground for ground in world_named("nano").grounds if f"on a {ground} ground" in words)
        new = next(ground for ground in world_named("nano").grounds if ground != old)
        return [Answer(words.replace(old, new)), *made[1:]]

    told = first_of(on_another_ground)
    turns = [turn for turn in told.turns if turn.right is not None]
    assert turns[0].right and not turns[1].right and "ground" in turns[1].reason


def test_a_models_own_pictures_go_on_in_the_conversation() -> None:
    class Painter:
        """Draws another colour each time, and remembers what it was told."""

        def __init__(self) -> None:
            self.config, self.heard, self.seeds = Bagel.load("nano").config, list[Any](), list[int]()

        def chat_request(self, heard: Sequence[Any], *, seed: int, **options: Any) -> Request[Any]:
            assert options == {"reply": "image", "size": None, "think": False}
            self.heard, self.seeds = list(heard), [*self.seeds, seed]
            return [Image.new("RGB", (64, 64), (len(self.seeds), 0, 0))]
            yield

    plan, painter = Plan(world="nano", kinds=("edit_turns",), samples=2), Painter()
    sample = list(evals._samples(plan))[1]
    talk: Any = evals._converse(plan, painter, sample, think=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(StopIteration) as stop:
        next(talk)
    made = stop.value.value
    assert len(made) >= 2 and painter.seeds == [1 + n * evals.TURN_SEEDS for n in range(len(made))]
    assert [part for part in painter.heard if isinstance(part, Image.Image)][1:] == made[:-1]


def test_the_shipped_model_is_scored_and_a_repeat_is_exact() -> None:
    bagel = Bagel.load("nano", device="cpu", dtype=torch.float32)
    bagel = bagel.using(replace(bagel.config.settings.edit, num_timesteps=4, max_tokens=32))
    plan = Plan(kinds=("draw_one", "ask_colour", "edit_turns", "film_text", "think_ask"), samples=2)
    assert "tell_story" not in plan.for_model(bagel).kinds
    first, again = list(evaluate(bagel, plan)), list(evaluate(bagel, plan))
    assert first == again and len(first) == 10
    assert [verdict.id for verdict in first[:3]] == ["draw_one-0", "draw_one-1", "ask_colour-0"]


def test_unknown_kinds_and_worlds_are_told() -> None:
    bagel = Bagel.load("nano")
    settings = replace(bagel.config.settings, draws_by_itself=False)
    bagel.config = replace(bagel.config, settings=settings)
    with pytest.raises(ValueError, match=r"kind 'draw_on' is none of .*; did you mean 'draw_one'\?"):
        Plan(kinds=("draw_on",)).for_model(bagel)
    with pytest.raises(ValueError, match=r"'tell_story'.*does not decide"):
        Plan(kinds=("tell_story",)).for_model(bagel)
    with pytest.raises(ValueError, match="world 'ful' is none of nano, full; did you mean 'full'"):
        Plan(world="ful").for_model(bagel)
    assert "tell_text" not in kinds_of(world_named("full"))
    assert Plan(world="full").for_model(bagel).world == "full"


# runs -------------------------------------------------------------------------------------------------------

KINDS = ("draw_one", "ask_colour", "edit_turns", "tell_story", "film_text")


def a_run(folder: Path, **options: Any) -> list[Verdict]:
    bagel = Bagel.load("nano", device="cpu", dtype=torch.float32)
    plan = Plan(kinds=KINDS, samples=2, **options).for_model(bagel)
    short = {"num_timesteps": 4, "max_tokens": 32, "max_think_tokens": 64}
    how = base.Plan(data=Path(), folder=folder, think=plan.think, options=short, batch=10)
    verdicts = list(base.run(evals.suite(plan), how, lambda: bagel, model="nano"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "_verdict", None)  # what was judged once is only told
        told = page(evals.suite(plan), how)
    assert told.count("<article ") == 10 and 'src="data:image/png;base64,' in told and "http" not in told
    (folder / "index.html").write_text(told)
    return verdicts


def test_a_run_leaves_everything_and_is_judged_from_its_files(tmp_path: Path) -> None:
    verdicts = a_run(tmp_path / "first")
    bagel = Bagel.load("nano", device="cpu", dtype=torch.float32)
    settings = bagel.config.settings
    short = {
        verb: replace(getattr(settings, verb), num_timesteps=4, max_tokens=32)
        for verb in ("draw", "edit", "ask")
    }
    same = evaluate(bagel.with_settings(replace(settings, **short)), Plan(kinds=KINDS, samples=2))
    assert [v.reason for v in same] == [v.reason for v in verdicts]  # one batch, other files
    told = json.loads((tmp_path / "first" / "run.json").read_text())
    assert told["plan"]["world"] == "nano" and told["plan"]["seed"] == evals.SEED and told["weights"]
    made = base.read_lines((tmp_path / "first").glob("made-*.jsonl"), Made)
    assert len(made["edit_turns-0"].parts) >= 2 and len(made["film_text-1"].parts) == 1
    desk = Desk(Path(), tmp_path / "first" / "outputs")
    (film,) = desk.values(made["film_text-1"])
    assert len(film) > 3 and all(frame.size == (64, 64) for frame in film)
    kinds = {type(value) for value in desk.values(made["tell_story-0"])}
    assert Answer in kinds
    thinking = a_run(tmp_path / "second", think=True)
    assert len(thinking) == 10
    made = base.read_lines((tmp_path / "second").glob("made-*.jsonl"), Made)
    assert all(made[f"draw_one-{n}"].parts[0].thought for n in range(2))


def test_values_count_kinds_and_groups_and_held_out_apart() -> None:
    def verdict(group: str, right: bool, **measures: float) -> Verdict:
        return Verdict(id="", group=group, scores={"right": float(right), **measures})

    verdicts = [verdict("draw_one", n < 3, order=n / 4) for n in range(4)]
    verdicts += [verdict("draw_two", False), verdict("draw_one held out", True)]
    suite = evals.suite(Plan(world="nano", kinds=("draw_one",)))
    assert suite.summary(verdicts) == {
        "draw_one": 75.0,
        "draw_two": 0.0,
        "draw_one held out": 100.0,
        "draw_one, order": 0.375,
        "draw (all)": 60.0,
        "draw (all, held out)": 100.0,
    }
    assert suite.spread is not None
    spread = suite.spread(verdicts)
    low, high = wilson(3, 4)
    assert abs(low - 0.301) < 0.001 and abs(high - 0.954) < 0.001
    assert wilson(0, 500)[0] == 0 and wilson(500, 500)[1] == pytest.approx(1)
    assert spread["draw_one"] == (100 * low, 100 * high) and spread["draw_two"][1] > 50
    reach = 1.96 * (0.078125**0.5) / 2
    assert spread["draw_one, order"] == pytest.approx((0.375 - reach, 0.375 + reach))


def test_the_verb_keeps_a_run_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verb = "eval world --kinds draw_one ask_colour --samples 2 --settings num_timesteps=3".split()
    assert cli.main(verb) == 0
    first = capsys.readouterr().out
    assert "draw_one" in first and "ask (all)" in first and not list(tmp_path.iterdir())
    assert cli.main([*verb, "-o", "run"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[1:-2] == first.splitlines()[1:-1] and "index.html" in again
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"run.json", "summary.json", "index.html"}
    assert cli.main(["eval", "world", "--kinds", "draw_two", "-o", "run"]) == 2
    assert "holds a run with plan" in capsys.readouterr().err
