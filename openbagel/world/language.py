"""The language of the world: a small, regular English in lower case, with a closed vocabulary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openbagel.world.scene import Colour, Ground, Look, Scene, Shape, Size, Thing

NUMBERS = tuple("zero one two three four five six seven eight nine ten eleven twelve".split())
PLACE_SLACK = 0.08
"""How far, in fractions of the side, an object may lie outside of the place that was named."""


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
    def of(cls, look: Look, *, with_size: bool = True, count: int = 1) -> "Phrase":
        return cls(look.shape, look.colour, look.size if with_size else None, count)

    def misses(self, look: Look) -> int:
        """In how many of the mentioned attributes an object differs, its place aside."""
        words, seen = (self.shape, self.colour, self.size), (look.shape, look.colour, look.size)
        return sum(word not in (None, one) for word, one in zip(words, seen, strict=True))

    def matches(self, look: Look) -> bool:
        """Whether an object has every attribute that is mentioned; the place counts for a thing only."""
        if self.misses(look):
            return False
        return self.place is None or not isinstance(look, Thing) or self.place in places(look)

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


def places(thing: Thing) -> set[str]:
    """The names of the cells in which an object lies, or at most `PLACE_SLACK` outside of which."""
    steps = (-PLACE_SLACK, 0.0, PLACE_SLACK)
    return {place_name(thing.x + dx, thing.y + dy) for dx in steps for dy in steps}


def caption(scene: Scene) -> str:
    """The canonical description: the objects from left to right (equal looks together), then the ground."""
    counts = Counter(thing.look for thing in reading_order(scene.things))
    return listed([Phrase.of(look, count=count) for look, count in counts.items()], scene.ground)


def layout(scene: Scene) -> str:
    """A plan of the picture: every object from left to right with its place, then the ground."""
    return listed(map(placed, reading_order(scene.things)), scene.ground)


def listed(phrases: Iterable[Phrase], ground: Ground | None = None) -> str:
    """ "a red circle and two squares on a white ground"."""
    words = enumerate_words([phrase.indefinite() for phrase in phrases])
    return f"{words} {on_ground(ground)}" if ground else words


def placed(thing: Thing) -> Phrase:
    """All that words say of an object."""
    return Phrase(thing.shape, thing.colour, thing.size, place=place_name(thing.x, thing.y))


def reading_order(things: Iterable[Thing]) -> list[Thing]:
    """From left to right, and from top to bottom where that is equal."""
    return sorted(things, key=lambda thing: (thing.x, thing.y))
