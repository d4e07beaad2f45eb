"""Scenes: deterministic, placed apart, and never a held-out pair where none may be."""

import json
import random
from dataclasses import replace

import pytest

from openbagel.config import from_json, to_json
from openbagel.world.scene import (
    COLOUR_RGB,
    GROUND_RGB,
    Colour,
    Ground,
    Look,
    Scene,
    Shape,
    Size,
    Thing,
    World,
    apart,
    inside,
    nano_world,
)

WORLD = nano_world()


def test_nano_world_holds_out_a_fifth_and_shows_everything() -> None:
    free, held_out = WORLD.pairs(held_out=False), WORLD.pairs(held_out=True)
    assert len(free) == 19 and len(held_out) == 5
    assert {shape for shape, _ in free} == set(WORLD.shapes)
    assert {colour for _, colour in free} == set(WORLD.colours)


def test_world_refuses_to_hold_out_everything_of_a_kind() -> None:
    pairs = frozenset((Shape.CROSS, colour) for colour in WORLD.colours)
    with pytest.raises(ValueError, match="cross"):
        replace(WORLD, held_out=pairs)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sampled_scenes(count: int, held_out: bool) -> None:
    rng = random.Random(count)
    seen: set[object] = set()
    for _ in range(1000):
        scene = WORLD.sample_scene(rng, count, held_out=held_out)
        assert len(scene.things) == count
        assert any(thing.pair in WORLD.held_out for thing in scene.things) == held_out
        assert all(inside(thing) for thing in scene.things)
        assert all(apart(a, b) for i, a in enumerate(scene.things) for b in scene.things[:i])
        seen |= {scene.ground, *(thing.pair for thing in scene.things), *(t.size for t in scene.things)}
    assert seen >= {*WORLD.grounds, *WORLD.sizes, *WORLD.pairs(held_out=held_out)}


def test_sampling_is_deterministic() -> None:
    first, second = (
        [WORLD.sample_scene(rng, 3) for _ in range(20)] for rng in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert first != [WORLD.sample_scene(random.Random(8), 3) for _ in range(20)]


def test_placing_ends_with_three_of_the_largest_and_refuses_the_impossible() -> None:
    rng = random.Random(0)
    large = Look(Shape.CIRCLE, Colour.RED, Size.LARGE)
    for _ in range(100):
        assert len(WORLD.place(rng, [large] * 3, ground=Ground.WHITE).things) == 3
    with pytest.raises(ValueError, match="9 objects .* do not fit"):
        WORLD.place(rng, [large] * 9)


def test_a_larger_world_has_room_for_six() -> None:
    world = World(tuple(Shape), tuple(Colour), tuple(Size), tuple(Ground), 6, 128)
    small = Look(Shape.STAR, Colour.PINK, Size.SMALL)
    scene = world.place(random.Random(0), [small] * 6)
    assert len(scene.things) == 6 and all(inside(thing) for thing in scene.things)


def test_json_round_trip() -> None:
    scene = Scene(Ground.GREY, (Thing(Shape.RING, Colour.PINK, Size.MEDIUM, 0.25, 0.5, rotation=1.5),))
    assert from_json(Scene, json.loads(json.dumps(to_json(scene))), "scene") == scene
    with pytest.raises(ValueError, match="octagon"):
        from_json(Thing, {**to_json(scene.things[0]), "shape": "octagon"}, "thing")
    with pytest.raises(ValueError, match="weight"):
        from_json(Thing, {**to_json(scene.things[0]), "weight": 1}, "thing")


def test_rotation_turns_the_box() -> None:
    upright = Thing(Shape.DIAMOND, Colour.RED, Size.SMALL, 0.5, 0.5)
    width, height = upright.half_box()
    turned = replace(upright, rotation=3.141592653589793 / 2).half_box()
    assert turned == pytest.approx((height, width))


def test_palette_is_well_separated() -> None:
    colours = [*COLOUR_RGB.values(), *GROUND_RGB.values()]
    for i, a in enumerate(colours):
        for b in colours[:i]:
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 60
    for colour in COLOUR_RGB.values():
        for ground in GROUND_RGB.values():
            assert sum((x - y) ** 2 for x, y in zip(colour, ground, strict=True)) ** 0.5 > 80
