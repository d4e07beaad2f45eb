"""Scenes as data: coloured shapes on a coloured ground, and the world that says which of them exist.

Coordinates are fractions of the picture's side, x to the right and y down. Nothing here knows about pixels.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import TypeVar

Pair = tuple["Shape", "Colour"]
T = TypeVar("T")


def exchanged(items: tuple[T, ...], old: T, *new: T) -> tuple[T, ...]:
    """With `old` replaced by `new`, or taken away."""
    at = items.index(old)
    return *items[:at], *new, *items[at + 1 :]


class Shape(StrEnum):
    """`half_box` is half the width and height of the unrotated shape, in radii; an object's centre is its
    box's centre. With a `symmetry` of n, it looks the same after a turn by a whole n-th of a circle; with 0,
    after every turn. `corners` has its outline, those that point inwards too.
    """

    half_box: tuple[float, float]
    symmetry: int
    corners: int

    CIRCLE = "circle", (1.0, 1.0), 0, 0
    SQUARE = "square", (0.88, 0.88), 4, 4
    TRIANGLE = "triangle", (1.0, 0.87), 1, 3
    CROSS = "cross", (1.0, 1.0), 4, 12
    STAR = "star", (1.05, 1.0), 5, 10
    RING = "ring", (1.0, 1.0), 0, 0
    HEART = "heart", (1.0, 0.87), 1, 2
    DIAMOND = "diamond", (0.7, 1.1), 2, 4
    MOON = "moon", (0.8, 1.0), 1, 2
    ARROW = "arrow", (0.9, 1.0), 1, 7

    def __new__(cls, word: str, half_box: tuple[float, float], symmetry: int, corners: int) -> "Shape":
        shape = str.__new__(cls, word)
        shape._value_ = word
        shape.half_box, shape.symmetry, shape.corners = half_box, symmetry, corners
        return shape


class _Paint(StrEnum):
    """A word for a colour, and its red, green and blue from 0 to 255."""

    rgb: tuple[int, int, int]

    def __new__(cls, word: str, rgb: tuple[int, int, int]) -> "_Paint":
        paint = str.__new__(cls, word)
        paint._value_, paint.rgb = word, rgb
        return paint


class Colour(_Paint):
    RED = "red", (220, 35, 40)
    GREEN = "green", (35, 165, 60)
    BLUE = "blue", (40, 80, 225)
    YELLOW = "yellow", (245, 215, 40)
    PURPLE = "purple", (145, 45, 185)
    CYAN = "cyan", (50, 210, 225)
    ORANGE = "orange", (250, 135, 25)
    PINK = "pink", (250, 135, 195)
    BROWN = "brown", (115, 65, 20)
    LIME = "lime", (150, 240, 40)


class Ground(_Paint):
    WHITE = "white", (255, 255, 255)
    BLACK = "black", (0, 0, 0)
    GREY = "grey", (128, 128, 128)
    NAVY = "navy", (15, 20, 80)
    BEIGE = "beige", (235, 220, 185)
    TEAL = "teal", (0, 100, 100)


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


RADIUS = {Size.SMALL: 0.12, Size.MEDIUM: 0.155, Size.LARGE: 0.19}
"""Nominal radius of an object, as a fraction of the picture's side."""

CLEAR = 0.2
"""Prompts and questions use a relation only where the centres differ by this fraction of the side or more."""
MARGIN = 0.02
GAP = 0.04
_LEAST_TURN = math.radians(30)
_PLACEMENT_ROUNDS = 200
_TRIES_PER_OBJECT = 12


@dataclass(frozen=True, slots=True)
class Look:
    """What an object looks like, without a place."""

    shape: Shape
    colour: Colour
    size: Size

    @property
    def pair(self) -> Pair:
        return self.shape, self.colour

    def at(self, x: float, y: float, *, rotation: float = 0.0) -> "Thing":
        return Thing(self.shape, self.colour, self.size, x, y, rotation)


