"""Questions: the answers are true by the words of the question and the scenes alone."""

import re
from collections import Counter

import pytest

from openbagel.world.exercise import Example
from openbagel.world.scene import Scene, Size
from tests.world import reading
from tests.world.reading import BOTH, NUMBERS, RELATION, named, only

KINDS = [f"ask_{kind}" for kind in ("count", "colour", "shape", "exists", "place", "relation", "compare")]
WORDS = list(NUMBERS)
SIZES = list(Size)


def true_answers(made: Example) -> list[str]:
    (scene,) = reading.shown(made)
    return [true_answer(prompt, scene) for prompt in reading.said(made)]


def true_answer(prompt: str, scene: Scene) -> str:
    if match := re.fullmatch(r"how many (.*) are there\?", prompt):
        return WORDS[len(named(match[1], scene))]
    if match := re.fullmatch(r"what (colour|shape) is the (.*)\?", prompt):
        return getattr(only(match[2], scene), match[1])
    if match := re.fullmatch(r"is there an? (.*)\?", prompt):
        return "yes" if named(match[1], scene) else "no"
    if match := re.fullmatch(r"where is the (.*)\?", prompt):
        thing = only(match[1], scene)
        assert min(abs(at - edge) for at in (thing.x, thing.y) for edge in (1 / 3, 2 / 3)) >= 0.079
        return f"at the {reading.cell(thing)}"
    if match := re.fullmatch(r"are there more (.*) than (.*)\?", prompt):
        return "yes" if len(named(match[1], scene)) > len(named(match[2], scene)) else "no"
    if match := re.fullmatch(r"which is (larger|smaller), the (.*) or the (.*)\?", prompt):
        first, second = (SIZES.index(only(noun, scene).size) for noun in match.groups()[1:])
        assert first != second
        return f"the {match[2] if (first > second) == (match[1] == 'larger') else match[3]}"
    match = re.fullmatch(rf"is the (.*) ({RELATION}) the (.*)\?", prompt)
    assert match, prompt
    shift = reading.distance(only(match[1], scene), match[2], only(match[3], scene))
    assert abs(shift) >= 0.2
    return "yes" if shift > 0 else "no"


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind: str, held_out: bool, world: str) -> None:
    answers = Counter[str]()
    for made in reading.examples(world, kind, held_out, 250):
        assert reading.written(made) == true_answers(made)
        answers[reading.written(made)[0]] += 1
    if kind in {"ask_exists", "ask_relation"}:
        assert 0.38 < answers["yes"] / 250 < 0.62
    if kind == "ask_count" and not held_out:
        assert min(answers[word] for word in WORDS[: reading.WORLD[world].max_things + 1]) > 250 / 16


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_questions_of_turns_differ_and_their_answers_are_true(held_out: bool, world: str) -> None:
    forms = Counter[str]()
    for made in reading.examples(world, "ask_turns", held_out, 250):
        questions = reading.said(made)
        assert 2 <= len(set(questions)) == len(questions) <= 5
        assert reading.written(made) == true_answers(made)
        forms.update(" ".join(question.split()[:2]) for question in questions)
        if held_out:
            shown = {thing.pair for thing in reading.shown(made)[0].things}
            words = {word for name in reading.NOUN.finditer(questions[0]) for word in name.groups()}
            assert any(words & set(pair) for pair in shown & reading.WORLD[world].held_out)
    assert len(forms) == 6 and min(forms.values()) > forms.total() / 20


@pytest.mark.parametrize("world", BOTH)
def test_a_no_to_existence_is_a_near_miss(world: str) -> None:
    for made in reading.examples(world, "ask_exists", count=250):
        words = re.sub(r"is there an? (.*)\?", r"\1", reading.said(made)[0]).replace("object", "").split()
        seen = [{thing.shape, thing.colour, thing.size} for thing in reading.shown(made)[0].things]
        near = max(len(set(words) & look) for look in seen)
        assert reading.written(made) == ["yes"] or near == len(words) - 1


@pytest.mark.parametrize("world", BOTH)
def test_captions_are_true(world: str) -> None:
    for made in reading.examples(world, "ask_caption"):
        (answer,), (scene,) = reading.written(made), reading.shown(made)
        match = re.fullmatch(r"(.*) on a (\w+) ground", answer)
        assert match and match[2] == scene.ground
        found = []
        for number, noun in reading.parts(match[1]):
            things = named(noun, scene)
            assert len(things) == number
            found += things
        assert set(found) == set(scene.things)


def news(made: Example) -> str:
    """What changed from the first picture to the second, by their difference."""
    a, b = reading.shown(made)
    gone, new = set(a.things) - set(b.things), set(b.things) - set(a.things)
    if a.ground != b.ground:
        assert not gone and not new
        return f"the ground became {b.ground}"
    if not gone and not new:
        return "nothing"
    if not gone:
        (one,) = new
        return re.sub("^a (?=[aeiou])", "an ", f"a {one.colour} {one.shape} is new")
    (one,) = gone
    name = f"the {one.colour} {one.shape}"
    assert only(name.removeprefix("the "), a) == one
    if not new:
        return f"{name} is gone"
    (other,) = new
    changes = [key for key in ("shape", "colour", "size") if getattr(one, key) != getattr(other, key)]
    if not changes:
        return f"{name} moved to the {reading.cell(other)}"
    assert (one.x, one.y) == (other.x, other.y)
    if "shape" in changes:
        return re.sub("a (?=[aeiou])", "an ", f"{name} became a {other.colour} {other.shape}")
    (changed,) = changes
    return f"{name} became {getattr(other, changed)}"


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_changes_are_told_as_they_are(held_out: bool, world: str) -> None:
    forms = Counter[str]()
    for made in reading.examples(world, "ask_change", held_out):
        assert reading.written(made) == [news(made)]
        forms[re.sub(r"\b(top|bottom) ", "", reading.masked(news(made)))] += 1
    assert len(forms) >= 8
