"""Clips and walks: what moves or turns, and what is seen when one goes over a map or around a solid.

Every view follows from what was shown or said before. Objects of a clip go straight on, each at its own
speed, and bounce off the picture's border. On a map one steps by a quarter of the view or changes between
near and far, and no later view shows any part of an object that the first one did not show. A solid's four
colours are said before it is turned.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from statistics import fmean

from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Spec, Step, Task
from openbagel.world.language import Phrase, enumerate_words
from openbagel.world.scene import (
    HALF_BOX,
    MARGIN,
    SYMMETRY,
    Colour,
    Look,
    Pair,
    Scene,
    Solid,
    Thing,
    View,
    World,
    apart,
    inside,
    turn_between,
)

GIVEN, DRAWN = 3, 10
"""Frames of a clip that are shown, and that are to be drawn."""
FRAMES = GIVEN + DRAWN
SLOWEST, FASTEST = 1 / 32, 1 / 12
"""Speeds of objects, in sides a frame."""
SPIN = (math.radians(6), math.radians(20))
"""Turns of objects a frame; less than half the least symmetry of a shape, so that their sense is seen."""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = {f"go {name}": (*step, 1.0) for name, step in DIRECTIONS.items()}
ACTIONS |= {"zoom in": (0, 0, 0.5), "zoom out": (0, 0, 2.0)}
"""On a map: steps in quarters of the view, and what the view's side is multiplied by."""
NEAR, FAR, MAP_SIDE = 1.0, 2.0, 3.0
"""Sides of a near and a far view and of the map, in near views."""
TURNS = {"turn right": math.radians(30), "turn left": math.radians(-30)}
_TRIES = 60


# clips ------------------------------------------------------------------------------------------------------


def film_move(world: World, rng: random.Random, held_out: bool) -> Example:
    """Go on with a clip: objects that move and bounce."""

    def way(look: Look) -> list[Thing]:
        return _way(_anywhere(world, rng, look), _velocity(rng))

    return _continued("film_move", _frames(world, rng, _looks(world, rng, held_out), way))


def film_turn(world: World, rng: random.Random, held_out: bool) -> Example:
    """Go on with a clip: objects that turn at one place, or move and turn."""

    def way(look: Look) -> list[Thing]:
        spin = rng.uniform(*SPIN) * rng.choice((-1, 1))
        return _way(_anywhere(world, rng, look, spin), _velocity(rng) if moves else (0, 0), spin)

    moves = rng.random() < 1 / 2
    looks = _looks(world, rng, held_out, lambda pair: SYMMETRY[pair[0]] > 0)
    return _continued("film_turn", _frames(world, rng, looks, way))


def film_text(world: World, rng: random.Random, held_out: bool) -> Example:
    """Film "a red circle moves right and a blue square moves up"; no object comes to the border."""

    def way(look: Look) -> list[Thing]:
        start, (across, down) = _anywhere(world, rng, look), rng.choice(list(DIRECTIONS.values()))
        low = _room(start)[0 if across else 1]
        speed = rng.uniform(SLOWEST, min(FASTEST, (1 - 2 * low) / DRAWN))
        first = rng.uniform(low, 1 - low - speed * DRAWN)
        first = round(first if across + down > 0 else 1 - first, 4)
        start = replace(start, x=first) if across else replace(start, y=first)
        return _way(start, (across * speed, down * speed))

    def clause(start: Thing, end: Thing) -> str:
        x, y = end.x - start.x, end.y - start.y
        heading = max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * x + DIRECTIONS[name][1] * y)
        return f"{Phrase.of(start, with_size=False).indefinite()} moves {heading}"

    views = _frames(world, rng, _looks(world, rng, held_out), way)[:DRAWN]
    words = enumerate_words(list(map(clause, views[0].things, views[-1].things)))
    return Example("film_text", (Said(words), Films(views)))


def _continued(kind: str, views: tuple[Scene, ...]) -> Example:
    return Example(kind, (*map(Shown, views[:GIVEN]), Films(views[GIVEN:])))


