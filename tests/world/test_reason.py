"""Prompts to think about: the thought's steps are true, and lead to the only right end."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from openbagel.world.exercise import Example
from openbagel.world.judge import unmet
from openbagel.world.scene import Colour, Scene, Shape, Thing
from tests.world import reading
from tests.world.reading import BOTH, NUMBERS, RELATION, WORLD, named

CORNERS = {"circle": 0, "ring": 0, "heart": 2, "moon": 2, "triangle": 3, "square": 4, "diamond": 4}
CORNERS |= {"arrow": 7, "star": 10, "cross": 12}
COLOUR = "|".join(Colour)


def value(words: str, scene: Scene | None = None) -> int:
    """Of a sum of numbers, or of nouns that a scene is counted for."""
    first, *rest = re.split(r" (?=plus |minus )", words)
    terms = [("plus", first), *(term.split(" ", 1) for term in rest)]
    total = 0
    for sign, word in terms:
        amount = NUMBERS[word] if word in NUMBERS or scene is None else len(named(word, scene))
        total += amount if sign == "plus" else -amount
    return total


def colour_of(clauses: str) -> str:
    """What "the colour is …" and the facts after it come to."""
    if match := re.search(r"the colour is (.*), but not (.*)", clauses):
        among, out = (set(re.findall(COLOUR, part)) for part in match.groups())
        (left,) = among - out
        return left
    near = re.search(r"that of the (\w+)", clauses)
    assert near, clauses
    (far,) = re.findall(rf"the {near[1]} is like the (\w+)", clauses)
    (colour,) = re.findall(rf"the {far} is ({COLOUR})", clauses)
    return colour


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_drawings_are_what_the_riddles_say(held_out: bool, world: str) -> None:
    hidden = Counter[str]()
    for made in reading.examples(world, "think_draw", held_out):
        (prompt,), (step,) = reading.said(made), reading.draws(made)
        head, _, clauses = prompt.partition(". ")
        count = 1
        if match := re.fullmatch(r"as many (.*) as (.*)", head):
            count, head = value(match[2]), f"a {match[1]}"
            hidden["count"] += 1
        noun = reading.NOUN.fullmatch(re.sub("^an? ", "", head))
        assert noun
        shape, colour = noun["shape"], noun["colour"]
        if corners := re.search(r"the number of corners is ([a-z ]+)", clauses):
            (shape,) = [s for s in WORLD[world].shapes if CORNERS[s] == value(corners[1])]
            hidden["corners"] += 1
        if "the colour is" in clauses:
            assert not colour
            colour = colour_of(clauses)
            hidden["colour"] += 1
        scene = reading.scene_of(step)
        assert [thing.pair for thing in scene.things] == [(shape, colour)] * count
        (phrase,) = step.spec.objects
        assert (phrase.shape, phrase.colour, phrase.count) == (shape, colour, count)
        assert not step.spec.kept and unmet(step.spec, scene) == ""
    assert min(hidden[name] for name in ("count", "colour", "corners")) > 10


def test_one_prompt_never_has_two_colours_for_a_shape() -> None:
    for made in reading.examples("full", "think_draw", count=300):
        facts = re.findall(rf"the (\w+) is ({COLOUR})(?:$|\.)", reading.said(made)[0])
        assert len({shape for shape, _ in facts}) == len(facts)


def subject(words: str, scene: Scene) -> Thing:
    """ "the odd one out", "the object with … corners"."""
    if match := re.fullmatch(r"the object with (.*) corners", words):
        (thing,) = [thing for thing in scene.things if CORNERS[thing.shape] == value(match[1])]
        return thing
    assert words == "the odd one out" and len(scene.things) > 2
    found = set()
    for key in ("shape", "colour", "size"):
        counts = Counter(getattr(thing, key) for thing in scene.things)
        if sorted(counts.values()) == [1, len(scene.things) - 1]:
            found |= {thing for thing in scene.things if counts[getattr(thing, key)] == 1}
    (thing,) = found
    return thing


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_what_the_riddles_say(held_out: bool, world: str) -> None:
    forms = Counter[str]()
    for made in reading.examples(world, "think_ask", held_out):
        (prompt,), (answer,), (scene,) = reading.said(made), reading.written(made), reading.shown(made)
        if match := re.fullmatch(r"how much is (.*)\?", prompt):
            assert NUMBERS[answer] == value(match[1], scene)
            forms["sum"] += 1
            continue
        match = re.fullmatch(r"what (colour|shape) is (.*)\?", prompt)
        assert match
        assert answer == getattr(thing := subject(match[2], scene), match[1])
        assert not held_out or thing.pair in WORLD[world].held_out
        forms[match[2] if "odd" in match[2] else "corners"] += 1
    assert len(forms) == 3 and min(forms.values()) > 8


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_edits_are_what_the_riddles_say(held_out: bool, world: str) -> None:
    forms = Counter[str]()
    for made in reading.examples(world, "think_edit", held_out):
        (prompt,), (scene,), (step,) = reading.said(made), reading.shown(made), reading.draws(made)
        target = reading.scene_of(step)
        assert unmet(step.spec, target) == "" and unmet(step.spec, scene) != ""
        forms[prompt.split()[0]] += 1
        if match := re.fullmatch(r"add as many (.*) as (.*)", prompt):
            assert target.things[: len(scene.things)] == scene.things == step.spec.kept
            new = target.things[len(scene.things) :]
            assert len(new) == value(match[2], scene) > 0
            assert list(new) == named(match[1], replace(target, things=new))
            continue
        if match := re.fullmatch("remove (.*)", prompt):
            wanted: list[Thing] = []
        elif match := re.fullmatch(rf"make (.*) ({COLOUR})", prompt):
            wanted = [replace(subject(match[1], scene), colour=match[2])]
        else:
            match = re.fullmatch(r"recolour (.*?)\. (.*)", prompt)
            assert match
            wanted = [replace(subject(match[1], scene), colour=colour_of(match[2]))]
        rest = {thing for thing in scene.things if thing is not subject(match[1], scene)}
        assert set(target.things) == {*rest, *wanted} == set(step.spec.kept)
    assert set(forms) == {"add", "remove", "make", "recolour"}


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("kind", ["think_draw", "think_edit", "think_ask"])
def test_thoughts_reckon_right(kind: str, world: str) -> None:
    steps = 0
    for made in reading.examples(world, kind):
        text = reading.thought(made)
        for a, sign, b, result in re.findall(r"(\w+) (plus|minus) (\w+) is (\w+)", text):
            assert value(f"{a} {sign} {b}") == NUMBERS[result]
            steps += 1
        for shape, corners in re.findall(rf"an? ({'|'.join(Shape)}) has (\w+) corners", text):
            assert CORNERS[shape] == NUMBERS[corners]
        for colour, fate in re.findall(rf"({COLOUR}) is (out|left)", text):
            listed = re.search(r"the colour is (.*), but not (.*)", reading.said(made)[0])
            assert listed and (colour in listed[2]) == (fate == "out")
        if kind == "think_draw":
            assert text.endswith(f"{reading.scene_of(reading.draws(made)[0]).ground} ground")
    assert steps > 60


@pytest.mark.parametrize("world", BOTH)
def test_thoughts_name_the_answer(world: str) -> None:
    for made in reading.examples(world, "think_ask"):
        assert re.search(rf"\b{reading.written(made)[0]}\b", reading.thought(made).split(". ")[-1])
        assert not re.search(rf" ({RELATION}) ", reading.thought(made))


@pytest.mark.parametrize("world", BOTH)
def test_thoughts_of_edits_end_with_the_plain_instruction(world: str) -> None:
    verbs = Counter[str]()
    for made in reading.examples(world, "think_edit"):
        order = reading.thought(made).removesuffix(".").split(". ")[-1]
        (scene,), (step,) = reading.shown(made), reading.draws(made)
        target = reading.scene_of(step)
        gone, new = set(scene.things) - set(target.things), set(target.things) - set(scene.things)
        match = re.fullmatch(rf"(add|remove|make) (.*?)(?: ({COLOUR}))?", order)
        assert match
        verbs[match[1]] += 1
        if match[1] == "add":
            assert not gone and order == f"add {step.spec.objects[0].indefinite()}"
            continue
        assert set(named(match[2].removeprefix("the "), scene)) == gone and len(gone) == 1
        assert [thing.colour for thing in new] == [match[3]] * (match[1] == "make")
    assert len(verbs) == 3


def test_without_its_thought_the_prompt_is_the_same() -> None:
    made: Example = reading.examples("full", "think_edit")[0]
    assert reading.said(made.without_thought()) == reading.said(made)
    assert reading.thought(made.without_thought()) == ""
