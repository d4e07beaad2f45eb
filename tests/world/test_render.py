"""Pictures: right colours in the right pixels at any size, smooth edges, the same in batches and alone."""

import hashlib
import math
import random
from dataclasses import replace

import pytest
import torch

from openbagel.world.render import coverage, render, render_picture, to_picture
from openbagel.world.scene import Colour, Ground, Scene, Shape, Size, Solid, Thing, full_world, nano_world

AREAS = {
    Shape.CIRCLE: math.pi,
    Shape.SQUARE: 1.76**2,
    Shape.TRIANGLE: 1.74,
    Shape.CROSS: 2 * 2 * 0.72 - 0.72**2,
    Shape.RING: math.pi * (1 - 0.4**2),
    Shape.DIAMOND: 2 * 0.7 * 1.1,
    Shape.ARROW: 0.9 + 2 * 0.34,
}
"""Areas in squared radii, from geometry."""


@pytest.mark.parametrize("side", [32, 64, 97, 256])
def test_sizes_and_range(side: int) -> None:
    rng = random.Random(side)
    scenes = [nano_world().sample_scene(rng, count) for count in (1, 2, 3)] + [Scene(Ground.BLACK, ())]
    pictures = render(scenes, side)
    assert pictures.shape == (4, 3, side, side) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert pictures[3].eq(0).all()


def test_the_first_world_looks_as_it_did() -> None:
    """Shipped weights were trained on these pictures."""
    rng = random.Random(0)
    scenes = [nano_world().sample_scene(rng, 1 + i % 3, held_out=i % 4 == 0) for i in range(300)]
    pixels = b"".join(to_picture(picture).tobytes() for picture in render(scenes, 64))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "8b50c8fdef0e8d46"


def test_no_scenes_no_pictures() -> None:
    assert render([], 64).shape == (0, 3, 64, 64)


def test_colours_inside_and_outside() -> None:
    for colour in Colour:
        for ground in Ground:
            thing = Thing(Shape.CIRCLE, colour, Size.LARGE, 0.4, 0.6)
            picture = render([Scene(ground, (thing,))], 64)[0]
            assert picture[:, 38, 26].mul(255).round().tolist() == list(colour.rgb)
            assert picture[:, 2, 2].mul(255).round().tolist() == list(ground.rgb)


def test_a_batch_equals_its_scenes_alone() -> None:
    rng = random.Random(1)
    views = [full_world().sample_scene(rng, 1 + i % 6) for i in range(40)] + [Scene(Ground.TEAL, ())]
    views = [*views, *(SOLID for _ in range(2)), *views[:7], replace(SOLID, turn=1.0)]
    alone = torch.cat([render([view], 64) for view in views])
    assert torch.equal(render(views, 64), alone)


@pytest.mark.parametrize("shape", Shape)
def test_every_shape_fills_its_box_and_stays_inside(shape: Shape) -> None:
    thing = Thing(shape, Colour.RED, Size.LARGE, 0.5, 0.5)
    side = 400
    covered = coverage([thing], side)[0] > 0.5
    width, height = thing.half_box()
    columns, rows = covered.any(dim=0).nonzero()[:, 0], covered.any(dim=1).nonzero()[:, 0]
    assert (columns.max() - columns.min() + 1) / side == pytest.approx(2 * width, abs=0.012)
    assert (rows.max() - rows.min() + 1) / side == pytest.approx(2 * height, abs=0.012)
    assert (columns.max() + columns.min() + 1) / side == pytest.approx(1, abs=0.006)
    assert (rows.max() + rows.min() + 1) / side == pytest.approx(1, abs=0.006)


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize("side", [64, 256])
def test_areas_are_those_of_geometry(shape: Shape, side: int) -> None:
    thing = Thing(shape, Colour.RED, Size.LARGE, 0.503, 0.497)
    area = float(coverage([thing], side).sum()) / (thing.radius * side) ** 2
    assert area == pytest.approx(AREAS[shape], rel=0.01)


