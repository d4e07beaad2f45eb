"""The language of the world: a small, regular English in lower case, with a closed vocabulary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from openbagel.world.scene import RELATIONS, Colour, Ground, Look, Scene, Shape, Size, Thing

NUMBERS = tuple("zero one two three four five six seven eight nine ten eleven twelve".split())
CLEAR = 0.2
"""Prompts and questions use a relation only where the centres differ by this fraction of the side or more."""
PLACE_SLACK = 0.08
"""How far, in fractions of the side, an object may lie outside of the place that was named."""
CORNERS: dict[Shape, int] = {
    Shape.CIRCLE: 0,
    Shape.RING: 0,
    Shape.HEART: 2,
    Shape.MOON: 2,
    Shape.TRIANGLE: 3,
    Shape.SQUARE: 4,
    Shape.DIAMOND: 4,
    Shape.ARROW: 7,
    Shape.STAR: 10,
    Shape.CROSS: 12,
}
"""How many corners the outline of each shape has, those that point inwards too."""


class Relation(StrEnum):
    LEFT = "left of"
    RIGHT = "right of"
    ABOVE = "above"
    BELOW = "below"

    @property
    def opposite(self) -> "Relation":
        return Relation(RELATIONS[self])

    def holds(self, a: Thing, b: Thing, *, margin: float = CLEAR) -> bool:
        """Whether `a` is on this side of `b`: their centres differ by at least `margin` along the axis."""
        dx, dy = a.x - b.x, a.y - b.y
        shift = {Relation.LEFT: -dx, Relation.RIGHT: dx, Relation.ABOVE: -dy, Relation.BELOW: dy}[self]
        return shift >= margin


@dataclass(frozen=True, slots=True)
class Phrase:
    """A description of `count` objects; an attribute that is None is not mentioned, so anything goes.

    `place` is one of the nine names of `place_name`.
    """

    shape: Shape | None = None
    colour: Colour | None = None
    size: Size | None = None
    count: int = 1
    place: str | None = None

    @classmethod
    def of(cls, look: Look | Thing, *, with_size: bool = True, count: int = 1) -> "Phrase":
        return cls(look.shape, look.colour, look.size if with_size else None, count)

    def matches(self, look: Look | Thing) -> bool:
        """Whether an object has every attribute that is mentioned; the place counts for a thing only."""
        return (
            self.shape in (None, look.shape)
            and self.colour in (None, look.colour)
            and self.size in (None, look.size)
            and (self.place is None or isinstance(look, Look) or near_place(look, self.place))
        )

    def noun(self, *, plural: bool = False) -> str:
        """Without an article: "small red circle", "red objects"."""
        head: str = self.shape or "object"
        if plural:
            head += "es" if head.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.colour, head) if word)

    def indefinite(self) -> str:
        """A noun phrase: "a red circle", "an object", "two small squares", "a circle at the top left"."""
        where = f" at the {self.place}" if self.place else ""
        noun = self.noun(plural=self.count != 1)
        article = NUMBERS[self.count] if self.count != 1 else "an" if noun[0] in "aeiou" else "a"
        return f"{article} {noun}{where}"

    def definite(self) -> str:
        """For the only object of its kind: "the red circle"."""
        return f"the {self.noun()}"


def enumerate_words(parts: Sequence[str], last: str = "and") -> str:
    """Join by commas and a last "and": "x", "x and y", "x, y and z"."""
    return f" {last} ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def on_ground(ground: Ground) -> str:
    return f"on a {ground} ground"


def place_name(x: float, y: float) -> str:
    """The cell of a 3 × 3 grid in words: "top left", "top", …, "centre", …, "bottom right"."""
    row = ("top", "", "bottom")[min(int(y * 3), 2)]
    column = ("left", "", "right")[min(int(x * 3), 2)]
    return " ".join(filter(None, (row, column))) or "centre"


def near_place(thing: Thing, place: str) -> bool:
    """Whether an object lies in the cell of that name, or at most `PLACE_SLACK` outside of it."""
    steps = (-PLACE_SLACK, 0.0, PLACE_SLACK)
    return any(place_name(thing.x + dx, thing.y + dy) == place for dx in steps for dy in steps)


def caption(scene: Scene) -> str:
    """The canonical description: the objects from left to right (equal looks together), then the ground."""
    counts = Counter(Look(thing.shape, thing.colour, thing.size) for thing in reading_order(scene.things))
    parts = [Phrase.of(look, count=count).indefinite() for look, count in counts.items()]
    return f"{enumerate_words(parts)} {on_ground(scene.ground)}"


def layout(scene: Scene) -> str:
    """A plan of the picture: every object from left to right with its place, then the ground."""
    parts = [placed(thing).indefinite() for thing in reading_order(scene.things)]
    return f"{enumerate_words(parts)} {on_ground(scene.ground)}"


def placed(thing: Thing) -> Phrase:
    """All that words say of an object."""
    return Phrase(thing.shape, thing.colour, thing.size, place=place_name(thing.x, thing.y))


def reading_order(things: Iterable[Thing]) -> list[Thing]:
    """From left to right, and from top to bottom where that is equal."""
    return sorted(things, key=lambda thing: (thing.x, thing.y))
