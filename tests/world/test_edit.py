"""Edits: what is said changes, all else stays, and a later turn holds what is known from the earlier ones."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from openbagel.world.judge import unmet
from openbagel.world.scene import Colour, Scene, Size, Thing
from tests.world import reading
from tests.world.reading import BOTH, named, only

SINGLE = [f"edit_{verb}" for verb in "add remove replace recolour resize move ground".split()]


def changed(scene: Scene, order: str, target: Scene) -> Scene:
    """The scene after an order; what the order leaves open is as in the target."""
    if match := re.fullmatch(r"make the ground (\w+)", order):
        return replace(scene, ground=match[1])
    if match := re.fullmatch(r"add an? (.*)", order):
        (new,) = set(named(match[1], target)) - set(scene.things)
        return replace(scene, things=(*scene.things, new))
    if match := re.fullmatch(r"remove the (.*)", order):
        return put(scene, match[1], [])
    if match := re.fullmatch(r"make the (.*) (\w+)", order):
        key = "colour" if match[2] in set(Colour) else "size"
        assert match[2] in {*Colour, *Size}
        return put(scene, match[1], [replace(only(match[1], scene), **{key: match[2]})])
    if match := re.fullmatch(rf"move the (.*) to the ({reading.PLACE})", order):
        old = only(match[1], scene)
        here = [t for t in target.things if (t.pair, t.size) == (old.pair, old.size)]
        (new,) = (t for t in here if reading.cell(t) == match[2] and t.rotation == old.rotation)
        assert max(abs(new.x - old.x), abs(new.y - old.y)) > 0.08
        return put(scene, match[1], [new])
    match = re.fullmatch(r"replace the (.*) with an? (.*)", order)
    assert match, order
    old = only(match[1], scene)
    (new,) = (t for t in named(match[2], target) if (t.x, t.y, t.size) == (old.x, old.y, old.size))
    assert new.shape != old.shape
    return put(scene, match[1], [new])


def put(scene: Scene, noun: str, new: Sequence[Thing]) -> Scene:
    """With other objects in the place of the only one of that name."""
    return replace(scene, things=(*(t for t in scene.things if t != only(noun, scene)), *new))


@pytest.mark.parametrize("world", BOTH)
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", [*SINGLE, "edit_combined", "edit_turns"])
def test_edits_change_what_they_say_and_nothing_else(kind: str, held_out: bool, world: str) -> None:
    for made in reading.examples(world, kind, held_out):
        (before,) = reading.shown(made)
        turns = list(zip(reading.said(made), reading.draws(made), strict=True))
        assert (len(turns) > 1) == (kind == "edit_turns")
        for said, step in turns:
            target = reading.scene_of(step)
            orders = said.split(" and ")
            assert len(orders) == (2 if kind == "edit_combined" else 1)
            after = before
            for order in orders:
                after = changed(after, order, target)
            assert after.ground == target.ground and set(after.things) == set(target.things)
            assert step.spec.ground == target.ground
            assert unmet(step.spec, target) == ""
            assert unmet(step.spec, before) != ""
            before = target


@pytest.mark.parametrize("world", BOTH)
def test_objects_that_nothing_was_said_about_are_kept_in_every_turn(world: str) -> None:
    for made in reading.examples(world, "edit_turns"):
        (first,) = reading.shown(made)
        touched: set[Thing] = set()
        for step in reading.draws(made):
            target = reading.scene_of(step)
            touched |= set(first.things) - set(target.things)
            assert {thing for thing in first.things if thing not in touched} <= set(step.spec.kept)
            assert step.spec.total == len(target.things)
            shaken = [replace(t, x=t.x + (0.1 if t.x < 0.5 else -0.1)) for t in step.spec.kept]
            for kept, moved in zip(step.spec.kept, shaken, strict=True):
                things = tuple(moved if thing == kept else thing for thing in target.things)
                assert unmet(step.spec, replace(target, things=things))


def test_a_combined_edit_is_about_two_objects() -> None:
    for made in reading.examples("full", "edit_combined"):
        names = re.findall(f"the ({reading.NAME})", reading.said(made)[0])
        assert len(set(names)) == len(names) <= 2


@pytest.mark.parametrize("world", BOTH)
def test_all_verbs_occur_in_turns(world: str) -> None:
    said = [order for made in reading.examples(world, "edit_turns") for order in reading.said(made)]
    for verb in ("add a", "remove", "replace", "move", "make the ground"):
        assert sum(order.startswith(verb) for order in said) > len(said) / 30


@pytest.mark.parametrize("world", BOTH)
def test_an_object_is_called_by_one_word_at_times(world: str) -> None:
    said = [words for made in reading.examples(world, "edit_resize") for words in reading.said(made)]
    by_colour = sum(bool(re.fullmatch(r"make the \w+ object \w+", words)) for words in said)
    by_shape = sum(bool(re.fullmatch(r"make the \w+ \w+", words)) for words in said)
    assert min(by_colour, by_shape) > len(said) / 10
    assert by_colour + by_shape < 2 * len(said) / 3
