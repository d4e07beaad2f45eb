"""Prompts to draw: their examples show what the words say, and only that."""

import re
from dataclasses import replace

import pytest

from openbagel.world.exercise import Draws, Example
from openbagel.world.judge import unmet
from openbagel.world.language import PLACE_SLACK
from openbagel.world.scene import Scene
from tests.world import reading
from tests.world.reading import BOTH

DRAWN = ("one", "two", "three", "count", "colour", "position", "attribute", "dense")
KINDS = [f"draw_{kind}" for kind in DRAWN]


def read(made: Example) -> tuple[str, str, Draws, Scene]:
    """The prompt without its ground, its ground, what is to be drawn and an example of that."""
    (prompt,), (step,) = reading.said(made), reading.draws(made)
    if match := re.fullmatch(r"on a (\w+) ground: (.*)", prompt):
        return match[2], match[1], step, reading.scene_of(step)
    words, _, ground = prompt.partition(" on a ")
    return words, ground.removesuffix(" ground"), step, reading.scene_of(step)


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_drawings_show_what_their_prompts_say(kind: str, held_out: bool, world: str) -> None:
    for made in reading.examples(world, kind, held_out):
        words, ground, step, scene = read(made)
        assert unmet(step.spec, scene) == ""
        assert (step.spec.ground or "") == ground and ground in ("", scene.ground)
        relation = re.fullmatch(rf"an? (.*) ({reading.RELATION}) an? (.*)", words)
        if relation:
            a, b = reading.only(relation[1], scene), reading.only(relation[3], scene)
            assert reading.distance(a, relation[2], b) >= 0.2
            words = f"a {relation[1]} and a {relation[3]}"
            assert step.spec.relations == ((0, relation[2], 1),)
        assert kind != "draw_position" or relation
        for number, noun in reading.parts(words):
            same = sum(n for n, other in reading.parts(words) if other == noun)
            assert len(reading.named(noun, scene)) >= max(number, same)
        assert sum(number for number, _ in reading.parts(words)) == len(scene.things) == step.spec.total


@pytest.mark.parametrize("world", BOTH)
def test_forms_of_each_kind(world: str) -> None:
    for kind in ("draw_position", "draw_attribute"):
        for made in reading.examples(world, kind):
            a, b = reading.scenes(made)[0].things
            assert a.shape != b.shape and a.colour != b.colour
    counts = {read(made)[2].spec.total for made in reading.examples(world, "draw_count")}
    assert counts == set(range(2, reading.WORLD[world].max_things + 1))
    prompts = [reading.said(made)[0] for made in reading.examples(world, "draw_colour")]
    assert 0 < sum("object" in prompt for prompt in prompts) < len(prompts) / 2


@pytest.mark.parametrize("world", BOTH)
def test_a_dense_prompt_says_everything(world: str) -> None:
    for made in reading.examples(world, "draw_dense"):
        words, ground, step, scene = read(made)
        assert ground
        for _, noun in reading.parts(words):
            assert (match := reading.NOUN.fullmatch(noun)) and all(match.groups())
        for i, thing in enumerate(scene.things):
            for name, far in (("x", thing.x), ("y", thing.y)):
                moved = replace(thing, **{name: far + (0.5 if far < 0.5 else -0.5)})
                things = (*scene.things[:i], moved, *scene.things[i + 1 :])
                twins = [t for t in scene.things if t is not thing and t.pair == thing.pair]
                assert unmet(step.spec, replace(scene, things=things)) or twins


def test_places_are_taken_with_some_slack() -> None:
    (made,) = reading.examples("nano", "draw_dense", count=1)
    step, scene = read(made)[2:]
    thing = scene.things[0]
    edge = 1 / 3 if reading.cell(thing).endswith("left") else 2 / 3
    for far, right in ((PLACE_SLACK - 0.01, True), (PLACE_SLACK + 0.01, False)):
        moved = replace(thing, x=edge + far if edge < 0.5 else edge - far)
        if "left" in reading.cell(thing) or "right" in reading.cell(thing):
            assert (unmet(step.spec, replace(scene, things=(moved, *scene.things[1:]))) == "") == right
