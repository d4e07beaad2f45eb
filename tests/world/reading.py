"""Reads the words of exercises without the code that wrote them."""

import re
from functools import lru_cache

from openbagel.world.exercise import Draws, Example, Said, Shown, Thinks, Writes
from openbagel.world.scene import WORLDS, Colour, Relation, Scene, Shape, Size, Thing
from openbagel.world.tasks import example

WORLD = {name: make() for name, make in WORLDS.items()}
BOTH = ("nano", "full")
_COUNTED = "zero one two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {word: number for number, word in enumerate(_COUNTED)} | {"a": 1, "an": 1}
PLACE = "(?:top |bottom )?(?:left|right)|top|bottom|centre"
RELATION = "|".join(Relation)
NOUN = re.compile(
    rf"(?:(?P<size>{'|'.join(Size)}) )?(?:(?P<colour>{'|'.join(Colour)}) )?"
    rf"(?P<shape>{'|'.join(Shape)}|object)(?:e?s\b)?(?: at the (?P<place>{PLACE}))?"
)
NAME = re.sub(r"\?P<\w+>", "?:", NOUN.pattern)
SAID_RELATION = re.compile(rf"({NAME})(?: is)? ({RELATION}) (?:an?|the) ({NAME})")


@lru_cache(maxsize=256)
def examples(world: str, kind: str, held_out: bool = False, count: int = 80) -> list[Example]:
    return [example(WORLD[world], 3, index, kind, held_out) for index in range(count)]


def said(made: Example) -> list[str]:
    return [step.words for step in made.steps if isinstance(step, Said)]


def written(made: Example) -> list[str]:
    return [step.words for step in made.steps if isinstance(step, Writes)]


def thought(made: Example) -> str:
    return " ".join(step.words for step in made.steps if isinstance(step, Thinks))


def texts(made: Example) -> list[str]:
    return [step.words for step in made.steps if isinstance(step, Said | Thinks | Writes)]


def scene_of(step: Shown | Draws) -> Scene:
    assert isinstance(step.view, Scene)
    return step.view


def shown(made: Example) -> list[Scene]:
    return [scene_of(step) for step in made.steps if isinstance(step, Shown)]


def draws(made: Example) -> list[Draws]:
    return [step for step in made.steps if isinstance(step, Draws)]


def scenes(made: Example) -> list[Scene]:
    return [scene_of(step) for step in made.steps if isinstance(step, Shown | Draws)]


def named(words: str, scene: Scene) -> list[Thing]:
    """The objects of a scene that a noun, in the singular or plural, describes."""
    match = NOUN.fullmatch(words)
    assert match, words
    wanted = {name: word for name, word in match.groupdict().items() if word not in (None, "object")}
    place = wanted.pop("place", None)
    fitting = [t for t in scene.things if all(getattr(t, name) == word for name, word in wanted.items())]
    return [thing for thing in fitting if place is None or cell(thing) == place]


def cell(thing: Thing) -> str:
    across = "left" if thing.x < 1 / 3 else "right" if thing.x >= 2 / 3 else ""
    down = "top" if thing.y < 1 / 3 else "bottom" if thing.y >= 2 / 3 else ""
    return f"{down} {across}".strip() or "centre"


def only(words: str, scene: Scene) -> Thing:
    found = named(words, scene)
    assert len(found) == 1, (words, scene)
    return found[0]


def parts(words: str) -> list[tuple[int, str]]:
    """ "a red circle and two squares": numbers and nouns."""
    pieces = [part.split(" ", 1) for part in re.split(r", | and ", words)]
    return [(NUMBERS[number], noun) for number, noun in pieces]


def distance(a: Thing, relation: str, b: Thing) -> float:
    """How far a is on this side of b."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


def pair_of(words: str) -> tuple[str, str] | None:
    match = NOUN.fullmatch(words)
    assert match, words
    return (match["shape"], match["colour"]) if match["colour"] and match["shape"] != "object" else None


def pairs_said(text: str) -> set[tuple[str, str]]:
    return {pair for match in NOUN.finditer(text) if (pair := pair_of(match[0]))}


def relations_said(text: str) -> set[tuple[tuple[str, str], str]]:
    """What is said of which pair, from both ends."""
    found = set()
    for a, relation, b in SAID_RELATION.findall(text):
        found |= {(pair_of(a), relation), (pair_of(b), Relation(relation).opposite)}
    return {(pair, relation) for pair, relation in found if pair}


def masked(text: str) -> str:
    """With every shape, colour and size the same."""
    return re.sub(rf"\b({'|'.join([*Colour, *Size])})\b", "*", NOUN.sub("*", text))