def _looks(
    world: World, rng: random.Random, held_out: bool, fits: Callable[[Pair], bool] = lambda pair: True
) -> list[Look]:
    """One to three objects of different colours; with held_out the first is a held-out pair."""
    count = rng.randint(1, min(3, world.max_things))
    looks: list[Look] = []
    for number in range(count):
        used = {look.colour for look in looks}
        pairs = world.pairs(held_out=held_out and number == 0)
        pair = rng.choice([pair for pair in pairs if pair[1] not in used and fits(pair)])
        looks.append(Look(*pair, rng.choice(world.sizes_for(count + 2))))
    return looks


def _anywhere(world: World, rng: random.Random, look: Look, spin: float = 0.0) -> Thing:
    thing = look.at(0.5, 0.5, rotation=rng.choice(world.turns(look.shape)))
    x, y = (round(rng.uniform(room, 1 - room), 4) for room in _room(thing, spin))
    return replace(thing, x=x, y=y)


def _room(thing: Thing, spin: float = 0.0) -> tuple[float, float]:
    """How near an object's centre may come to the border, across and down."""
    reach = math.hypot(*HALF_BOX[thing.shape]) * thing.radius
    width, height = (reach, reach) if spin else thing.half_box()
    return width + MARGIN, height + MARGIN


def _velocity(rng: random.Random) -> tuple[float, float]:
    speed, angle = rng.uniform(SLOWEST, FASTEST), rng.uniform(0, 2 * math.pi)
    return speed * math.cos(angle), speed * math.sin(angle)


def _way(start: Thing, velocity: tuple[float, float], spin: float = 0.0) -> list[Thing]:
    """An object in every frame: straight on, back from the border, turned by `spin` a frame."""

    def bounced(place: float, low: float) -> float:
        span = 1 - 2 * low
        over = (place - low) % (2 * span)
        return round(low + min(over, 2 * span - over), 4)

    (dx, dy), (width, height) = velocity, _room(start, spin)
    places = [(bounced(start.x + dx * t, width), bounced(start.y + dy * t, height)) for t in range(FRAMES)]
    turns = [start.rotation + spin * t for t in range(FRAMES)]
    return [replace(start, x=x, y=y, rotation=turn) for (x, y), turn in zip(places, turns, strict=True)]


def _frames(
    world: World, rng: random.Random, looks: Sequence[Look], way: Callable[[Look], list[Thing]]
) -> tuple[Scene, ...]:
    """Frames in which objects always stay apart; an object that finds no way is left out."""
    ways: list[list[Thing]] = []
    for look in looks:
        tries = (way(look) for _ in range(_TRIES))
        ways += [*islice((one for one in tries if all(all(map(apart, one, other)) for other in ways)), 1)]
    ground = rng.choice(world.grounds)
    return tuple(Scene(ground, things) for things in zip(*ways, strict=True))


# walks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a map that is seen: its left, top and side, in near views."""

    left: float
    top: float
    side: float

    def after(self, action: str) -> "Window":
        across, down, zoom = ACTIONS[action]
        grown = self.side * (1 - zoom) / 2
        left, top = self.left + across * self.side / 4 + grown, self.top + down * self.side / 4 + grown
        return Window(left, top, self.side * zoom)

    @property
    def exists(self) -> bool:
        """Whether it is near or far, and inside the map."""
        lowest, highest = min(self.left, self.top), max(self.left, self.top) + self.side
        return self.side in (NEAR, FAR) and lowest >= 0 and highest <= MAP_SIDE

    def part(self, thing: Thing) -> tuple[float, float, float, float] | None:
        """The left, top, right and bottom of what is seen of an object's box; None out of sight."""
        width, height = thing.half_box()
        left, right = max(thing.x - width, self.left), min(thing.x + width, self.left + self.side)
        top, bottom = max(thing.y - height, self.top), min(thing.y + height, self.top + self.side)
        return (left, top, right, bottom) if left < right and top < bottom else None

    def view(self, land: Scene) -> Scene:
        """What is seen of a map."""

        def moved(thing: Thing) -> Thing:
            x, y = (thing.x - self.left) / self.side, (thing.y - self.top) / self.side
            return replace(thing, x=x, y=y, scale=1 / self.side)

        return Scene(land.ground, tuple(moved(thing) for thing in land.things if self.part(thing)))

    def adds_to(self, first: "Window", land: Scene) -> bool:
        """Whether it shows a part of any object that another window does not show."""
        parts = filter(None, map(self.part, land.things))
        return any(
            left < first.left or top < first.top or max(right - first.left, bottom - first.top) > first.side
            for left, top, right, bottom in parts
        )


