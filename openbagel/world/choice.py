"""Choosing what an example shows. What is held out comes only where it is asked for."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

from openbagel.world.language import Phrase
from openbagel.world.scene import Colour, Look, Pair, Scene, World

P = ParamSpec("P")
T = TypeVar("T")
Fits = Callable[[Look], object]


class Impossible(Exception):
    """Chance has led to where there is no choice left: what is being made is begun anew."""


def require(value: T | None) -> T:
    """What must not be false, empty or None."""
    if not value:
        raise Impossible
    return value


def again(make: Callable[P, T]) -> Callable[P, T]:
    """A function that is called until it is possible."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> T:
        while True:
            with suppress(Impossible):
                return make(*args, **options)

    return made


@dataclass(frozen=True, slots=True)
class Choice:
    """Random choices for one example; with `held_out` something held out is in its decisive place, else
    nowhere.
    """

    world: World
    rng: random.Random
    held_out: bool = False

    def free(self) -> "Choice":
        """The same, with nothing held out."""
        return replace(self, held_out=False)

    def axes(self, others: frozenset[object]) -> tuple["Choice", "Choice"]:
        """A choice of pairs and one of relations or counts, where `others` are held out: if anything is to be
        held out, it is either the one or the other.
        """
        other = self.held_out and bool(others) and self.chance(1 / 2)
        return replace(self, held_out=self.held_out and not other), replace(self, held_out=other)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options: Sequence[T]) -> T:
        """One of these."""
        return self.rng.choice(require(options))

    def look(self, count: int = 1) -> Look:
        """That of one of `count` objects."""
        return self.world.sample_look(self.rng, held_out=self.held_out, count=count)

    def looks(self, count: int, fits: Fits, *, also: Look | None = None) -> list[Look]:
        """`count` looks, not held out (except the pair of `also`), that fit."""
        looks = _free_looks(self.world)
        if also and also.pair in self.world.held_out:
            looks = [*looks, *(replace(also, size=size) for size in self.world.sizes)]
        return self.rng.choices([look for look in looks if fits(look)], k=count)

    def others(self, fits: Fits, *, least: int = 0) -> list[Look]:
        """From `least` to so many looks that fit that one more object has room in the world's pictures."""
        return self.looks(self.rng.randint(least, self.world.max_things - 1), fits)

    def scene(self, least: int = 1) -> Scene:
        """Of from `least` to as many objects as a picture has in this world."""
        count = self.rng.randint(least, self.world.max_things)
        return self.world.sample_scene(self.rng, count, held_out=self.held_out)

    def different_pairs(self, count: int) -> list[Pair]:
        """The first held out, if that is asked for."""
        pairs = self.rng.sample(self.world.pairs(held_out=False), count)
        return [self.rng.choice(self.world.pairs(held_out=True)), *pairs[1:]] if self.held_out else pairs

    def different_looks(self, count: int) -> list[Look]:
        """`count` looks in random order whose pairs all differ."""
        pairs = self.rng.sample(self.different_pairs(count), count)
        return [Look(*pair, self.rng.choice(self.world.sizes)) for pair in pairs]

    def rivals(self, most: int, wanted: Callable[[int, int], bool]) -> tuple[Phrase, Phrase, list[Look]]:
        """Two descriptions with their counts, at least one and none, that no object fits both of, and `most`
        looks or fewer, of which so many fit them. The counts are as `wanted`.
        """
        look = self.look()
        (other,) = self.looks(1, lambda one: one.shape != look.shape and one.colour != look.colour)
        by_shape, by_colour = self.rng.choice(((True, False), (False, True), (True, True)))
        counts = [(m, n) for m in range(1, most + 1) for n in range(most + 1 - m) if wanted(m, n)]
        a, b = (Phrase(o.shape if by_shape else None, o.colour if by_colour else None) for o in (look, other))
        a, b = (replace(one, count=count) for one, count in zip((a, b), self.pick(counts), strict=True))
        looks = [look, *self.looks(a.count - 1, a.matches, also=look), *self.looks(b.count, b.matches)]
        room = self.rng.randint(0, most - len(looks))
        return a, b, looks + self.looks(room, lambda one: not (a.matches(one) or b.matches(one)))

    def colours(self, look: Look) -> list[Colour]:
        """The other ones that its shape may have."""
        pairs = self.world.pairs(held_out=self.held_out)
        return [colour for shape, colour in pairs if shape == look.shape and colour != look.colour]

    @property
    def roomy(self) -> int:
        """So many objects of any size have room in a picture."""
        every = range(1, self.world.max_things + 1)
        return max(count for count in every if self.world.sizes_for(count) == self.world.sizes)

    def fitted(self, looks: Sequence[Look]) -> list[Look]:
        """The looks; where there are many, with a size that has room."""
        sizes = self.world.sizes_for(len(looks))
        return [look if look.size in sizes else replace(look, size=sizes[0]) for look in looks]

    def place(self, looks: Sequence[Look]) -> Scene:
        """A scene that shows `looks` in this order, all with a size that has room."""
        return self.world.place(self.rng, self.fitted(looks))

    def shuffled(self, looks: Sequence[Look]) -> Scene:
        return self.place(self.rng.sample(looks, len(looks)))


@lru_cache(maxsize=8)
def _free_looks(world: World) -> list[Look]:
    return [Look(*pair, size) for pair in world.pairs(held_out=False) for size in world.sizes]
