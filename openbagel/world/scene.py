"""Scenes as data: coloured shapes on a coloured ground, and the world that says which of them exist.

Coordinates are fractions of the picture's side, x to the right and y down. Nothing here knows about pixels.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Pair = tuple["Shape", "Colour"]


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    CROSS = "cross"
    STAR = "star"
    RING = "ring"
    HEART = "heart"
    DIAMOND = "diamond"


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"
    YELLOW = "yellow"
    PURPLE = "purple"
    CYAN = "cyan"
    ORANGE = "orange"
    PINK = "pink"


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Ground(StrEnum):
    WHITE = "white"
    BLACK = "black"
    GREY = "grey"
    NAVY = "navy"
    BEIGE = "beige"


COLOUR_RGB: dict[Colour, tuple[int, int, int]] = {
    Colour.RED: (220, 35, 40),
    Colour.GREEN: (35, 165, 60),
    Colour.BLUE: (40, 80, 225),
    Colour.YELLOW: (245, 215, 40),
    Colour.PURPLE: (145, 45, 185),
    Colour.CYAN: (50, 210, 225),
    Colour.ORANGE: (250, 135, 25),
    Colour.PINK: (250, 135, 195),
}
GROUND_RGB: dict[Ground, tuple[int, int, int]] = {
    Ground.WHITE: (255, 255, 255),
    Ground.BLACK: (0, 0, 0),
    Ground.GREY: (128, 128, 128),
    Ground.NAVY: (15, 20, 80),
    Ground.BEIGE: (235, 220, 185),
}
RADIUS: dict[Size, float] = {Size.SMALL: 0.12, Size.MEDIUM: 0.155, Size.LARGE: 0.19}
"""Nominal radius of an object, as a fraction of the picture's side."""

HALF_BOX: dict[Shape, tuple[float, float]] = {
    Shape.CIRCLE: (1.0, 1.0),
    Shape.SQUARE: (0.88, 0.88),
    Shape.TRIANGLE: (1.0, 0.87),
    Shape.CROSS: (1.0, 1.0),
    Shape.STAR: (1.05, 1.0),
    Shape.RING: (1.0, 1.0),
    Shape.HEART: (1.0, 0.87),
    Shape.DIAMOND: (0.7, 1.1),
}
"""Half the width and height of each unrotated shape, in radii; an object's centre is its box's centre."""