def walk_map(world: World, rng: random.Random, held_out: bool) -> Example:
    """Go over a map: what is seen after "go left", "zoom in" …, one to three times."""
    while True:
        land = _map(world, rng, held_out)
        side = rng.choice((NEAR, FAR))
        left, top = (rng.randint(0, int(4 * (MAP_SIDE - side))) / 4 for _ in range(2))
        first = Window(left, top, side)
        shown = [thing for thing in first.view(land).things if inside(thing)]
        if any(thing.pair in world.held_out for thing in shown) if held_out else shown:
            walk = _walk(rng, land, first, rng.randint(1, 3))
            if walk is not None:
                return Example("walk_map", walk)


def _map(world: World, rng: random.Random, held_out: bool) -> Scene:
    """Up to nine objects of different looks, the first of them a held-out pair if asked for."""
    pairs = world.pairs(held_out=False)
    pairs = rng.sample(pairs, min(rng.randint(3, 9), len(pairs)))
    if held_out:
        pairs[0] = rng.choice(world.pairs(held_out=True))
    things: list[Thing] = []
    for shape, colour in pairs:
        for _ in range(_TRIES):
            x, y = (round(rng.uniform(0, MAP_SIDE), 4) for _ in range(2))
            look = Look(shape, colour, rng.choice(world.sizes))
            thing = look.at(x, y, rotation=rng.choice(world.turns(shape)))
            if all(apart(thing, other) for other in things):
                things.append(thing)
                break
    return Scene(rng.choice(world.grounds), tuple(things))


def _walk(rng: random.Random, land: Scene, first: Window, length: int) -> tuple[Step, ...] | None:
    """A walk whose every view shows a whole object, and nothing of any that the first view does not show.

    None where it does not go on.
    """
    here = first
    steps: list[Step] = [Shown(first.view(land))]
    for _ in range(length):
        windows = {action: here.after(action) for action in ACTIONS}
        windows = {action: window for action, window in windows.items() if window.side in (NEAR, FAR)}
        views = {action: window.view(land) for action, window in windows.items()}
        sure = [
            action
            for action, window in windows.items()
            if window.exists and any(map(inside, views[action].things)) and not window.adds_to(first, land)
        ]
        if not sure:
            return None
        action = rng.choices(sure, [1 if action.startswith("go") else 3 for action in sure])[0]
        others = [here.view(land), *(view for name, view in views.items() if name != action)]
        here = windows[action]
        steps += _acted(action, views[action], others)
    return tuple(steps)


def walk_solid(world: World, rng: random.Random, held_out: bool) -> Example:
    """Turn a solid whose sides were named: what is seen after "turn left" or "turn right", two or three
    times.
    """
    while True:
        a, b, c, d = sides = tuple(rng.sample(world.colours, 4))
        corners = [_held_out_corner(world, *pair) for pair in pairwise((*sides, a))]
        if corners[0] if held_out else not any(corners):
            break
    here = Solid(rng.choice(world.grounds), (a, b, c, d), math.radians(rng.choice((-45, -15, 15, 45))))
    seen, swapped = facing(here), (a, b, d, c) if here.turn < 0 else (a, c, b, d)
    named = zip(("front", "right", "back", "left"), sides, strict=True)
    steps: list[Step] = [Said(", ".join(f"{name} {colour}" for name, colour in named)), Shown(here)]
    for _ in range(rng.randint(2, 3)):
        action = rng.choice(list(TURNS))
        views = {name: replace(here, turn=here.turn + angle) for name, angle in TURNS.items()}
        others = [here, *(view for name, view in views.items() if name != action)]
        here = views[action]
        if facing(here) - seen:  # with the colours of the two sides exchanged that only words have told
            others.append(replace(here, sides=swapped))
        steps += _acted(action, here, others)
    return Example("walk_solid", tuple(steps))


