"""Clips and walks: what moves or turns, and what is seen when one goes over a map or around a solid.

Every view follows from what was shown or said before. Objects of a clip go straight on, each at its own
speed, and bounce off the picture's border. On a map one steps by a quarter of the view or changes between
near and far, and no later view shows any part of an object that the first one did not show. A solid's four
colours are said before it is turned.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import numpy as np

from openbagel.world.choice import Choice, again, require
from openbagel.world.exercise import Draws, Films, Said, Shown, Spec, Step, Steps, kinds
from openbagel.world.language import Phrase, enumerate_words
from openbagel.world.scene import MARGIN, Look, Scene, Solid, Thing, View, apart, inside, turn_between

GIVEN, DRAWN = 3, 10
"""Frames of a clip that are shown, and that are to be drawn."""
FRAMES = GIVEN + DRAWN
SLOWEST, FASTEST = 1 / 32, 1 / 11
"""Speeds of objects, in sides a frame: across and down, whole cells of the world."""
SPIN = math.radians(30)
"""What objects turn by a frame; less than half the least symmetry of a shape, so that their sense is seen."""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = {f"go {name}": (*step, 1.0) for name, step in DIRECTIONS.items()}
ACTIONS |= {"zoom in": (0, 0, 0.5), "zoom out": (0, 0, 2.0)}
"""On a map: steps in quarters of the view, and what the view's side is multiplied by."""
NEAR, FAR, MAP_SIDE = 1.0, 2.0, 3.0
"""Sides of a near and a far view and of the map, in near views."""
TURNS = {"turn right": math.radians(30), "turn left": math.radians(-30)}
Way = list[Thing]
"""An object in every frame."""
_TRIES = 60


# clips ------------------------------------------------------------------------------------------------------


def film_move(choose: Choice) -> Steps:
    """Go on with a clip: objects that move and bounce."""
    return _continued(choose, moves=True, turns=False)


def film_turn(choose: Choice) -> Steps:
    """Go on with a clip: objects that turn at one place, or move and turn."""
    return _continued(choose, moves=choose.chance(1 / 2), turns=True)


def film_text(choose: Choice) -> Steps:
    """Film "a red circle moves right and a blue square moves up"; no object comes to the border."""

    def way(look: Look) -> Way:
        start, (across, down) = _anywhere(choose, look), choose.pick(list(DIRECTIONS.values()))
        low = _room(choose, start)[0 if across else 1]
        speed = choose.world.coordinate(choose.rng, SLOWEST, FASTEST)
        require(low + (gone := speed * (DRAWN - 1)) <= 1 - low)
        first = choose.world.coordinate(choose.rng, low, 1 - low - gone)
        first = first if across + down > 0 else 1 - first
        start = replace(start, x=first) if across else replace(start, y=first)
        return _way(choose, start, (across * speed, down * speed))

    def clause(start: Thing, end: Thing) -> str:
        x, y = end.x - start.x, end.y - start.y
        heading = max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * x + DIRECTIONS[name][1] * y)
        return f"{Phrase(*start.pair).indefinite()} moves {heading}"

    views = _frames(choose, _looks(choose), way)[:DRAWN]
    words = enumerate_words(list(map(clause, views[0].things, views[-1].things)))
    return Said(words), Films(views)


def _continued(choose: Choice, *, moves: bool, turns: bool) -> Steps:
    def way(look: Look) -> Way:
        spin = choose.pick((-SPIN, SPIN)) if turns else 0.0
        velocity = _velocity(choose) if moves else (0.0, 0.0)
        return _way(choose, _anywhere(choose, look, spin), velocity, spin)

    views = _frames(choose, _looks(choose, turns), way)
    return *map(Shown, views[:GIVEN]), Films(views[GIVEN:])


@again
def _velocity(choose: Choice) -> tuple[float, float]:
    across, down = (choose.world.coordinate(choose.rng, -FASTEST, FASTEST) for _ in range(2))
    require(SLOWEST <= math.hypot(across, down) <= FASTEST)
    return across, down


def _looks(choose: Choice, turns: bool = False) -> list[Look]:
    """One to three objects of different colours, the first held out or not, that show it when one `turns`."""
    count = choose.rng.randint(1, min(3, choose.world.max_things))
    looks: list[Look] = []
    for _ in range(count):
        used = {look.colour for look in looks}
        pairs = choose.world.pairs(held_out=choose.held_out and not looks)
        seen = [pair for pair in pairs if pair[1] not in used and (pair[0].symmetry or not turns)]
        looks.append(Look(*choose.pick(seen), choose.pick(choose.world.sizes_for(count + 2))))
    return looks


