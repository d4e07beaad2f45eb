"""Scenes: deterministic, placed apart, and never a held-out pair where none may be."""

import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from openbagel.config import from_json, to_json
from openbagel.world.scene import (
    WORLDS,
    Colour,
    Ground,
    Look,
    Relation,
    Scene,
    Shape,
    Size,
    Thing,
    World,
    apart,
    full_world,
    hidden,
    inside,
    nano_world,
    turn_between,
)

WORLD = nano_world()
FULL = full_world()


def plain(scene: Scene) -> list[object]:
    return [scene.ground, *((t.shape, t.colour, t.size, t.x, t.y) for t in scene.things)]


def test_the_first_world_stays_as_it_was() -> None:
    """Shipped weights were trained on these scenes."""
    rng = random.Random(0)
    scenes = [WORLD.sample_scene(rng, 1 + i % 3, held_out=i % 4 == 0) for i in range(300)]
    found = json.dumps([*map(plain, scenes), rng.random()])
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == "9425ba2ce7679345"
    assert all(thing.rotation == 0 and thing.scale == 1 for scene in scenes for thing in scene.things)


def test_the_grown_world_is_as_large_as_promised() -> None:
    assert len(FULL.shapes) >= 10 and len(FULL.colours) == 10
    assert (len(FULL.sizes), len(FULL.grounds), FULL.max_things) == (3, 6, 6)
    held_out = FULL.pairs(held_out=True)
    assert len(held_out) == 20
    assert set(Counter(shape for shape, _ in held_out).values()) == {2}
    assert set(Counter(colour for _, colour in held_out).values()) == {2}
    assert WORLDS["full"]() == FULL and hash(FULL) == hash(full_world())


def test_one_relation_and_one_count_of_each_pair_are_held_out() -> None:
    every = [*FULL.pairs(held_out=False), *FULL.pairs(held_out=True)]
    for pair in every:
        assert len(FULL.counts(pair, held_out=True)) == 1 and FULL.counts(pair, held_out=False)[0] == 1
        assert WORLD.counts(pair, held_out=True) == [] and WORLD.counts(pair, held_out=False) == [1, 2, 3]
    for a, b in random.Random(0).sample(list(combinations(every, 2)), 300):
        out, free = FULL.relations(a, b, held_out=True), FULL.relations(a, b, held_out=False)
        assert 1 <= len(out) <= 2 and sorted(out + free) == sorted(Relation)
        assert sorted(FULL.relations(b, a, held_out=True)) == sorted(word.opposite for word in out)
        assert WORLD.relations(a, b, held_out=False) == list(Relation)


@pytest.mark.parametrize("count", range(1, 7))
def test_scenes_of_the_grown_world(count: int) -> None:
    rng, overlapping = random.Random(count), 0
    for _ in range(150):
        scene = FULL.sample_scene(rng, count)
        assert len(scene.things) == count and FULL.allows(scene.things)
        numbers = Counter(thing.pair for thing in scene.things)
        assert FULL.held_out.isdisjoint(numbers) and FULL.held_out_counts.isdisjoint(numbers.items())
        close = [(a, b) for a, b in combinations(scene.things, 2) if not apart(a, b)]
        assert all(a.colour != b.colour and hidden(a, b) <= FULL.overlap for a, b in close)
        assert max(Counter(id(thing) for pair in close for thing in pair).values(), default=0) <= 1
        overlapping += any(hidden(a, b) > 0.1 for a, b in close)
    assert count == 1 or overlapping > 10


def test_objects_that_cannot_be_counted_are_not_allowed() -> None:
    below = Thing(Shape.SQUARE, Colour.RED, Size.LARGE, 0.3, 0.3)
    above = Thing(Shape.SQUARE, Colour.BLUE, Size.LARGE, 0.55, 0.3)
    assert FULL.allows([below, above]) and not WORLD.allows([below, above])
    assert not FULL.allows([below, replace(above, colour=Colour.RED)])
    assert not FULL.allows([below, replace(above, x=0.45)])
    assert not FULL.allows([below, above, replace(above, colour=Colour.LIME, x=0.7)])
    assert not FULL.allows([replace(below, x=0.05)])


@pytest.mark.parametrize("shape", Shape)
def test_turns_of_a_shape_can_be_told_apart(shape: Shape) -> None:
    turns = FULL.turns(shape)
    assert turns[0] == 0 and len(turns) == {0: 1, 1: 4, 2: 2, 4: 1, 5: 2}[shape.symmetry]
    assert all(turn_between(shape, a, b) > math.radians(30) for a, b in combinations(turns, 2))
    assert WORLD.turns(shape) == (0.0,)


def test_six_objects_always_fit_and_without_overlaps_too() -> None:
    rng = random.Random(0)
    for shape in Shape:
        looks = [Look(shape, Colour.RED, *FULL.sizes_for(6))] * 6
        for _ in range(5):
            things = FULL.place(rng, looks).things
            assert all(apart(a, b) for a, b in combinations(things, 2))
    for count in range(1, 7):
        looks = [Look(Shape.DIAMOND, colour, FULL.sizes_for(count)[-1]) for colour in FULL.colours[:count]]
        things = replace(FULL, overlap=0.0).place(rng, looks).things
        assert all(apart(a, b) for a, b in combinations(things, 2))


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
    colours = [paint.rgb for paint in (*Colour, *Ground)]
    for i, a in enumerate(colours):
        for b in colours[:i]:
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 60
    for colour in (paint.rgb for paint in Colour):
        for ground in (paint.rgb for paint in Ground):
            assert sum((x - y) ** 2 for x, y in zip(colour, ground, strict=True)) ** 0.5 > 80