def _acted(action: str, view: View, others: Sequence[View]) -> tuple[Said, Draws]:
    wrong = tuple(other for other in others if other != view)
    return Said(action), Draws(view, Spec(view=view, wrong=wrong))


def facing(solid: Solid) -> set[int]:
    """The numbers of the sides that are in sight."""
    return {side for side in range(4) if math.cos(solid.turn + side * math.pi / 2) > 1e-6}


def _held_out_corner(world: World, colour: Colour, next_colour: Colour) -> bool:
    """A fifth of the pairs of colours of two neighbouring sides."""
    return (world.colours.index(colour) + 2 * world.colours.index(next_colour)) % 5 == 0


MOTION: dict[str, Task] = {
    task.__name__: task for task in (film_move, film_turn, film_text, walk_map, walk_solid)
}


# scores -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClipScore:
    """error: mean distance of the found centres from the true ones, as a share of the way that an object goes
    on average (of a usual way where all stand); an object counts as one side away where it is lost. lost:
    whether any object is, in any frame. steered: whether every object went about where its true one goes,
    from the first frame to the last, at any speed; for clips without bounces.
    """

    error: float
    lost: bool
    steered: bool


def score_clip(truth: Sequence[Scene], found: Sequence[Sequence[tuple[float, float] | None]]) -> ClipScore:
    """Of the centres that were found in each frame, in the order of its true objects (None: lost)."""
    ways = list(zip(*([(thing.x, thing.y) for thing in scene.things] for scene in truth), strict=True))
    tracks = list(zip(*found, strict=True))
    away = [
        math.dist(place, there) if there else 1.0
        for way, track in zip(ways, tracks, strict=True)
        for place, there in zip(way, track, strict=True)
    ]
    least = SLOWEST * (len(truth) - 1) / 2
    gone = fmean(sum(math.dist(a, b) for a, b in pairwise(way)) for way in ways)
    return ClipScore(
        error=fmean(away) / (gone or (SLOWEST + FASTEST) / 2 * (len(truth) - 1)),
        lost=any(there is None for track in tracks for there in track),
        steered=all(_steered(way, track, least) for way, track in zip(ways, tracks, strict=True)),
    )


def _steered(
    way: Sequence[tuple[float, float]], track: Sequence[tuple[float, float] | None], least: float
) -> bool:
    """Whether a track leads within 45° of a way's direction, for a distance of `least` or more."""
    if track[0] is None or track[-1] is None:
        return False
    (x, y), (to_x, to_y) = ((b[0] - a[0], b[1] - a[1]) for a, b in ((track[0], track[-1]), (way[0], way[-1])))
    went, goes = math.hypot(x, y), math.hypot(to_x, to_y)
    return went >= least and x * to_x + y * to_y >= went * goes * math.cos(math.pi / 4)


def turned_frame(views: Sequence[Scene]) -> tuple[int, Spec] | None:
    """The frame of a clip that tells best how its objects turn, and what it must show: it is nearer to the
    truth than to one object left as in the first frame, or turned the other way. None where not all turn.
    """

    def wrong(frame: int) -> list[tuple[float, Scene]]:
        """Views with one object turned otherwise, and by how much."""
        scene, found = views[frame], []
        for number, (thing, start) in enumerate(zip(scene.things, views[0].things, strict=True)):
            for rotation in (start.rotation, 2 * start.rotation - thing.rotation):
                things = list(scene.things)
                things[number] = replace(thing, rotation=rotation)
                away = turn_between(thing.shape, thing.rotation, rotation)
                found.append((away, Scene(scene.ground, tuple(things))))
        return found

    clearness, best = max((min(away for away, _ in wrong(frame)), frame) for frame in range(len(views)))
    spec = Spec(view=views[best], wrong=tuple(scene for _, scene in wrong(best)))
    return (best, spec) if clearness else None
