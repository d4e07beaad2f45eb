"""Clips and walks: the truth follows from what was shown or said, and looks like no wrong view."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from openbagel.world.choice import Choice, again
from openbagel.world.exercise import Draws, Example, Films, Said, Shown
from openbagel.world.language import Phrase
from openbagel.world.motion import ACTIONS, FASTEST, MOTION, SLOWEST, facing, score_clip, turned_frame
from openbagel.world.render import render
from openbagel.world.scene import MARGIN, WORLDS, Scene, Solid, Thing, World, apart, inside

WORLD = WORLDS["full"]()
SEEDS = range(40)


def made(kind: str, seed: int, held_out: bool = False, world: World = WORLD) -> Example:
    return Example(kind, again(MOTION[kind])(Choice(world, random.Random(seed), held_out)))


def clip(example: Example) -> list[Scene]:
    """All frames, those given and those to be drawn."""
    views = [step.view for step in example.steps if isinstance(step, Shown)]
    views += [view for step in example.steps if isinstance(step, Films) for view in step.views]
    return [view for view in views if isinstance(view, Scene)]


def ways(frames: list[Scene]) -> list[list[Thing]]:
    return [list(way) for way in zip(*(frame.things for frame in frames), strict=True)]


def moves(way: list[Thing], axis: str) -> list[float]:
    return [getattr(b, axis) - getattr(a, axis) for a, b in pairwise(way)]


def views_of(example: Example) -> list[Scene | Solid]:
    return [step.view for step in example.steps if isinstance(step, Shown | Draws)]


def said_of(example: Example) -> list[str]:
    return [step.words for step in example.steps if isinstance(step, Said)]


# all --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("kind", MOTION)
def test_examples_repeat_and_hold_out(kind: str, world: Callable[[], World]) -> None:
    for held_out in (False, True):
        for seed in range(6):
            example = made(kind, seed, held_out, world())
            assert example == made(kind, seed, held_out, world())
            views = clip(example) or views_of(example)
            if isinstance(first := views[0], Scene):
                pairs = {thing.pair for thing in first.things if inside(thing)}
                assert bool(pairs & world().held_out) == held_out
            assert len({made(kind, other, held_out, world()) for other in range(8)}) == 8


def test_lengths() -> None:
    for kind, given in (("film_move", 3), ("film_turn", 3), ("film_text", 0)):
        *first, films = made(kind, 0).steps
        assert [isinstance(step, Shown) for step in first] == [True] * given or kind == "film_text"
        assert isinstance(films, Films)
        assert len(films.views) == 10


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("kind", ["film_move", "film_turn", "film_text", "walk_map"])
def test_objects_keep_to_cells(kind: str, world: Callable[[], World]) -> None:
    cells = world().cells
    for seed in SEEDS:
        example = made(kind, seed, world=world())
        for view in clip(example) or views_of(example):
            assert isinstance(view, Scene)
            assert all(c * cells == round(c * cells) for thing in view.things for c in (thing.x, thing.y))


# clips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["film_move", "film_turn", "film_text"])
def test_objects_of_a_clip_keep_apart_and_inside(kind: str) -> None:
    counts = set()
    for seed in SEEDS:
        frames = clip(made(kind, seed))
        counts.add(len(frames[0].things))
        assert len({frame.ground for frame in frames}) == 1
        for frame in frames:
            assert len({thing.colour for thing in frame.things}) == len(frame.things)
            assert all(inside(thing) for thing in frame.things)
            assert all(apart(a, b) for i, a in enumerate(frame.things) for b in frame.things[:i])
        for way in ways(frames):
            assert len({replace(thing, x=0, y=0, rotation=0) for thing in way}) == 1
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("kind", ["film_move", "film_turn"])
def test_three_frames_tell_the_rest(kind: str) -> None:
    """An object that goes on as it went, and turns round where its box would leave the margin, in cells."""
    bounces = stands = 0
    for seed in SEEDS:
        for way in ways(clip(made(kind, seed))):
            for axis, index in (("x", 0), ("y", 1)):
                low = MARGIN + way[0].half_box()[index]
                if kind == "film_turn":
                    unturned = replace(way[0], rotation=0).half_box()
                    low = MARGIN + math.hypot(*unturned)
                low = math.ceil(low * WORLD.cells) / WORLD.cells
                place, (first, speed) = getattr(way[2], axis), moves(way[:3], axis)
                if abs(first - speed) > 3e-4:
                    continue  # it bounced already
                for thing in way[3:]:
                    place += speed
                    if not low <= place <= 1 - low:
                        place, speed = 2 * (low if place < low else 1 - low) - place, -speed
                        bounces += 1
                    assert getattr(thing, axis) == pytest.approx(place, abs=3e-3)
            far = max(math.hypot(a, b) for a, b in zip(moves(way, "x"), moves(way, "y"), strict=True))
            stands += far == 0
            assert far == 0 or SLOWEST - 1e-3 <= far <= FASTEST + 1e-3
    assert bounces > 10
    assert (stands > 0) == (kind == "film_turn")


def test_turns_are_constant_and_can_be_told() -> None:
    for seed in SEEDS:
        frames = clip(made("film_turn", seed))
        for way in ways(frames):
            (spin,) = {round(turn, 6) for turn in moves(way, "rotation")}
            assert abs(spin) == pytest.approx(math.radians(30), abs=1e-5)
            assert abs(spin) < math.pi / way[0].shape.symmetry
        found = turned_frame(frames[3:])
        assert found is not None
        number, spec = found
        assert spec.view == frames[3 + number]
        right, *wrong = render([frames[3 + number], *spec.wrong], WORLD.side).numpy()
        assert len(wrong) == 2 * len(frames[0].things)
        assert min(np.abs(right - other).max() for other in wrong) > 0.2
        assert turned_frame(clip(made("film_move", seed))) is None


def test_a_sentence_tells_what_moves_where() -> None:
    for seed in SEEDS:
        example = made("film_text", seed)
        (words,), frames = said_of(example), clip(example)
        clauses = words.replace(" and ", ", ").split(", ")
        for clause, way in zip(clauses, ways(frames), strict=True):
            subject, _, heading = clause.partition(" moves ")
            assert subject == Phrase.of(way[0], with_size=False).indefinite()
            dx, dy = (way[-1].x - way[0].x, way[-1].y - way[0].y)
            assert {"right": dx, "left": -dx, "down": dy, "up": -dy}[heading] >= 9 * SLOWEST - 1e-3
            assert min(abs(dx), abs(dy)) == 0
            steps = moves(way, "x" if dx else "y")
            assert max(steps) - min(steps) < 3e-4


# walks ------------------------------------------------------------------------------------------------------


def test_no_view_of_a_walk_shows_what_was_not_seen() -> None:
    """Each view is the last one moved or grown; what it has of objects lies within the first view."""
    heard = set()
    for seed in range(150):
        example = made("walk_map", seed)
        views, actions = views_of(example), said_of(example)
        assert 1 <= len(actions) <= 3
        heard |= set(actions)
        left, top, side = 0.0, 0.0, 1.0  # of the view, in the first one's coordinates
        first = views[0]
        assert isinstance(first, Scene)
        for action, before, view in zip(actions, views[:-1], views[1:], strict=True):
            assert isinstance(view, Scene)
            assert isinstance(before, Scene)
            dx, dy = {"go right": (1, 0), "go left": (-1, 0), "go up": (0, -1), "go down": (0, 1)}.get(
                action, (0, 0)
            )
            left, top = left + dx * side / 4, top + dy * side / 4
            if action.startswith("zoom"):
                grown = side / 2 if action == "zoom in" else side * 2
                left, top, side = left + (side - grown) / 2, top + (side - grown) / 2, grown
            assert any(map(inside, view.things))
            known = {thing.pair: thing for thing in first.things}
            for thing in view.things:
                seen = known[thing.pair]
                assert left + side * thing.x == pytest.approx(seen.x)
                assert top + side * thing.y == pytest.approx(seen.y)
                assert thing.scale / seen.scale == pytest.approx(1 / side)
                for start, place, half in zip((left, top), (seen.x, seen.y), seen.half_box(), strict=True):
                    assert max(place - half, start) >= -1e-9
                    assert min(place + half, start + side) <= 1 + 1e-9
    assert heard == set(ACTIONS)


@pytest.mark.parametrize("kind", ["walk_map", "walk_solid"])
def test_wrong_views_look_different(kind: str) -> None:
    fewest = {"walk_map": 4, "walk_solid": 2}[kind]
    for seed in SEEDS:
        for step in made(kind, seed).steps:
            if isinstance(step, Draws):
                assert step.spec.view == step.view
                assert len(step.spec.wrong) >= fewest
                right, *wrong = render([step.view, *step.spec.wrong], WORLD.side).numpy()
                assert min(np.abs(right - other).max() for other in wrong) > 0.1


def test_a_solid_turns_by_30_degrees_and_its_colours_are_named() -> None:
    told = 0
    for seed in SEEDS:
        example = made("walk_solid", seed)
        (names, *actions), views = said_of(example), views_of(example)
        solids = [view for view in views if isinstance(view, Solid)]
        a, b, c, d = solids[0].sides
        assert names == f"front {a}, right {b}, back {c}, left {d}"
        assert len({a, b, c, d}) == 4
        assert 0 in facing(solids[0])
        for action, before, after in zip(actions, solids[:-1], solids[1:], strict=True):
            step = math.degrees(after.turn - before.turn)
            assert step == pytest.approx({"turn right": 30, "turn left": -30}[action])
            assert after.sides == before.sides
        assert all(len(facing(solid)) == 2 for solid in solids)
        for step in example.steps:
            if isinstance(step, Draws) and isinstance(step.view, Solid):
                wrong = [view for view in step.spec.wrong if isinstance(view, Solid)]
                other = [view for view in wrong if view.sides != step.view.sides]
                assert bool(other) == bool(facing(step.view) - facing(solids[0]))
                told += len(other)
    assert told > 10


def test_corners_of_solids_are_held_out() -> None:
    def corners(held_out: bool) -> list[list[tuple[str, str]]]:
        first = [views_of(made("walk_solid", seed, held_out))[0] for seed in range(200)]
        sides = [solid.sides for solid in first if isinstance(solid, Solid)]
        return [list(pairwise((*one, one[0]))) for one in sides]

    trained = {corner for solid in corners(False) for corner in solid}
    assert not trained & {solid[0] for solid in corners(True)}


# scores -----------------------------------------------------------------------------------------------------


def places(frames: list[Scene]) -> list[list[tuple[float, float] | None]]:
    return [[(thing.x, thing.y) for thing in frame.things] for frame in frames]


def two_movers() -> list[Scene]:
    seed = next(seed for seed in range(99) if len(clip(made("film_text", seed))[0].things) == 2)
    return clip(made("film_text", seed))


def test_a_perfect_clip_has_no_error() -> None:
    for kind in ("film_move", "film_turn", "film_text"):
        frames = clip(made(kind, 1))[-10:]
        score = score_clip(frames, places(frames))
        assert (score.error, score.lost) == (0, False)
        assert score.steered or kind != "film_text"


def test_errors_are_shares_of_the_way() -> None:
    frames = two_movers()
    gone = [sum(math.dist((a.x, a.y), (b.x, b.y)) for a, b in pairwise(way)) for way in ways(frames)]
    off = [[(x + 0.03, y - 0.04) for x, y in filter(None, row)] for row in places(frames)]
    assert score_clip(frames, off).error == pytest.approx(0.05 / (sum(gone) / 2))
    still = [replace(frames[0])] * 10
    assert score_clip(still, places(still)).error == 0
    assert 0 < score_clip(still, off).error < math.inf


def test_a_lost_object_is_told_and_counts_as_one_side() -> None:
    frames = two_movers()
    found = places(frames)
    found[4][1] = None
    score = score_clip(frames, found)
    gone = sum(math.dist((a.x, a.y), (b.x, b.y)) for way in ways(frames) for a, b in pairwise(way)) / 2
    assert score.lost
    assert score.steered
    assert score.error == pytest.approx(1 / 20 / gone)
    found[-1][0] = None
    assert not score_clip(frames, found).steered


@pytest.mark.parametrize(("pace", "steered"), [(1.0, True), (0.6, True), (0.2, False), (-1.0, False)])
def test_steering_asks_for_the_direction_and_not_for_the_speed(pace: float, steered: bool) -> None:
    frames = two_movers()
    start = places(frames)[0]
    found = [
        [
            (a[0] + pace * (b[0] - a[0]), a[1] + pace * (b[1] - a[1]))
            for a, b in zip(filter(None, start), filter(None, row), strict=True)
        ]
        for row in places(frames)
    ]
    assert score_clip(frames, found).steered == steered
