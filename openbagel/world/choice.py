"""Choosing what a picture shows. What is held out comes only where it is asked for."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from openbagel.world.language import Phrase, Relation
from openbagel.world.scene import Look, Scene, Thing, World

Fits = Callable[[Look], bool]


@lru_cache(maxsize=8)
def _free_looks(world: World) -> list[Look]:
    return [Look(*pair, size) for pair in world.pairs(held_out=False) for size in world.sizes]


def sample_looks(
    world: World, rng: random.Random, count: int, fits: Fits, *, also: Look | None = None
) -> list[Look]:
    """`count` looks, not held out (except the pair of `also`), that fit."""
    looks = _free_looks(world)
    if also is not None and (also.shape, also.colour) in world.held_out:
        looks = [*looks, *(replace(also, size=size) for size in world.sizes)]
    return rng.choices([look for look in looks if fits(look)], k=count)


def some_others(world: World, rng: random.Random, fits: Fits, *, least: int = 0) -> list[Look]:
    """From `least` to so many looks that fit that one more object has room in the world's pictures."""
    return sample_looks(world, rng, rng.randint(least, world.max_things - 1), fits)


def different_looks(world: World, rng: random.Random, count: int, *, held_out: bool) -> list[Look]:
    """`count` looks in random order whose pairs all differ; with `held_out` one of them is held out."""
    pairs = rng.sample(world.pairs(held_out=False), count)
    if held_out:
        pairs[0] = rng.choice(world.pairs(held_out=True))
    return [Look(*pair, rng.choice(world.sizes)) for pair in rng.sample(pairs, count)]


def fitting_sizes(world: World, looks: Iterable[Look]) -> list[Look]:
    """The looks; where there are many, with a size that has room."""
    looks = list(looks)
    sizes = world.sizes_for(len(looks))
    return [look if look.size in sizes else replace(look, size=sizes[0]) for look in looks]


def place(world: World, rng: random.Random, looks: Iterable[Look], *, overlaps: bool = True) -> Scene:
    """A scene that shows `looks` in this order, all with a size that has room."""
    return world.place(rng, fitting_sizes(world, looks), overlaps=overlaps)


def shuffled(world: World, rng: random.Random, looks: Sequence[Look]) -> Scene:
    return place(world, rng, rng.sample(looks, len(looks)))


def place_related(
    world: World, rng: random.Random, looks: Sequence[Look], *, held_out: bool = False
) -> tuple[Scene, Relation]:
    """A scene of two looks, and a word of one kind for how the first clearly lies to the second."""
    while True:
        scene = place(world, rng, looks)
        if relations := clear_relations(world, *scene.things, held_out=held_out):
            return scene, rng.choice(relations)


def clear_relations(world: World, a: Thing, b: Thing, *, held_out: bool = False) -> list[Relation]:
    """The words of one kind (held out, or free to train on) for how `a` clearly lies to `b`."""
    words = world.relations(a.pair, b.pair, held_out=held_out)
    return [relation for relation in Relation if relation in words and relation.holds(a, b)]


def roomy(world: World) -> int:
    """So many objects of any size have room in a picture."""
    return max(count for count in range(1, world.max_things + 1) if world.sizes_for(count) == world.sizes)


def other_axis(rng: random.Random, held_out: bool, others: frozenset[object]) -> bool:
    """Whether a held-out relation or count, of `others`, takes the place of a held-out pair."""
    return held_out and bool(others) and rng.random() < 1 / 2


@dataclass(frozen=True, slots=True)
class Rivals:
    """Two descriptions that no object fits both of, and looks of which `first` and `second` fit them."""

    a: Phrase
    b: Phrase
    looks: list[Look]
    first: int
    second: int


Wanted = Callable[[int, int], bool]


def rivals(
    world: World, rng: random.Random, held_out: bool, *, most: int, wanted: Wanted = lambda m, n: True
) -> Rivals:
    """Rivals, `most` in all, whose numbers are as `wanted`. There is at least one of `a`, and a held-out one
    if that is asked for.
    """
    look = world.sample_look(rng, held_out=held_out)
    (other,) = sample_looks(world, rng, 1, lambda o: o.shape != look.shape and o.colour != look.colour)
    by_shape, by_colour = rng.choice(((True, False), (False, True), (True, True)))
    a, b = (Phrase(o.shape if by_shape else None, o.colour if by_colour else None) for o in (look, other))
    counts = [(m, n) for m in range(1, most + 1) for n in range(most + 1 - m)]
    m, n = rng.choice([pair for pair in counts if wanted(*pair)])
    looks = [look, *sample_looks(world, rng, m - 1, a.matches, also=look)]
    looks += sample_looks(world, rng, n, b.matches)
    room = rng.randint(0, most - m - n)
    looks += sample_looks(world, rng, room, lambda o: not (a.matches(o) or b.matches(o)))
    return Rivals(a, b, looks, m, n)


def unlike(look: Look | Thing) -> Fits:
    """Whether another look has a different pair of shape and colour."""
    return lambda other: (other.shape, other.colour) != (look.shape, look.colour)


def misses(phrase: Phrase, look: Look) -> int:
    """In how many of the mentioned attributes an object differs."""
    wanted = ((phrase.shape, look.shape), (phrase.colour, look.colour), (phrase.size, look.size))
    return sum(word is not None and word != seen for word, seen in wanted)