@dataclass(frozen=True, slots=True)
class Thing(Look):
    """One object. `x`, `y` is its centre in [0, 1]; `rotation` is in radians, clockwise as seen; `scale`
    multiplies its radius (a map seen from near or far).
    """

    x: float
    y: float
    rotation: float = 0.0
    scale: float = 1.0

    @property
    def look(self) -> Look:
        return Look(self.shape, self.colour, self.size)

    @property
    def radius(self) -> float:
        return RADIUS[self.size] * self.scale

    def half_box(self) -> tuple[float, float]:
        """Half width and height of a box around the object, in fractions of the side; tight after quarter
        turns.
        """
        (width, height), radius = self.shape.half_box, self.radius
        cos, sin = abs(math.cos(self.rotation)), abs(math.sin(self.rotation))
        return radius * (width * cos + height * sin), radius * (width * sin + height * cos)


class Relation(StrEnum):
    """Where an object is seen from another one."""

    LEFT = "left of"
    RIGHT = "right of"
    ABOVE = "above"
    BELOW = "below"

    @property
    def opposite(self) -> "Relation":
        words = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return Relation(words[self])

    def holds(self, a: Thing, b: Thing, *, margin: float = CLEAR) -> bool:
        """Whether `a` is on this side of `b`: their centres differ by at least `margin` along the axis."""
        shifts = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        return shifts[self] >= margin


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as data. Later things lie on top of earlier ones."""

    ground: Ground
    things: tuple[Thing, ...]

    def put(self, old: Thing, *new: Thing) -> "Scene":
        """With `old` replaced by `new`, or taken away."""
        return replace(self, things=exchanged(self.things, old, *new))


@dataclass(frozen=True, slots=True)
class Solid:
    """An upright prism of four coloured sides, turned by `turn` radians about its axis and seen from the
    side. Without a turn the first side faces the viewer; a positive turn moves it to the right, and the
    last one comes into sight on the left.
    """

    ground: Ground
    sides: tuple[Colour, Colour, Colour, Colour]
    turn: float


View = Scene | Solid


@dataclass(frozen=True, slots=True)
class World:
    """Which scenes exist.

    `held_out` pairs of shape and colour never occur in scenes sampled for training; `held_out_relations` are
    words that are never said of a pair (a red circle is never called "left of" anything), `held_out_counts`
    numbers in which a pair never comes. `side` is the side of a picture in pixels; centres lie on multiples
    of 1/cells, in clips and on maps too. Objects are turned by one of `rotations`. Up to the share
    `overlap` of an object's width or height may be hidden by a later one; with 0 objects keep a gap. Every
    random choice comes from the `random.Random` that is passed in.
    """

    shapes: tuple[Shape, ...]
    colours: tuple[Colour, ...]
    sizes: tuple[Size, ...]
    grounds: tuple[Ground, ...]
    max_things: int
    side: int
    held_out: frozenset[Pair] = frozenset()
    cells: int = 10_000
    rotations: tuple[float, ...] = (0.0,)
    overlap: float = 0.0
    held_out_relations: frozenset[tuple[Pair, Relation]] = frozenset()
    held_out_counts: frozenset[tuple[Pair, int]] = frozenset()

    def __post_init__(self) -> None:
        seen = {word for pair in self.pairs(held_out=False) for word in pair}
        if lost := ", ".join(word for word in (*self.shapes, *self.colours) if word not in seen):
            raise ValueError(f"held-out pairs leave nothing to train on for {lost}; hold out fewer pairs")

    def pairs(self, *, held_out: bool) -> list[Pair]:
        """The shape-colour pairs of one kind (held out, or free to train on), in a fixed order."""
        every = [(shape, colour) for shape in self.shapes for colour in self.colours]
        return [pair for pair in every if (pair in self.held_out) == held_out]

    def relations(self, a: Pair, b: Pair, *, held_out: bool) -> list[Relation]:
        """The relations of an object of pair `a` to one of pair `b` that are of one kind (held out, or free
        to train on): one is held out if it is for `a`, or if its opposite is for `b`.
        """
        out = self.held_out_relations
        return [word for word in Relation if ((a, word) in out or (b, word.opposite) in out) == held_out]

    def counts(self, pair: Pair, *, held_out: bool) -> list[int]:
        """How many objects of a pair a picture may have, from one to the most, of one kind."""
        every = range(1, self.max_things + 1)
        return [count for count in every if ((pair, count) in self.held_out_counts) == held_out]

    def allows_counts(self, looks: Sequence[Look]) -> bool:
        """Whether no pair comes in a number that is held out for it."""
        return self.held_out_counts.isdisjoint(Counter(look.pair for look in looks).items())

    def sizes_for(self, count: int) -> tuple[Size, ...]:
        """The sizes that `count` objects may have so that they always fit, with ease: all for three, not the
        largest for four, the smallest alone for more.
        """
        return self.sizes[: 1 if count > 4 else 2 if count == 4 else len(self.sizes)]

    def turns(self, shape: Shape) -> tuple[float, ...]:
        """The rotations of a shape that can be told from one another."""
        return _distinct_turns(shape, self.rotations)

    def sample_look(self, rng: random.Random, *, held_out: bool = False, count: int = 1) -> Look:
        """The look of a random one of `count` objects; from the held-out pairs, or never from them."""
        shape, colour = rng.choice(self.pairs(held_out=held_out))
        return Look(shape, colour, rng.choice(self.sizes_for(count)))

    def sample_scene(self, rng: random.Random, count: int, *, held_out: bool = False) -> Scene:
        """A scene of `count` objects inside the picture, with a margin to its border.

        With `held_out` one object is a held-out pair; without, none is, and no pair comes in a number that
        is held out for it. Raises ValueError when so many objects cannot be placed.
        """
        while True:
            looks = [self.sample_look(rng, held_out=held_out and i == 0, count=count) for i in range(count)]
            if held_out or self.allows_counts(looks):
                rng.shuffle(looks)
                return self.place(rng, looks)

    def sample_scenes(self, rng: random.Random, number: int) -> list[Scene]:
        """So many scenes of one object to the most; nothing held out."""
        counts = [rng.randint(1, self.max_things) for _ in range(number)]
        return [self.sample_scene(rng, count) for count in counts]

    def place(self, rng: random.Random, looks: Sequence[Look], *, ground: Ground | None = None) -> Scene:
        """A scene that shows `looks` in this order at random free places, on `ground` or a random one.

        In every second picture all objects keep a gap. Raises ValueError when they do not fit.
        """
        chosen = ground or rng.choice(self.grounds)
        world = replace(self, overlap=0.0) if self.overlap and rng.random() >= 1 / 2 else self
        for _ in range(_PLACEMENT_ROUNDS):
            things: list[Thing] = []
            for look in looks:
                thing = world.find_place(rng, look, things)
                if thing is None:
                    break
                things.append(thing)
            else:
                return Scene(chosen, tuple(things))
        return Scene(chosen, self._on_grid(looks))

    def find_place(self, rng: random.Random, look: Look, others: Sequence[Thing]) -> Thing | None:
        """`look` at a random place on top of `others` where it may be, or None if no try found one."""
        turns = self.turns(look.shape)
        rotation = turns[0] if len(turns) == 1 else rng.choice(turns)
        half_box = look.at(0.5, 0.5, rotation=rotation).half_box()
        for _ in range(_TRIES_PER_OBJECT):
            x, y = (self.coordinate(rng, low := half + MARGIN, 1 - low) for half in half_box)
            thing = look.at(x, y, rotation=rotation)
            if self._may_lie(thing, others):
                return thing
        return None

    def coordinate(self, rng: random.Random, lowest: float, highest: float) -> float:
        """A random multiple of a cell's side."""
        return rng.randint(math.ceil(lowest * self.cells), math.floor(highest * self.cells)) / self.cells

    def allows(self, things: Sequence[Thing]) -> bool:
        """Whether all objects are inside the picture and can be told apart and counted: they keep a gap, or,
        two and two, the later hides little of the other, which has another colour.
        """
        return all(inside(thing) and self._may_lie(thing, things[:i]) for i, thing in enumerate(things))

    def _may_lie(self, thing: Thing, others: Sequence[Thing]) -> bool:
        near = [other for other in others if not apart(thing, other)]
        if not near or not self.overlap or len(near) > 1:
            return not near
        below = near[0]
        alone = all(other is below or apart(below, other) for other in others)
        return alone and below.colour != thing.colour and hidden(below, thing) <= self.overlap

    def _on_grid(self, looks: Sequence[Look]) -> tuple[Thing, ...]:
        """The last resort of `place`: one object in each cell of a square grid."""
        columns = math.ceil(math.sqrt(len(looks)))
        middles = [(i + 0.5) / columns for i in range(columns)]
        middles = [round(middle * self.cells) / self.cells for middle in middles]
        things = tuple(look.at(middles[i % columns], middles[i // columns]) for i, look in enumerate(looks))
        if not self.allows(things):
            sizes = ", ".join(look.size for look in looks)
            raise ValueError(f"{len(looks)} objects ({sizes}) do not fit; ask for fewer or smaller ones")
        return things


def apart(a: Thing, b: Thing) -> bool:
    """Whether a strip of background as wide as `GAP` surely separates the boxes of two objects."""
    (a_width, a_height), (b_width, b_height) = a.half_box(), b.half_box()
    return abs(a.x - b.x) >= a_width + b_width + GAP or abs(a.y - b.y) >= a_height + b_height + GAP


def inside(thing: Thing) -> bool:
    """Whether an object lies in the picture with the margin to its border (up to rounded coordinates)."""
    half_width, half_height = thing.half_box()
    left, top = half_width + MARGIN - 1e-3, half_height + MARGIN - 1e-3
    return left <= thing.x <= 1 - left and top <= thing.y <= 1 - top


def hidden(below: Thing, above: Thing) -> float:
    """The share of an object's width or height, whichever is less, that another one's box hides at most."""
    (width, height), (a_width, a_height) = below.half_box(), above.half_box()
    across = (width + a_width - abs(below.x - above.x)) / (2 * width)
    down = (height + a_height - abs(below.y - above.y)) / (2 * height)
    return max(0.0, min(across, down))


def turn_between(shape: Shape, a: float, b: float) -> float:
    """The least angle by which a shape that is turned by `a` must go on to look as if turned by `b`."""
    if not shape.symmetry:
        return 0.0
    period = 2 * math.pi / shape.symmetry
    rest = (a - b) % period
    return min(rest, period - rest)


@lru_cache(maxsize=256)
def _distinct_turns(shape: Shape, rotations: tuple[float, ...]) -> tuple[float, ...]:
    kept: list[float] = []
    for angle in rotations:
        if all(turn_between(shape, angle, other) > _LEAST_TURN for other in kept):
            kept.append(angle)
    return tuple(kept)


def nano_world() -> World:
    """The first world: 4 shapes, 6 colours, 2 sizes, 3 grounds, up to 3 objects, 5 of 24 pairs held out.

    Centres keep to every fourth pixel: that brings the world within reach of hours on a CPU.
    """
    shapes = (Shape.CIRCLE, Shape.SQUARE, Shape.TRIANGLE, Shape.CROSS)
    out = (Colour.PURPLE, Colour.YELLOW, Colour.BLUE, Colour.RED, Colour.CYAN)
    return World(
        shapes=shapes,
        colours=(Colour.RED, Colour.GREEN, Colour.BLUE, Colour.YELLOW, Colour.PURPLE, Colour.CYAN),
        sizes=(Size.SMALL, Size.LARGE),
        grounds=(Ground.WHITE, Ground.GREY, Ground.BLACK),
        max_things=3,
        side=64,
        cells=16,
        held_out=frozenset(zip((*shapes, Shape.CROSS), out, strict=True)),
    )


def full_world() -> World:
    """The grown world: 10 shapes, 10 colours, 3 sizes, 6 grounds, quarter turns, up to 6 objects that may
    overlap; 20 of 100 pairs held out, of every shape and every colour two, and one relation and one count of
    each pair. Centres keep to every fourth pixel, as in the first world.
    """
    shapes, colours, relations = tuple(Shape), tuple(Colour), tuple(Relation)
    every = [(i, j, (shape, colour)) for i, shape in enumerate(shapes) for j, colour in enumerate(colours)]
    return World(
        shapes=shapes,
        colours=colours,
        sizes=tuple(Size),
        grounds=tuple(Ground),
        max_things=6,
        side=64,
        cells=16,
        rotations=(0.0, math.pi / 2, math.pi, 3 * math.pi / 2),
        overlap=0.3,
        held_out=frozenset(pair for i, j, pair in every if (j - 3 * i) % 5 == 0),
        held_out_relations=frozenset((pair, relations[(i + j) % 4]) for i, j, pair in every),
        held_out_counts=frozenset((pair, 2 + (i + 2 * j) % 5) for i, j, pair in every),
    )


WORLDS: dict[str, Callable[[], World]] = {"nano": nano_world, "full": full_world}
"""The worlds by the names that models' configurations use."""