def _anywhere(choose: Choice, look: Look, spin: float = 0.0) -> Thing:
    thing = look.at(0.5, 0.5, rotation=choose.pick(choose.world.turns(look.shape)))
    x, y = (choose.world.coordinate(choose.rng, low, 1 - low) for low in _room(choose, thing, spin))
    return replace(thing, x=x, y=y)


def _room(choose: Choice, thing: Thing, spin: float = 0.0) -> tuple[float, ...]:
    """How near an object's centre may come to the border, across and down, in whole cells."""
    reach, cells = math.hypot(*thing.shape.half_box) * thing.radius, choose.world.cells
    half_box = (reach, reach) if spin else thing.half_box()
    return tuple(math.ceil((half + MARGIN) * cells) / cells for half in half_box)


def _way(choose: Choice, start: Thing, velocity: tuple[float, float], spin: float = 0.0) -> Way:
    """An object in every frame: straight on, back from the border, turned by `spin` a frame."""

    def bounced(place: float, low: float) -> float:
        span = 1 - 2 * low
        over = (place - low) % (2 * span)
        return round(low + min(over, 2 * span - over), 4)

    def at(frame: int) -> Thing:
        x, y = bounced(start.x + dx * frame, width), bounced(start.y + dy * frame, height)
        return replace(start, x=x, y=y, rotation=start.rotation + spin * frame)

    (dx, dy), (width, height) = velocity, _room(choose, start, spin)
    return list(map(at, range(FRAMES)))


def _frames(choose: Choice, looks: Sequence[Look], way: Callable[[Look], Way]) -> tuple[Scene, ...]:
    """Frames in which objects always stay apart; an object that finds no way is left out."""
    ways: list[Way] = []
    for look in looks:
        tries = (way(look) for _ in range(_TRIES))
        ways += [*islice((one for one in tries if all(all(map(apart, one, other)) for other in ways)), 1)]
    ground = choose.pick(choose.world.grounds)
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
    def on_map(self) -> bool:
        return min(self.left, self.top) >= 0 and max(self.left, self.top) + self.side <= MAP_SIDE

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


def walk_map(choose: Choice) -> Steps:
    """Go over a map: what is seen after "go left", "zoom in" …, one to three times. Every view shows a whole
    object, and nothing of any that the first view does not show.
    """
    land, side = _map(choose), choose.pick((NEAR, FAR))
    left, top = (choose.rng.randint(0, int(4 * (MAP_SIDE - side))) / 4 for _ in range(2))
    first = here = Window(left, top, side)
    whole = {thing.pair for thing in first.view(land).things if inside(thing)}
    require(whole & choose.world.held_out if choose.held_out else whole)
    steps: list[Step] = [Shown(first.view(land))]
    for _ in range(choose.rng.randint(1, 3)):
        windows = {name: after for name in ACTIONS if (after := here.after(name)).side in (NEAR, FAR)}
        views = {action: window.view(land) for action, window in windows.items()}
        sure = [name for name, window in windows.items() if window.on_map and not window.adds_to(first, land)]
        sure = require([name for name in sure if any(map(inside, views[name].things))])
        action = choose.rng.choices(sure, [1 if action.startswith("go") else 3 for action in sure])[0]
        steps += _acted(action, views, here.view(land))
        here = windows[action]
    return tuple(steps)


def _map(choose: Choice) -> Scene:
    """Up to nine objects of different looks, the first of them a held-out pair if asked for."""

    def somewhere(look: Look) -> Way:
        x, y = (FAR * choose.world.coordinate(choose.rng, 0, MAP_SIDE / FAR) for _ in range(2))
        look = replace(look, size=choose.pick(choose.world.sizes))
        return [look.at(x, y, rotation=choose.pick(choose.world.turns(look.shape)))]

    pairs = choose.different_pairs(choose.rng.randint(3, 9))
    (land,) = _frames(choose, [Look(*pair, choose.world.sizes[0]) for pair in pairs], somewhere)
    return land


