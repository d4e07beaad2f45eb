"""Tasks: the same from the same seed, true by an independent computation, and free of held-out pairs."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest

from openbagel.world.judge import unmet
from openbagel.world.language import layout
from openbagel.world.scene import Scene, Thing, apart, inside, nano_world
from openbagel.world.tasks import TASKS, Example, corpus, example

WORLD = nano_world()
COUNT = 400
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "a": 1, "an": 1}
NOUN = re.compile(
    r"(?:(?P<size>small|large) )?"
    r"(?:(?P<colour>red|green|blue|yellow|purple|cyan) )?"
    r"(?P<shape>circle|square|triangle|cross|object)(?:e?s)?"
)


def examples(kind: str, *, held_out: bool = False, think: bool = False) -> Iterator[Example]:
    return (example(WORLD, 3, index, kind, held_out, think) for index in range(COUNT))


def named(words: str, scene: Scene) -> list[Thing]:
    """The objects of a scene that words describe, read without the code that wrote the words."""
    match = NOUN.fullmatch(words)
    assert match, words
    wanted = {k: v for k, v in match.groupdict().items() if v not in (None, "object")}
    return [thing for thing in scene.things if all(getattr(thing, k) == v for k, v in wanted.items())]


def only(words: str, scene: Scene) -> Thing:
    found = named(words, scene)
    assert len(found) == 1, words
    return found[0]


def side_of(a: Thing, relation: str, b: Thing) -> float:
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


def pairs_in_text(text: str) -> set[tuple[str, str]]:
    matches = (match.groupdict() for match in NOUN.finditer(text))
    return {(match["shape"], match["colour"]) for match in matches if match["colour"]}


def scenes_of(made: Example) -> list[Scene]:
    return [*made.pictures, *([made.target] if made.target else [])]


@pytest.mark.parametrize("kind", TASKS)
def test_examples_are_deterministic_and_well_formed(kind: str) -> None:
    first, second = list(examples(kind)), list(examples(kind))
    assert first == second
    assert len({made.prompt + str(made.pictures) + str(made.target) for made in first}) > COUNT / 2
    for made, thinking in zip(first, examples(kind, think=True), strict=True):
        assert made.kind == kind and made.thought is None
        assert replace(thinking, thought=None) == made
        assert thinking.thought == layout(scenes_of(made)[-1])
        assert (made.answer is None) == (made.target is not None) == (made.spec is not None)
        assert len(made.pictures) == (0 if kind.startswith("draw") else 1)
        for scene in scenes_of(made):
            assert 1 <= len(scene.things) <= WORLD.max_things
            assert all(inside(thing) for thing in scene.things)
            assert all(apart(a, b) for i, a in enumerate(scene.things) for b in scene.things[:i])


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="draw_two"):
        example(WORLD, 0, 0, "draw_four")


@pytest.mark.parametrize("kind", TASKS)
def test_held_out_pairs_never_leak(kind: str) -> None:
    for made in examples(kind, think=True):
        shown = {thing.pair for scene in scenes_of(made) for thing in scene.things}
        text = f"{made.prompt} | {made.thought} | {made.answer}"
        assert not (shown | pairs_in_text(text)) & WORLD.held_out, text


@pytest.mark.parametrize("kind", TASKS)
def test_held_out_examples_are_about_a_held_out_pair(kind: str) -> None:
    for made in examples(kind, held_out=True):
        said = pairs_in_text(made.prompt) & WORLD.held_out
        drawn = {thing.pair for thing in made.target.things} & WORLD.held_out if made.target else set()
        if kind.startswith("draw"):
            assert said and drawn
        elif kind in {"ask_exists", "ask_relation", "edit_add", "edit_remove"}:
            assert said
        elif kind == "edit_recolour":
            assert drawn and not {thing.pair for thing in made.pictures[0].things} & WORLD.held_out
        elif kind == "ask_count":
            match = re.fullmatch(r"how many (.*) are there\?", made.prompt)
            assert match and {t.pair for t in named(match[1], made.pictures[0])} & WORLD.held_out
        else:
            assert {thing.pair for thing in made.pictures[0].things} & WORLD.held_out


def true_answer(made: Example) -> str:
    """The answer, from the words of the question and the scene alone."""
    scene = made.pictures[0]
    if match := re.fullmatch(r"how many (.*) are there\?", made.prompt):
        return ["zero", "one", "two", "three"][len(named(match[1], scene))]
    if match := re.fullmatch(r"what (colour|shape) is the (.*)\?", made.prompt):
        return getattr(only(match[2], scene), match[1])
    if match := re.fullmatch(r"is there an? (.*)\?", made.prompt):
        return "yes" if named(match[1], scene) else "no"
    match = re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*)\?", made.prompt)
    assert match, made.prompt
    shift = side_of(only(match[1], scene), match[2], only(match[3], scene))
    assert abs(shift) >= 0.2
    return "yes" if shift > 0 else "no"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind.startswith("ask") and kind != "ask_caption"])
def test_answers_are_true(kind: str, held_out: bool) -> None:
    answers = Counter[str | None]()
    for made in examples(kind, held_out=held_out):
        assert made.answer == true_answer(made)
        answers[made.answer] += 1
    if kind in {"ask_exists", "ask_relation"}:
        assert 0.4 < answers["yes"] / COUNT < 0.6
    if kind == "ask_count" and not held_out:
        assert min(answers[word] for word in ("zero", "one", "two", "three")) > COUNT / 8


def test_a_no_to_existence_is_a_near_miss() -> None:
    for made in examples("ask_exists"):
        words = re.sub(r"is there an? (.*)\?", r"\1", made.prompt).replace("object", "").split()
        seen = [{thing.shape, thing.colour, thing.size} for thing in made.pictures[0].things]
        assert made.answer == "yes" or max(len(set(words) & look) for look in seen) == len(words) - 1


def parts_of(words: str) -> list[str]:
    return re.split(r", | and ", words)


def test_captions_are_true() -> None:
    for made in examples("ask_caption"):
        match = re.fullmatch(r"(.*) on a (\w+) ground", made.answer or "")
        assert match and match[2] == made.pictures[0].ground
        found = []
        for part in parts_of(match[1]):
            number, noun = part.split(" ", 1)
            things = named(noun, made.pictures[0])
            assert len(things) == NUMBERS[number]
            found += things
        assert set(found) == set(made.pictures[0].things)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind.startswith("draw")])
def test_drawings_show_what_their_prompts_say(kind: str, held_out: bool) -> None:
    for made in examples(kind, held_out=held_out):
        assert made.target and made.spec and unmet(made.spec, made.target) == ""
        words, _, ground = made.prompt.partition(" on a ")
        assert ground in ("", f"{made.target.ground} ground")
        assert (made.spec.ground is None) == (not ground)
        if match := re.fullmatch(r"an? (.*) (left of|right of|above|below) an? (.*)", words):
            a, b = only(match[1], made.target), only(match[3], made.target)
            assert side_of(a, match[2], b) >= 0.2
            words = f"a {match[1]} and a {match[3]}"
        counts = {noun: NUMBERS[number] for number, noun in (part.split(" ", 1) for part in parts_of(words))}
        assert {noun: len(named(noun, made.target)) for noun in counts} == counts
        assert sum(counts.values()) == len(made.target.things) == made.spec.total


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind.startswith("edit")])
def test_edits_change_what_they_say_and_nothing_else(kind: str, held_out: bool) -> None:
    for made in examples(kind, held_out=held_out):
        assert made.target and made.spec and unmet(made.spec, made.target) == ""
        assert unmet(made.spec, made.pictures[0]) != ""
        before, after = set(made.pictures[0].things), set(made.target.things)
        gone, new = list(before - after), list(after - before)
        assert made.target.ground == made.pictures[0].ground
        if match := re.fullmatch(r"make the (.*) (\w+)", made.prompt):
            assert gone == [only(match[1], made.pictures[0])]
            assert new == [replace(gone[0], colour=new[0].colour)] and new[0].colour == match[2]
        elif match := re.fullmatch(r"remove the (.*)", made.prompt):
            assert gone == [only(match[1], made.pictures[0])] and not new
        else:
            match = re.fullmatch(r"add an? (.*)", made.prompt)
            assert match and not gone and new == named(match[1], Scene(made.target.ground, tuple(new)))
            assert len(new) == 1


def test_the_corpus_has_every_word() -> None:
    words = Counter(word for text in corpus(WORLD) for word in re.findall(r"\w+|[^\w\s]", text))
    for kind in TASKS:
        for held_out in (False, True):
            for made in islice(examples(kind, held_out=held_out, think=True), 100):
                text = f"{made.prompt} {made.thought} {made.answer or ''}"
                assert words.keys() >= set(re.findall(r"\w+|[^\w\s]", text))
    assert min(words.values()) >= 50 and len(words) < 100
