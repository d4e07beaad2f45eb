"""The judge: right on what is rendered or slightly softened, and strict with every kind of damage."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.judge import (
    DAMAGES,
    Redraw,
    autoencoded,
    damaged,
    free_world,
    sample_scenes,
    share_accepted,
    soften,
    strict_spec,
)
from openbagel.world.judge import judge, parse, unmet
from openbagel.world.language import Phrase, Relation
from openbagel.world.render import render, render_picture
from openbagel.world.scene import Colour, Ground, Scene, Shape, Size, Thing, World, nano_world
from openbagel.world.tasks import TASKS, Spec, example

WORLD = free_world()
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
    scenes = sample_scenes(WORLD, 200, seed=2)
    assert share_accepted(WORLD, scenes, lambda some: soften(render(some, WORLD.side))) >= 0.99


def test_accepts_what_the_shipped_autoencoder_makes_of_pictures() -> None:
    scenes = sample_scenes(nano_world(), 500, seed=3)
    redraw = autoencoded("nano")
    assert share_accepted(WORLD, scenes, lambda some: redraw(render(some, WORLD.side))) >= 0.99


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("redraw", [lambda pictures: pictures, soften], ids=["rendered", "softened"])
def test_refuses_damaged_pictures(kind: str, redraw: Redraw) -> None:
    scenes = sample_scenes(WORLD, 60, seed=3)
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


@pytest.mark.parametrize("kind", [kind for kind in TASKS if not kind.startswith("ask")])
def test_targets_are_right_and_sources_are_not(kind: str) -> None:
    for index in range(20):
        made = example(WORLD, 5, index, kind)
        assert made.spec and made.target
        assert judge(made.spec, render([made.target], 64)[0], WORLD).ok
        for scene in made.pictures:
            assert not judge(made.spec, render([scene], 64)[0], WORLD).ok


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
