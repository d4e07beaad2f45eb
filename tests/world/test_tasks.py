"""All kinds: the same from the same seed, well formed, and free of what is held out."""

import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from openbagel.world.exercise import Draws, Example, Said, Thinks, Writes
from openbagel.world.motion import MOTION
from openbagel.world.tasks import TASKS, corpus, example
from tests.world import reading
from tests.world.reading import BOTH, WORLD

MINE = [kind for kind in TASKS if kind not in MOTION]


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("kind", MINE)
def test_examples_are_deterministic_and_well_formed(kind: str, world: str) -> None:
    made = reading.examples(world, kind)
    assert [example(WORLD[world], 3, index, kind) for index in range(20)] == made[:20]
    assert len(set(made)) > len(made) / (8 if kind == "tell_text" else 2)
    for one in made:
        assert one.kind == kind
        for step, after in zip(one.steps, one.steps[1:], strict=False):
            if isinstance(step, Thinks):
                assert isinstance(after, Writes | Draws)
            elif not one.decides:
                assert isinstance(after, Thinks) == isinstance(step, Said)
        assert isinstance(one.steps[-1], Writes | Draws)
        assert not any(isinstance(step, Thinks) for step in one.without_thought().steps)
        assert len(one.steps) == 1 or any(isinstance(step, Said) for step in one.steps)
        for scene in reading.scenes(one):
            assert 1 <= len(scene.things) <= WORLD[world].max_things
            assert WORLD[world].allows(scene.things)


def test_steps_of_each_group() -> None:
    shapes = {"draw": [0], "ask": [1, 2], "edit": [1], "think": [0, 1], "tell": [0]}
    for kind in MINE:
        for one in reading.examples("nano", kind):
            assert len(reading.shown(one)) in shapes[kind.partition("_")[0]]
            assert one.decides == (kind == "tell_story")
            turns = {"edit_turns": (2, 3, 4), "ask_turns": (2, 3, 4, 5), "tell_text": (0,)}.get(kind, (1,))
            assert len(reading.said(one)) in turns


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'draw_two'"):
        example(WORLD["nano"], 0, 0, "draw_tow")
    with pytest.raises(ValueError, match="held_out=False"):
        example(replace(WORLD["nano"], held_out=frozenset()), 0, 0, "draw_two", held_out=True)


def held_out_in(one: Example, world: str) -> set[object]:
    """All that is held out of what an example shows and says."""
    its = WORLD[world]
    counted = [Counter(thing.pair for thing in scene.things) for scene in reading.scenes(one)]
    text = ". ".join(reading.texts(one))
    found: set[object] = {pair for count in counted for pair in count if pair in its.held_out}
    found |= {pair for pair in reading.pairs_said(text) if pair in its.held_out}
    found |= {said for said in reading.relations_said(text) if said in its.held_out_relations}
    found |= {item for count in counted for item in count.items() if item in its.held_out_counts}
    return found


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("kind", MINE)
def test_what_is_held_out_never_leaks(kind: str, world: str) -> None:
    for one in reading.examples(world, kind):
        assert not held_out_in(one, world), one


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("kind", MINE)
def test_held_out_examples_are_about_something_held_out(kind: str, world: str) -> None:
    kinds = set()
    for one in reading.examples(world, kind, held_out=True):
        assert (found := held_out_in(one, world)), one
        kinds |= {(type(item[0]), type(item[1])) for item in found if isinstance(item, tuple)}
        scenes, text = reading.scenes(one), " ".join(reading.said(one))
        said = reading.pairs_said(text) & WORLD[world].held_out
        if kind in {"ask_exists", "edit_add", "tell_story"}:
            assert said
        if kind in {"edit_remove", "edit_resize", "edit_move"}:
            before, after = (set(scene.things) for scene in scenes)
            assert {thing.pair for thing in before - after} & WORLD[world].held_out
        if kind in {"edit_recolour", "edit_replace"}:
            before, after = ({thing.pair for thing in scene.things} for scene in scenes)
            assert (after - before) & WORLD[world].held_out and not before & WORLD[world].held_out
        if kind.startswith("draw") and kind not in {"draw_count", "draw_position"}:
            assert said and {thing.pair for thing in scenes[-1].things} & WORLD[world].held_out
    if world == "full" and kind in {"draw_count", "draw_position", "ask_count", "ask_relation"}:
        assert len(kinds) > 1, "both pairs, and counts or relations"


BASELINES = {
    "ask_count": 0.45,
    "ask_colour": 0.35,
    "ask_shape": 0.35,
    "ask_exists": 0.6,
    "ask_place": 0.25,
    "ask_relation": 0.6,
    "ask_compare": 0.6,
    "ask_caption": 0.05,
    "ask_change": 0.3,
    "think_ask": 0.45,
}


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("kind", BASELINES)
def test_answers_cannot_be_guessed_from_the_prompt(kind: str, world: str) -> None:
    answers = defaultdict[str, Counter[str]](Counter)
    made = reading.examples(world, kind, count=300)
    for one in made:
        (prompt,), (answer,) = reading.said(one), reading.written(one)
        form = masked(prompt)
        if kind == "ask_compare" and " or " in prompt:
            assert f" {answer}" in prompt
            answer = "first" if prompt.index(answer) < prompt.index(" or ") else "second"
        answers[form][answer] += 1
    forms = [counts for counts in answers.values() if counts.total() >= 10]
    right = sum(counts.most_common(1)[0][1] for counts in forms)
    share = right / max(sum(counts.total() for counts in forms), 1)
    assert share < BASELINES[kind], f"by the likeliest answer of each of {len(forms)} forms"


def masked(prompt: str) -> str:
    """The form of a question; of a sum only that it is one."""
    return re.sub(r"\b(plus|minus) \w+", "*", reading.masked(prompt))


@pytest.mark.parametrize("world", BOTH)
def test_the_corpus_has_every_word(world: str) -> None:
    words = Counter(word for text in corpus(WORLD[world]) for word in re.findall(r"\w+|[^\w\s]", text))
    for kind in MINE:
        for held_out in (False, True):
            for one in reading.examples(world, kind, held_out=held_out):
                assert words.keys() >= set(re.findall(r"\w+|[^\w\s]", " ".join(reading.texts(one))))
    assert len(words) < 180
    assert min(words.values()) >= 8, words.most_common()[-5:]
