"""Stories and texts: pictures show what the words have told, and the words are true."""

import re
from collections import Counter

import pytest

from openbagel.world.exercise import Draws, Said, Writes
from openbagel.world.judge import unmet
from openbagel.world.scene import Scene, Thing
from openbagel.world.tell import as_told, follow
from tests.world import reading
from tests.world.reading import BOTH, NUMBERS, RELATION, WORLD


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_stories_keep_to_their_prompts(held_out: bool, world: str) -> None:
    orders = Counter[str]()
    for made in reading.examples(world, "tell_story", held_out):
        assert made.decides
        first, *rest = made.steps
        assert isinstance(first, Said)
        if match := re.fullmatch(r"tell a story about an? (.*) in (\w+) pictures", first.words):
            wanted = "WD" * NUMBERS[match[2]] + "W"
        else:
            match = re.fullmatch(r"show an? (.*) and tell its story in (\w+) pictures", first.words)
            assert match, first.words
            wanted = "D" + "WD" * (NUMBERS[match[2]] - 1) + "W"
        order = "".join("D" if isinstance(step, Draws) else "W" for step in rest)
        assert order == wanted
        assert isinstance(rest[-1], Writes) and rest[-1].words == "the end."
        orders[order] += 1
        opening = reading.written(made)[0].partition(".")[0]
        assert re.fullmatch(rf"there is an? {match[1]} on a \w+ ground", opening)
    assert len(orders) == 6


def retold(text: str, ground: str, seen: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    """What there is after another text."""
    for sentence in text.removesuffix(".").split(". "):
        if match := re.fullmatch(r"there is an? (\w+) (\w+) on a (\w+) ground", sentence):
            assert not seen
            ground, seen = match[3], [(match[2], match[1])]
        elif match := re.fullmatch(r"an? (\w+) (\w+) joins (it|them)", sentence):
            assert (match[3] == "it") == (len(seen) == 1)
            seen = [*seen, (match[2], match[1])]
        elif match := re.fullmatch(r"the ground turns (\w+)", sentence):
            assert ground != match[1]
            ground = match[1]
        elif match := re.fullmatch(r"the (\w+) (\w+) leaves", sentence):
            assert len(seen) > 1
            seen = [pair for pair in seen if pair != (match[2], match[1])]
        else:
            match = re.fullmatch(r"the (\w+) (\w+) turns (\w+)", sentence)
            assert match, sentence
            assert (match[2], match[1]) in seen
            seen = [(match[2], match[3]) if pair == (match[2], match[1]) else pair for pair in seen]
        assert len(set(seen)) == len(seen)
    return ground, seen


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_pictures_show_what_was_told(held_out: bool, world: str) -> None:
    for made in reading.examples(world, "tell_story", held_out):
        ground, seen, before = "", list[tuple[str, str]](), set[Thing]()
        for step in made.steps:
            if isinstance(step, Writes) and step.words != "the end.":
                ground, seen = retold(step.words, ground, seen)
            if isinstance(step, Draws):
                scene = reading.scene_of(step)
                assert unmet(step.spec, scene) == ""
                if not seen:
                    assert step.spec.ground is None and step.spec.total == 1
                    continue
                assert scene.ground == step.spec.ground == ground
                assert Counter(t.pair for t in scene.things) == Counter(seen)
                assert [(phrase.shape, phrase.colour) for phrase in step.spec.objects] == seen
                stays = {(t.shape, t.x, t.y) for t in before if t.pair in seen}
                assert stays <= {(t.shape, t.x, t.y) for t in scene.things}
                before = set(scene.things)


@pytest.mark.parametrize("world", BOTH)
def test_a_story_that_another_tells_is_followed(world: str) -> None:
    for made in reading.examples(world, "tell_story", count=40):
        assert as_told(WORLD[world], made, reading.written(made)) == made


def test_what_is_no_story_is_refused() -> None:
    world = WORLD["nano"]
    one = "there is a red circle on a white ground."
    plot = follow(world, [one, "a blue square joins it. the red circle turns green.", "the end."])
    assert plot.ground == "white" and plot.pairs == (("circle", "green"), ("square", "blue"))
    assert unmet(plot.spec, Scene(plot.ground, ())) != ""
    for texts in (
        [],
        ["the red circle leaves."],
        [one, "the red circle leaves."],
        [one, "a red circle joins it."],
        [one, "a blue square joins them."],
        [one, "the blue square leaves."],
        [one, "the ground turns white."],
        [one, "the end.", "the ground turns black."],
        [one, "the red circle turns round."],
        [one, one],
    ):
        with pytest.raises(ValueError, match="story"):
            follow(world, texts)
    made = next(made for made in reading.examples("nano", "tell_story") if "purple circle" not in str(made))
    with pytest.raises(ValueError, match="does not go on with 'there is a purple circle"):
        as_told(world, made, ["there is a purple circle on a white ground."])
    with pytest.raises(ValueError, match="no words"):
        as_told(world, made, [])


def test_another_story_about_the_same_has_its_own_pictures() -> None:
    made = next(m for m in reading.examples("nano", "tell_story") if "in two pictures" in str(m.steps[0]))
    opening = reading.written(made)[0].partition(".")[0] + "."
    joins = f"a {'green' if 'blue square' in opening else 'blue'} square joins it."
    texts = (
        [opening, joins, "the end."]
        if len(reading.written(made)) == 3
        else [f"{opening} {joins}", "the end."]
    )
    other = as_told(WORLD["nano"], made, texts)
    assert reading.written(other) == texts and reading.said(other) == reading.said(made)
    assert reading.draws(other)[-1].spec == follow(WORLD["nano"], texts).spec
    assert reading.draws(other)[-1].spec.total == 2


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
def test_texts_are_true(held_out: bool, world: str) -> None:
    forms = Counter[str]()
    for made in reading.examples(world, "tell_text", held_out):
        (text,) = reading.written(made)
        assert len(made.steps) == 1
        lies = rf"(.*) is ({RELATION}) (.*)\. (.*) is \2 (.*)\. so (.*) is \2 (.*)\."
        if match := re.fullmatch(lies, text):
            forms["lies"] += 1
            a, _, b, c, d, e, f = match.groups()
            assert (b, a, d) == (c, e, f) and len({a, b, d}) == 3
        elif match := re.fullmatch(r"(.*) on a \w+ ground: (\w+) objects?\.", text):
            forms["described"] += 1
            assert len(reading.parts(match[1])) == NUMBERS[match[2]]
        elif match := re.fullmatch(r"an? (\w+) has (\w+) corners\.", text):
            forms["corners"] += 1
            assert match[1] in WORLD[world].shapes
        else:
            found = re.findall(r"(\w+) (plus|minus) (\w+) is (\w+)\.", text)
            forms["sum"] += 1
            assert len(found) == 2
            for a, sign, b, c in found:
                assert NUMBERS[a] + NUMBERS[b] * (1 if sign == "plus" else -1) == NUMBERS[c]
    assert set(forms) == {"lies", "described"} | (set() if held_out else {"corners", "sum"})