MARGIN = 0.02
GAP = 0.04
_PLACEMENT_ROUNDS = 200
_TRIES_PER_OBJECT = 12


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. `x`, `y` is its centre in [0, 1]; `rotation` is in radians, clockwise as seen."""

    shape: Shape
    colour: Colour
    size: Size
    x: float
    y: float
    rotation: float = 0.0

    @property
    def radius(self) -> float:
        return RADIUS[self.size]

    @property
    def pair(self) -> Pair:
        return self.shape, self.colour

    def half_box(self) -> tuple[float, float]:
        """Half width and height of a box around the object, in fractions of the side; tight if unrotated."""
        width, height = HALF_BOX[self.shape]
        cos, sin = abs(math.cos(self.rotation)), abs(math.sin(self.rotation))
        return self.radius * (width * cos + height * sin), self.radius * (width * sin + height * cos)


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as data. Later things lie on top of earlier ones."""

    ground: Ground
    things: tuple[Thing, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """What an object looks like, without a place."""

    shape: Shape
    colour: Colour
    size: Size

    def at(self, x: float, y: float, *, rotation: float = 0.0) -> Thing:
        return Thing(self.shape, self.colour, self.size, x, y, rotation)


@dataclass(frozen=True, slots=True)
class World:
    """Which scenes exist.

    `held_out` pairs of shape and colour never occur in scenes sampled for training; `side` is the side of a
    picture in pixels; with `cells`, centres lie on multiples of 1/cells, else anywhere. Every random choice
    comes from the `random.Random` that is passed in.
    """

    shapes: tuple[Shape, ...]
    colours: tuple[Colour, ...]
    sizes: tuple[Size, ...]
    grounds: tuple[Ground, ...]
    max_things: int
    side: int
    held_out: frozenset[Pair] = field(default_factory=frozenset)
    cells: int | None = None

    def __post_init__(self) -> None:
        seen = self.pairs(held_out=False)
        lost = [s for s in self.shapes if s not in {p[0] for p in seen}]
        lost += [c for c in self.colours if c not in {p[1] for p in seen}]
        if lost:
            raise ValueError(
                f"held-out pairs leave nothing to train on for {', '.join(lost)}; hold out fewer pairs"
            )

    def pairs(self, *, held_out: bool) -> list[Pair]:
        """The shape-colour pairs of one kind (held out, or free to train on), in a fixed order."""
        every = [(shape, colour) for shape in self.shapes for colour in self.colours]
        return [pair for pair in every if (pair in self.held_out) == held_out]

    def sample_look(self, rng: random.Random, *, held_out: bool = False) -> Look:
        """A random object's look; from the held-out pairs, or never from them."""
        shape, colour = rng.choice(self.pairs(held_out=held_out))
        return Look(shape, colour, rng.choice(self.sizes))

    def sample_scene(self, rng: random.Random, count: int, *, held_out: bool = False) -> Scene:
        """A scene of `count` objects that keep a gap between them and a margin to the border.

        With `held_out` one object is a held-out pair; without, none is. Raises ValueError when so many
        objects cannot be placed.
        """
        looks = [self.sample_look(rng, held_out=held_out and i == 0) for i in range(count)]
        rng.shuffle(looks)
        return self.place(rng, looks)

    def place(self, rng: random.Random, looks: Sequence[Look], *, ground: Ground | None = None) -> Scene:
        """A scene that shows `looks` in this order at random free places, on `ground` or a random one."""
        chosen = ground or rng.choice(self.grounds)
        for _ in range(_PLACEMENT_ROUNDS):
            things: list[Thing] = []
            for look in looks:
                thing = find_place(rng, look, things, cells=self.cells)
                if thing is None:
                    break
                things.append(thing)
            else:
                return Scene(chosen, tuple(things))
        return Scene(chosen, _on_grid(looks))


def find_place(
    rng: random.Random, look: Look, others: Sequence[Thing], *, cells: int | None = None
) -> Thing | None:
    """`look` at a random place inside the picture and apart from `others`, or None if no try found one.

    With `cells` its centre lies on a multiple of 1/cells.
    """
    half_width, half_height = look.at(0.5, 0.5).half_box()
    for _ in range(_TRIES_PER_OBJECT):
        x, y = (_coordinate(rng, half + MARGIN, cells) for half in (half_width, half_height))
        thing = look.at(x, y)
        if all(apart(thing, other) for other in others):
            return thing
    return None


def _coordinate(rng: random.Random, lowest: float, cells: int | None) -> float:
    if cells is None:
        return round(rng.uniform(lowest, 1 - lowest), 4)
    return rng.randint(math.ceil(lowest * cells), math.floor((1 - lowest) * cells)) / cells


def apart(a: Thing, b: Thing) -> bool:
    """Whether a strip of background as wide as `GAP` surely separates the boxes of two objects."""
    (a_width, a_height), (b_width, b_height) = a.half_box(), b.half_box()
    return abs(a.x - b.x) >= a_width + b_width + GAP or abs(a.y - b.y) >= a_height + b_height + GAP


def inside(thing: Thing) -> bool:
    """Whether an object lies in the picture with the margin to its border (up to rounded coordinates)."""
    half_width, half_height = thing.half_box()
    left, top = half_width + MARGIN - 1e-3, half_height + MARGIN - 1e-3
    return left <= thing.x <= 1 - left and top <= thing.y <= 1 - top


def _on_grid(looks: Sequence[Look]) -> tuple[Thing, ...]:
    """The last resort of `World.place`: one object in each cell of a square grid."""
    cells = math.ceil(math.sqrt(len(looks)))
    things = [look.at((i % cells + 0.5) / cells, (i // cells + 0.5) / cells) for i, look in enumerate(looks)]
    clash = any(not apart(a, b) for i, a in enumerate(things) for b in things[:i])
    if clash or not all(inside(thing) for thing in things):
        sizes = ", ".join(look.size for look in looks)
        raise ValueError(
            f"{len(looks)} objects ({sizes}) do not fit into one picture; ask for fewer or smaller ones"
        )
    return tuple(things)


def nano_world() -> World:
    """The first world: 4 shapes, 6 colours, 2 sizes, 3 grounds, up to 3 objects, 5 of 24 pairs held out.

    Centres keep to every fourth pixel: that brings the world within reach of hours on a CPU.
    """
    return World(
        shapes=(Shape.CIRCLE, Shape.SQUARE, Shape.TRIANGLE, Shape.CROSS),
        colours=(Colour.RED, Colour.GREEN, Colour.BLUE, Colour.YELLOW, Colour.PURPLE, Colour.CYAN),
        sizes=(Size.SMALL, Size.LARGE),
        grounds=(Ground.WHITE, Ground.GREY, Ground.BLACK),
        max_things=3,
        side=64,
        cells=16,
        held_out=frozenset(
            {
                (Shape.CIRCLE, Colour.PURPLE),
                (Shape.SQUARE, Colour.YELLOW),
                (Shape.TRIANGLE, Colour.BLUE),
                (Shape.CROSS, Colour.RED),
                (Shape.CROSS, Colour.CYAN),
            }
        ),
    )