def walk_solid(choose: Choice) -> Steps:
    """Turn a solid whose sides were named: what is seen after "turn left" or "turn right", two or three
    times.
    """
    world, rng = choose.world, choose.rng
    a, b, c, d = sides = rng.sample(world.colours, 4)
    numbers = map(world.colours.index, (*sides, a))
    corners = [(one + 2 * other) % 5 == 0 for one, other in pairwise(numbers)]  # a fifth is held out
    require(corners[0] if choose.held_out else not any(corners))
    here = Solid(rng.choice(world.grounds), (a, b, c, d), math.radians(rng.choice((-45, -15, 15, 45))))
    seen, swapped = facing(here), (a, b, d, c) if here.turn < 0 else (a, c, b, d)
    steps: list[Step] = [Said(f"front {a}, right {b}, back {c}, left {d}"), Shown(here)]
    for _ in range(rng.randint(2, 3)):
        action, before = rng.choice(list(TURNS)), here
        views = {name: replace(here, turn=here.turn + angle) for name, angle in TURNS.items()}
        here = views[action]
        # with the colours of the two sides exchanged that only words have told
        told = [replace(here, sides=swapped)] if facing(here) - seen else []
        steps += _acted(action, views, before, *told)
    return tuple(steps)


def _acted(action: str, views: Mapping[str, View], before: View, *more: View) -> tuple[Said, Draws]:
    """What is seen after an action, of what is seen after each; `before` and `more` are wrong too."""
    view = views[action]
    wrong = (before, *(other for other in views.values() if other is not view), *more)
    return Said(action), Draws(view, Spec(view=view, wrong=tuple(other for other in wrong if other != view)))


def facing(solid: Solid) -> set[int]:
    """The numbers of the sides that are in sight."""
    return {side for side in range(4) if math.cos(solid.turn + side * math.pi / 2) > 1e-6}


MOTION = kinds(film_move, film_turn, film_text, walk_map, walk_solid)


# scores -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClipScore:
    """error: mean distance of the found centres from the true ones, as a share of the way that an object goes
    on average (of a usual way where all stand); an object counts as one side away where it is lost. lost:
    whether any object is, in any frame. steered: whether every object went about where its true one goes,
    from the first frame to the last, at any speed: within 45° of the direction; for clips without bounces.
    """

    error: float
    lost: bool
    steered: bool


def score_clip(truth: Sequence[Scene], found: Sequence[Sequence[tuple[float, float] | None]]) -> ClipScore:
    """Of the centres that were found in each frame, in the order of its true objects (None: lost)."""
    ways = np.array([[(thing.x, thing.y) for thing in scene.things] for scene in truth])
    tracks = np.array([[place or (math.nan, math.nan) for place in row] for row in found])
    away = np.linalg.norm(tracks - ways, axis=2)
    gone = np.linalg.norm(np.diff(ways, axis=0), axis=2).sum(axis=0).mean()
    went, goes = tracks[-1] - tracks[0], ways[-1] - ways[0]
    far, along = np.linalg.norm(went, axis=1), (went * goes).sum(axis=1)
    straight = along >= far * np.linalg.norm(goes, axis=1) * math.cos(math.pi / 4)
    steps = len(truth) - 1
    error = np.nan_to_num(away, nan=1.0).mean() / (gone or (SLOWEST + FASTEST) / 2 * steps)
    steered = straight & (far >= SLOWEST * steps / 2)
    return ClipScore(float(error), lost=bool(np.isnan(away).any()), steered=bool(steered.all()))


def turned_frame(views: Sequence[Scene]) -> tuple[int, Spec] | None:
    """The frame of a clip that tells best how its objects turn, and what it must show: it is nearer to the
    truth than to one object left as in the first frame, or turned the other way. None where not all turn.
    """

    def wrong(scene: Scene) -> list[tuple[float, Scene]]:
        """Views with one object turned otherwise, and by how much."""
        return [
            (turn_between(thing.shape, thing.rotation, turn), scene.put(thing, replace(thing, rotation=turn)))
            for thing, start in zip(scene.things, views[0].things, strict=True)
            for turn in (start.rotation, 2 * start.rotation - thing.rotation)
        ]

    found = [(min(away for away, _ in wrong(scene)), number) for number, scene in enumerate(views)]
    clearness, best = max(found)
    spec = Spec(view=views[best], wrong=tuple(scene for _, scene in wrong(views[best])))
    return (best, spec) if clearness else None
