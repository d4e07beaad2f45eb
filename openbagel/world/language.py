"""The language of the world: a small, regular English in lower case, with a closed vocabulary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from openbagel.world.scene import Colour, Ground, Look, Scene, Shape, Size, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CLEAR = 0.2
"""Prompts and questions use a relation only where the centres differ by this fraction of the side or more."""


class Relation(StrEnum):
    LEFT = "left of"
    RIGHT = "right of"
    ABOVE = "above"
    BELOW = "below"

    @property
    def opposite(self) -> "Relation":
        return _OPPOSITES[self]

    def holds(self, a: Thing, b: Thing, *, margin: float = CLEAR) -> bool:
        """Whether `a` is on this side of `b`: their centres differ by at least `margin` along the axis."""
        dx, dy = a.x - b.x, a.y - b.y
        shift = {Relation.LEFT: -dx, Relation.RIGHT: dx, Relation.ABOVE: -dy, Relation.BELOW: dy}[self]
        return shift >= margin


_OPPOSITES = {
    Relation.LEFT: Relation.RIGHT,
    Relation.RIGHT: Relation.LEFT,
    Relation.ABOVE: Relation.BELOW,
    Relation.BELOW: Relation.ABOVE,
}


@dataclass(frozen=True, slots=True)
class Phrase:
    """A description of `count` objects; an attribute that is None is not mentioned, so anything goes."""

    shape: Shape | None = None
    colour: Colour | None = None
    size: Size | None = None
    count: int = 1

    @classmethod
    def of(cls, look: Look | Thing, *, with_size: bool = True, count: int = 1) -> "Phrase":
        return cls(look.shape, look.colour, look.size if with_size else None, count)

    def matches(self, look: Look | Thing) -> bool:
        """Whether an object has every attribute that is mentioned."""
        return (
            self.shape in (None, look.shape)
            and self.colour in (None, look.colour)
            and self.size in (None, look.size)
        )

    def noun(self, *, plural: bool = False) -> str:
        """Without an article: "small red circle", "red objects"."""
        head: str = self.shape or "object"
        if plural:
            head += "es" if head.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.colour, head) if word)

    def indefinite(self) -> str:
        """A noun phrase: "a red circle", "an object", "two small squares"."""
        if self.count != 1:
            return f"{NUMBERS[self.count]} {self.noun(plural=True)}"
        noun = self.noun()
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

    def definite(self) -> str:
        """For the only object of its kind: "the red circle"."""
        return f"the {self.noun()}"


def enumerate_words(parts: Sequence[str]) -> str:
    """Join by commas and a last "and": "x", "x and y", "x, y and z"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def on_ground(ground: Ground) -> str:
    return f"on a {ground} ground"


def place_name(x: float, y: float) -> str:
    """The cell of a 3 × 3 grid in words: "top left", "top", …, "centre", …, "bottom right"."""
    row = ("top", "", "bottom")[min(int(y * 3), 2)]
    column = ("left", "", "right")[min(int(x * 3), 2)]
    return " ".join(filter(None, (row, column))) or "centre"


def caption(scene: Scene) -> str:
    """The canonical description: the objects from left to right (equal looks together), then the ground."""
    counts = Counter(Look(thing.shape, thing.colour, thing.size) for thing in reading_order(scene.things))
    parts = [Phrase.of(look, count=count).indefinite() for look, count in counts.items()]
    return f"{enumerate_words(parts)} {on_ground(scene.ground)}"


def layout(scene: Scene) -> str:
    """A plan of the picture: every object from left to right with its place, then the ground."""
    things = reading_order(scene.things)
    parts = [f"{Phrase.of(thing).indefinite()} at the {place_name(thing.x, thing.y)}" for thing in things]
    return f"{enumerate_words(parts)} {on_ground(scene.ground)}"


def reading_order(things: Iterable[Thing]) -> list[Thing]:
    """From left to right, and from top to bottom where that is equal."""
    return sorted(things, key=lambda thing: (thing.x, thing.y))