def test_edges_are_about_one_pixel_wide() -> None:
    covered = coverage([Thing(Shape.CIRCLE, Colour.RED, Size.LARGE, 0.5, 0.5)], 128)[0]
    soft = ((covered > 0.02) & (covered < 0.98)).sum()
    outline = 2 * math.pi * 0.19 * 128
    assert 0.8 < soft / outline < 1.5
    row = covered[64]
    assert row.diff().abs().max() < 1


def test_a_shift_of_a_tenth_of_a_pixel_shows() -> None:
    here, there = (
        coverage([Thing(Shape.SQUARE, Colour.RED, Size.SMALL, x, 0.5)], 64)[0] for x in (0.5, 0.5 + 0.1 / 64)
    )
    moved = (there - here)[32]
    assert moved.max() == pytest.approx(0.1, abs=1e-3) and moved.min() == pytest.approx(-0.1, abs=1e-3)


def test_rotation_is_clockwise() -> None:
    upright, quarter = (
        coverage([Thing(Shape.HEART, Colour.RED, Size.LARGE, 0.5, 0.5, rotation=angle)], 64)[0]
        for angle in (0.0, math.pi / 2)
    )
    assert torch.allclose(quarter, upright.rot90(-1), atol=1e-3)
    assert upright[:32].sum() > upright[32:].sum()


def test_later_things_lie_on_top() -> None:
    below = Thing(Shape.SQUARE, Colour.RED, Size.LARGE, 0.5, 0.5)
    above = Thing(Shape.SQUARE, Colour.BLUE, Size.SMALL, 0.5, 0.5)
    picture = render_picture(Scene(Ground.WHITE, (below, above)), 64)
    assert picture.size == (64, 64) and picture.mode == "RGB"
    assert picture.getpixel((32, 32)) == Colour.BLUE.rgb
    assert picture.getpixel((23, 32)) == Colour.RED.rgb


def test_a_scaled_object_outside_leaves_only_its_part() -> None:
    thing = Thing(Shape.SQUARE, Colour.RED, Size.LARGE, 0.0, 0.5, scale=0.5)
    covered = coverage([thing, replace(thing, x=-0.3)], 64)
    assert covered[0].sum() == pytest.approx((0.88 * 0.095 * 64) ** 2 * 2, rel=0.02)
    assert covered[0, :, 6:].eq(0).all() and covered[1].eq(0).all()


SOLID = Solid(Ground.BLACK, (Colour.RED, Colour.GREEN, Colour.BLUE, Colour.YELLOW), 0.0)


@pytest.mark.parametrize("turn", [0.0, 0.4, math.pi / 2, 2.5, 4.0, -0.7])
def test_a_solid_shows_the_sides_that_face_the_viewer(turn: float) -> None:
    side = 200
    row = render([replace(SOLID, turn=turn)], side)[0, :, side // 2]
    for k, colour in enumerate(SOLID.sides):
        wanted = torch.tensor(colour.rgb)[:, None] / 255
        places = ((row - wanted).abs().amax(dim=0) < 0.02).nonzero()[:, 0].float()
        width, middle = 0.44 * math.cos(turn + k * math.pi / 2), 0.22 * math.sin(turn + k * math.pi / 2)
        assert len(places) / side == pytest.approx(max(width, 0), abs=0.015)
        if width > 0.02:
            assert float(places.mean() + 0.5) / side - 0.5 == pytest.approx(middle, abs=0.01)


def test_a_solid_has_no_gap_between_its_sides_and_smooth_ends() -> None:
    white = replace(SOLID, sides=(Colour.YELLOW,) * 4, turn=0.3)
    picture = render([white], 64)[0]
    wide = 64 * 0.44 * (math.cos(0.3) + math.sin(0.3))
    assert float(picture[0].sum() / (245 / 255)) == pytest.approx(wide * 64 * 0.6, rel=1e-3)
    assert picture[0, 32].gt(0).sum() <= wide + 2


def test_to_picture_clips() -> None:
    assert to_picture(torch.tensor([-1.0, 0.5, 2.0]).reshape(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)
