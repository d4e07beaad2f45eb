"""The world's benchmark: the truth is right, each kind of mistake is wrong, a repeat is exact."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from openbagel.evals import world as evals
from openbagel.evals.page import page
from openbagel.evals.world import Plan, Record, evaluate, grouped, kinds_of, png, report, table, wilson
from openbagel.inference.pipeline import Answer, Bagel
from openbagel.world.exercise import Draws, Films, Step, Writes
from openbagel.world.render import render_picture
from openbagel.world.samples import world_named
from openbagel.world.tasks import TASKS


class Oracle:
    """Stands for a model and its engine: every request is answered with the truth, or as `spoil` makes it."""

    def __init__(self, world: str, spoil: Any = lambda talk, reply: reply) -> None:
        settings = replace(Bagel.load("nano").config.settings, world=world, draws_by_itself=True)
        self.config = replace(Bagel.load("nano").config, settings=settings)
        self.engine, self.spoil = self, spoil
        self.asked: list[evals._Talk] = []

    def drive_all(self, talks: list[Any]) -> list[Any]:
        assert len(talks) <= evals.BATCH
        self.asked += talks
        return [self.spoil(talk, self.truth(talk)) for talk in talks]

    def truth(self, talk: Any) -> Any:
        def made(step: Step) -> Any:
            if isinstance(step, Writes):
                return Answer(step.words)
            if isinstance(step, Films):
                return [render_picture(view, talk.world.side) for view in step.views]
            assert isinstance(step, Draws)
            return render_picture(step.view, talk.world.side)

        return [made(step) for step in talk.steps] if talk.example.decides else made(talk.steps[0])


def run(monkeypatch: pytest.MonkeyPatch, oracle: Oracle, **plan: Any) -> list[Record]:
    monkeypatch.setattr(evals._Talk, "request", lambda talk, bagel, think: talk)
    return list(evaluate(oracle, Plan(**plan)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["nano", "full"])
def test_the_truth_is_right_in_every_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = run(monkeypatch, Oracle(name), samples=3)
    assert {record.kind for record in records} == set(TASKS) - {"tell_text"}
    wrong = [(r.kind, r.index, r.reason) for r in records if not r.right]
    assert wrong == []
    story, film = (next(r for r in records if r.kind == kind) for kind in ("tell_story", "film_move"))
    assert story.measures == {"order": 1.0}
    assert film.measures["lost"] == 0 and film.measures["position error"] < 0.05
    assert [turn.right for turn in film.turns] == [None, None, None, True]
    assert len(film.turns[-1].content) == 10 and film.turns[-1].content == film.turns[-1].truth


def test_mistakes_are_wrong_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(talk: Any, reply: Any) -> Any:
        if isinstance(reply, str):
            return Answer(reply + "!")
        if isinstance(reply, list):
            return [reply[0]] * len(reply)
        return Image.new("RGB", reply.size, (0, 0, 0))

    kinds = ("ask_count", "draw_two", "edit_turns", "film_move", "walk_map")
    for record in run(monkeypatch, Oracle("nano", spoil), samples=2, kinds=kinds):
        assert not record.right and record.reason
        first = next(turn for turn in record.turns if turn.right is not None)
        assert first.reason == record.reason and not first.right


def test_a_story_may_be_another_one_but_must_hold_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_of(how: Any) -> Record:
        return run(monkeypatch, Oracle("nano", lambda talk, r: how(r)), samples=1, kinds=("tell_story",))[0]

    swapped = first_of(lambda reply: [*reply[:-2], reply[-1], reply[-2]])
    assert not swapped.right and swapped.measures == {"order": 0.0}
    assert "text and picture" in swapped.reason
    longer = first_of(lambda reply: [*reply, Answer("more")])
    assert longer.reason == "went on after the end" and longer.measures == {"order": 0.0}
    shorter = first_of(lambda reply: reply[:-1])
    assert shorter.reason == "ended too early"
    nonsense = first_of(lambda reply: [Answer("so.") if isinstance(r, str) else r for r in reply])
    assert nonsense.measures == {"order": 1.0} and "does not go on with 'so.'" in nonsense.reason

    def on_another_ground(reply: list[Any]) -> list[Any]:
        words = str(reply[0])
        old = next(ground for ground in world_named("nano").grounds if f"on a {ground} ground" in words)
        new = next(ground for ground in world_named("nano").grounds if ground != old)
        return [Answer(words.replace(old, new)), *reply[1:]]

    told = first_of(on_another_ground)
    judged = [turn for turn in told.turns if turn.right is not None]
    assert judged[0].right and not judged[1].right and "ground" in judged[1].reason


def test_a_models_own_pictures_go_on_in_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Image.Image] = []

    def spoil(talk: Any, reply: Any) -> Any:
        drawn.append(Image.new("RGB", reply.size, (len(drawn), 0, 0)))
        return drawn[-1]

    oracle = Oracle("nano", spoil)
    run(monkeypatch, oracle, samples=1, kinds=("edit_turns",))
    heard = oracle.asked[0].heard
    assert [part for part in heard if isinstance(part, Image.Image)][1:] == drawn
    assert len(drawn) >= 2


def test_the_shipped_model_is_scored_and_a_repeat_is_exact() -> None:
    bagel = Bagel.load("nano", device="cpu", dtype=torch.float32)
    bagel = bagel.using(replace(bagel.config.settings.edit, num_timesteps=4, max_tokens=32))
    plan = Plan(kinds=("draw_one", "ask_colour", "edit_turns", "film_text", "think_ask"), samples=2)
    assert "tell_story" not in plan.for_model(bagel).kinds
    first, again = list(evaluate(bagel, plan)), list(evaluate(bagel, plan))
    assert first == again and len(first) == 10
    thinking = list(evaluate(bagel, replace(plan, kinds=("draw_one",), think=True)))
    assert all(record.turns[-1].thought for record in thinking)
    assert [record.turns[0] for record in thinking] == [record.turns[0] for record in first[:2]]


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


# reports ----------------------------------------------------------------------------------------------------


def record(kind: str, index: int, right: bool, held_out: bool = False, **measures: float) -> Record:
    picture = png(Image.new("RGB", (8, 8), (200, 0, 0)))
    turns = (
        evals.Turn("a <b> circle & co"),
        evals.Turn((picture,), (picture, picture), right, "" if right else "it is blue", "a plan"),
    )
    return Record(kind, index, held_out, right, "" if right else "it is blue", turns, measures)


def test_the_table_counts_kinds_and_groups_and_held_out_apart() -> None:
    records = [record("draw_one", i, i < 3, order=i / 4) for i in range(4)]
    records += [record("draw_two", 0, False), record("draw_one", 0, True, held_out=True)]
    found = {label: (sum(r.right for r in some), len(some)) for label, some in grouped(records).items()}
    assert found == {
        "draw_one": (3, 4),
        "draw_two": (0, 1),
        "draw (all)": (3, 5),
        "draw_one held out": (1, 1),
        "draw (all) held out": (1, 1),
    }
    lines = table(records).splitlines()
    assert lines[1].startswith("draw_one") and "75.0%" in lines[1] and lines[1].endswith("order 0.375")
    low, high = wilson(3, 4)
    assert abs(low - 0.301) < 0.001 and abs(high - 0.954) < 0.001


def test_the_report_is_json_without_pictures() -> None:
    bagel = Bagel.load("nano")
    told = report([record("draw_one", 0, False)], Plan(samples=1), bagel, "nano")
    told = json.loads(json.dumps(told))
    assert told["plan"]["world"] == "nano" and told["settings"]["size"] == [64, 64]
    assert set(told["versions"]) == {"openbagel", "torch", "python"}
    given, made = told["records"][0]["turns"]
    assert given["content"] == "a <b> circle & co" and given["right"] is None
    assert (made["content"], made["truth"], made["right"]) == (1, 2, False)


def test_the_page_shows_every_sample_and_stands_alone() -> None:
    records = [record("draw_one", 0, True), record("ask_count", 1, False, held_out=True, order=0.5)]
    told = page(records, "a & b")
    assert told.count("<article ") == 2 and told.count("<img ") == 6
    assert "a &lt;b&gt; circle &amp; co" in told and "<title>a &amp; b</title>" in told
    assert "ask_count 1 held out: wrong, order 0.500" in told and "it is blue" in told and "a plan" in told
    assert 'src="data:image/png;base64,' in told and "http" not in told
    for kind in ("draw_one", "ask_count", "draw (all)", "ask (all)"):
        assert f"<option>{kind}</option>" in told
