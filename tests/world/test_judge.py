"""The judge: right on what is rendered or slightly softened, and strict with every kind of damage."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.judge import (
    DAMAGES,
    Redraw,
    add_noise,
    autoencoded,
    blur,
    damaged,
    extra_object,
    free_world,
    missing_object,
    sample_scenes,
    share_accepted,
    soften,
    strict_spec,
    wrong_colour,
    wrong_ground,
)
from openbagel.world.exercise import Draws, Shown, Spec
from openbagel.world.judge import judge, locate, parse, unmet
from openbagel.world.language import Phrase
from openbagel.world.render import render, render_picture
from openbagel.world.scene import (
    WORLDS,
    Colour,
    Ground,
    Relation,
    Scene,
    Shape,
    Size,
    Solid,
    Thing,
    World,
    inside,
    nano_world,
)
from openbagel.world.tasks import TASKS, example

WORLD = free_world()
FULL = free_world("full")
CIRCLE = Thing(Shape.CIRCLE, Colour.RED, Size.LARGE, 0.3, 0.3)
SQUARE = Thing(Shape.SQUARE, Colour.BLUE, Size.SMALL, 0.7, 0.6)
SCENE = Scene(Ground.GREY, (CIRCLE, SQUARE))


def test_reads_back_what_was_rendered() -> None:
    scenes = sample_scenes(WORLD, 500, seed=1)
    for scene, picture in zip(scenes, render(scenes, WORLD.side), strict=True):
        parsed = parse(picture, WORLD)
        assert parsed.scene and parsed.scene.ground == scene.ground
        rounded = [replace(thing, x=0, y=0) for thing in parsed.scene.things]
        truth = sorted(scene.things, key=lambda thing: (thing.x, thing.y))
        assert sorted(map(repr, rounded)) == sorted(repr(replace(thing, x=0, y=0)) for thing in truth)
        for thing in truth:
            assert min(abs(thing.x - seen.x) + abs(thing.y - seen.y) for seen in parsed.scene.things) < 0.01


def test_accepts_softened_pictures() -> None:
    scenes = sample_scenes(WORLD, 100, seed=2)
    assert share_accepted(WORLD, scenes, lambda some: soften(render(some, WORLD.side))) >= 0.99


def test_verdicts_of_the_first_world_stay_as_they_were() -> None:
    scenes = sample_scenes(WORLD, 30, seed=6)
    pictures = [render(scenes, 64), soften(render(scenes, 64))]
    for kind in DAMAGES:
        for redraw in (lambda some: some, soften):
            pictures.append(damaged(kind, scenes[:10], world=WORLD, rng=random.Random(kind), redraw=redraw))
    verdicts = []
    for parsed in (parse(picture, nano_world()) for picture in torch.cat(pictures)):
        things = parsed.scene.things if parsed.scene else ()
        looks = [(thing.shape, thing.colour, thing.size) for thing in things]
        verdicts.append([parsed.reason.split(" (")[0], parsed.scene and [parsed.scene.ground, *looks]])
    assert hashlib.sha256(json.dumps(verdicts).encode()).hexdigest()[:16] == "d08ed897a98db7a8"


@pytest.mark.parametrize("redraw", [lambda pictures: pictures, soften], ids=["rendered", "softened"])
def test_reads_the_grown_world_back(redraw: Redraw) -> None:
    scenes = sample_scenes(FULL, 90, seed=4)
    for scene, picture in zip(scenes, redraw(render(scenes, 64)), strict=True):
        parsed = parse(picture, FULL)
        assert parsed.scene is not None, parsed.reason
        assert unmet(strict_spec(scene), parsed.scene) == ""
        for thing in scene.things:
            near = [seen for seen in parsed.scene.things if seen.pair == thing.pair]
            assert min(max(abs(thing.x - seen.x), abs(thing.y - seen.y)) for seen in near) < 0.02
            assert all(seen.rotation in FULL.turns(seen.shape) for seen in near)


@pytest.mark.parametrize("kind", DAMAGES)
def test_refuses_damaged_pictures_of_the_grown_world(kind: str) -> None:
    scenes = sample_scenes(FULL, 24, seed=5)
    rng = random.Random(kind)
    assert share_accepted(FULL, scenes, lambda s: damaged(kind, s, world=FULL, rng=rng, redraw=soften)) == 0


def test_refuses_objects_turned_otherwise() -> None:
    for shape in (Shape.TRIANGLE, Shape.STAR, Shape.HEART, Shape.DIAMOND, Shape.MOON, Shape.ARROW):
        thing = Thing(shape, Colour.LIME, Size.SMALL, 0.4, 0.5)
        pictures = soften(
            render([Scene(Ground.TEAL, (replace(thing, rotation=r),)) for r in FULL.turns(shape)], 64)
        )
        spec = strict_spec(Scene(Ground.TEAL, (thing,)))
        assert [judge(spec, picture, FULL).ok for picture in pictures] == [True] + [False] * (
            len(pictures) - 1
        )


def test_reads_what_another_object_hides_in_part() -> None:
    above = Thing(Shape.HEART, Colour.BLUE, Size.SMALL, 0.45, 0.5)
    for shape in Shape:
        for turn in FULL.turns(shape):
            below = Thing(shape, Colour.BROWN, Size.LARGE, 0.65, 0.45, turn)
            scene = Scene(Ground.BEIGE, (below, above))
            picture = soften(render([scene], 64))[0]
            assert judge(strict_spec(scene), picture, FULL).ok, scene
            wrong = replace(scene, things=(replace(below, size=Size.MEDIUM), above))
            assert not judge(strict_spec(wrong), picture, FULL).ok


def test_accepts_what_the_shipped_autoencoder_makes_of_pictures() -> None:
    scenes = sample_scenes(nano_world(), 100, seed=3)
    redraw = autoencoded("nano")
    assert share_accepted(WORLD, scenes, lambda some: redraw(render(some, WORLD.side))) >= 0.99


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("redraw", [lambda pictures: pictures, soften], ids=["rendered", "softened"])
def test_refuses_damaged_pictures(kind: str, redraw: Redraw) -> None:
    scenes = sample_scenes(WORLD, 30, seed=3)
    rng = random.Random(kind)
    assert share_accepted(WORLD, scenes, lambda s: damaged(kind, s, world=WORLD, rng=rng, redraw=redraw)) == 0


@pytest.mark.parametrize("side", [64, 96, 128])
def test_reads_every_shape_colour_ground_and_size(side: int) -> None:
    world = World(tuple(Shape), tuple(Colour), tuple(Size), tuple(Ground), 4, side)
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, 1 + i % 4) for i in range(40)]
    assert share_accepted(world, scenes, lambda some: render(some, side)) == 1


def test_reads_pil_pictures_and_the_empty_one() -> None:
    assert parse(render_picture(SCENE, 64), WORLD).scene is not None
    assert parse(torch.ones(3, 64, 64), WORLD).scene == Scene(Ground.WHITE, ())


def test_reads_objects_that_touch() -> None:
    beside = Thing(Shape.SQUARE, Colour.GREEN, Size.SMALL, 0.3 + 2 * 0.88 * 0.12, 0.5)
    scene = Scene(Ground.BLACK, (Thing(Shape.SQUARE, Colour.RED, Size.SMALL, 0.3, 0.5), beside))
    assert judge(strict_spec(scene), render([scene], 64)[0], WORLD).ok


def test_refuses_what_is_no_picture_of_the_world() -> None:
    assert "not finite" in parse(torch.full((3, 64, 64), torch.nan), WORLD).reason
    assert "ground" in parse(torch.full((3, 64, 64), 0.25), WORLD).reason
    assert parse(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), WORLD).scene is None
    star = Scene(Ground.WHITE, (replace(CIRCLE, shape=Shape.STAR),))
    assert parse(render([star], 64)[0], WORLD).scene is None
    orange = Scene(Ground.WHITE, (replace(CIRCLE, colour=Colour.ORANGE),))
    assert parse(render([orange], 64)[0], WORLD).scene is None
    with pytest.raises(ValueError, match="square pictures"):
        parse(torch.zeros(3, 64, 32), WORLD)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", TASKS)
def test_targets_are_right_and_what_was_shown_is_not(kind: str, world: str) -> None:
    there = WORLDS[world]()
    for index in range(4):
        steps = example(there, 5, index, kind).steps
        drawn = [step for step in steps if isinstance(step, Draws)]
        for step in drawn:
            assert judge(step.spec, render([step.view], 64)[0], there).ok, step
        shown = [step.view for step in steps if isinstance(step, Shown)]
        for view in shown if drawn else ():
            assert not judge(drawn[0].spec, render([view], 64)[0], there).ok


Change = Callable[[Scene, World, random.Random], Scene]


# exact views -----------------------------------------------------------------------------------------------


def exact_specs() -> list[Spec]:
    """A map seen from above and from near, objects cut by the border, and a solid at several turns."""
    scenes = sample_scenes(FULL, 24, seed=8)
    views = [
        Scene(s.ground, tuple(replace(t, x=2 * t.x - 0.5, y=2 * t.y - 0.3) for t in s.things)) for s in scenes
    ]
    small = [replace(s, things=tuple(replace(t, scale=0.5) for t in s.things)) for s in scenes[:8]]
    sides = (Colour.RED, Colour.LIME, Colour.BLUE, Colour.YELLOW)
    solids = [Solid(Ground.GREY, sides, turn) for turn in (0.0, 0.5, 1.0, 2.5, 4.0)]
    turned = [
        Spec(view=solid, wrong=tuple(replace(solid, turn=solid.turn + step) for step in (-0.5, 0.5)))
        for solid in solids
    ]
    return [*(Spec(view=view, wrong=(Scene(view.ground, ()),)) for view in [*scenes, *small]), *turned] + [
        Spec(view=view) for view in views
    ]


SPECS = exact_specs()
VIEWS = [spec.view for spec in SPECS if spec.view]


def share_exact(pictures: torch.Tensor, specs: list[Spec] = SPECS) -> float:
    return sum(judge(s, picture, FULL).ok for s, picture in zip(specs, pictures, strict=True)) / len(specs)


def test_exact_views_may_be_soft_and_a_little_shifted() -> None:
    pictures = render(VIEWS, 64)
    assert share_exact(pictures) == 1 and share_exact(soften(pictures)) >= 0.98
    assert share_exact(pictures.roll((2, -1), (2, 3))) >= 0.98
    assert share_exact(pictures.roll((7, 0), (2, 3))) < 0.1


def test_exact_views_are_not_blurred_noisy_or_other_ones() -> None:
    pictures = render(VIEWS, 64)
    empty = sum(picture[:, 2:-2, 2:-2].flatten(1).std(dim=1).max() < 0.01 for picture in pictures)
    assert share_exact(blur(pictures, 1.5)) == empty / len(VIEWS)
    assert share_exact(add_noise(pictures, 0.1, random.Random(0))) == 0
    assert share_exact(torch.full_like(pictures, torch.nan)) == 0
    turned = [spec for spec in SPECS if isinstance(spec.view, Solid)]
    assert share_exact(render([spec.wrong[0] for spec in turned], 64), turned) == 0
    other = replace(SPECS[0], wrong=(VIEWS[1],))
    assert "another view" in judge(other, render([VIEWS[1]], 64)[0], FULL).reason


@pytest.mark.parametrize("change", [wrong_colour, wrong_ground, extra_object, missing_object])
def test_exact_views_have_all_their_objects_and_no_others(change: Change) -> None:
    rng = random.Random(0)
    scenes = [spec for spec in SPECS if isinstance(spec.view, Scene)]
    specs = [s for s in scenes if all(inside(t) and t.scale == 1 for t in s.view.things)]
    changed = [change(spec.view, FULL, rng) for spec in specs]
    assert share_exact(soften(render(changed, 64)), specs) == 0


def test_a_solid_with_a_wrong_side_is_refused() -> None:
    solid = Solid(Ground.NAVY, (Colour.RED, Colour.LIME, Colour.BLUE, Colour.YELLOW), 0.5)
    wrong = replace(solid, sides=(Colour.ORANGE, *solid.sides[1:]))
    assert not judge(Spec(view=solid), render([wrong], 64)[0], FULL).ok


# clips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", Shape)
def test_locates_objects_at_any_rotation(shape: Shape) -> None:
    rng = random.Random(shape)
    for _ in range(6):
        angle = rng.uniform(-7, 7)
        thing = Thing(shape, Colour.CYAN, rng.choice(FULL.sizes), rng.uniform(0.3, 0.7), 0.3, angle)
        other = Thing(Shape.SQUARE, Colour.RED, Size.SMALL, thing.x, 0.3 + 1.3 * thing.radius + 0.1)
        picture = soften(render([Scene(Ground.BLACK, (thing, other))], 64))[0]
        expected = replace(thing, x=0.5, y=0.9, rotation=angle + rng.uniform(-0.5, 0.5))
        for wanted, place in zip((thing, other), locate(picture, (expected, other), FULL), strict=True):
            assert place is not None
            assert max(abs(place[0] - wanted.x), abs(place[1] - wanted.y)) < 0.025


def test_does_not_find_what_is_lost() -> None:
    scene = Scene(Ground.GREY, (CIRCLE, SQUARE))
    picture = render([scene], 64)[0]
    gone = replace(CIRCLE, colour=Colour.LIME)
    star, small = replace(CIRCLE, shape=Shape.STAR), replace(CIRCLE, size=Size.SMALL)
    assert locate(picture, (gone, star, small), FULL) == [None] * 3
    twice = Scene(Ground.GREY, (CIRCLE, replace(CIRCLE, x=0.75, y=0.75)))
    assert locate(render([twice], 64)[0], (CIRCLE,), FULL) == [None]
    assert locate(torch.full((3, 64, 64), torch.nan), (CIRCLE,), FULL) == [None]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Spec((Phrase(Shape.CIRCLE), Phrase(Shape.SQUARE))), ""),
        (Spec((Phrase(count=2),), ground=Ground.GREY), ""),
        (Spec((Phrase(count=2),), ground=Ground.BLACK), "the ground is grey instead of black"),
        (Spec((Phrase(Shape.CIRCLE),)), "there are 2 objects instead of 1"),
        (Spec((Phrase(Shape.CIRCLE), Phrase(Shape.CROSS))), "there is not a cross"),
        (Spec((Phrase(Shape.CIRCLE, Colour.RED, Size.SMALL), Phrase())), "there is not a small red circle"),
        (Spec((Phrase(Shape.CIRCLE), Phrase(colour=Colour.RED))), "the objects are not the wanted ones"),
        (Spec((Phrase(), Phrase(Shape.CIRCLE))), ""),
        (Spec((Phrase(Shape.CIRCLE), Phrase(Shape.SQUARE)), ((0, Relation.LEFT, 1),)), ""),
        (
            Spec((Phrase(Shape.CIRCLE), Phrase(Shape.SQUARE)), ((0, Relation.BELOW, 1),)),
            "the objects are not where they should be",
        ),
        (Spec((Phrase(Shape.SQUARE),), kept=(CIRCLE,)), ""),
        (Spec((Phrase(Shape.SQUARE),), kept=(replace(CIRCLE, x=0.37),)), ""),
        (
            Spec((Phrase(Shape.SQUARE),), kept=(replace(CIRCLE, x=0.4),)),
            "there is not a large red circle in its place",
        ),
    ],
)
def test_demands(spec: Spec, reason: str) -> None:
    assert unmet(spec, SCENE) == reason
