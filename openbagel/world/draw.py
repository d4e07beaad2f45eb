"""Prompts to draw: the six kinds of GenEval, and long descriptions of everything."""

import random
from collections.abc import Sequence
from dataclasses import replace

from openbagel.world.choice import different_looks, other_axis, place, place_related
from openbagel.world.exercise import Draws, Example, Said, Spec, Task, Thinks
from openbagel.world.language import Phrase, enumerate_words, layout, on_ground, placed
from openbagel.world.scene import Look, Scene, World


def drawing(kind: str, prompt: str, target: Scene, spec: Spec) -> Example:
    """The thought is the plan of the picture."""
    return Example(kind, (Said(prompt), Thinks(layout(target)), Draws(target, spec)))


def draw_one(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle", "a small red circle on a black ground"."""
    look = world.sample_look(rng, held_out=held_out)
    phrase = Phrase.of(look, with_size=rng.random() < 1 / 2)
    return _drawing("draw_one", world, rng, looks=[look], phrases=[phrase])


def draw_two(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle and a blue square", "a red circle left of a blue square"."""
    looks = different_looks(world, rng, 2, held_out=held_out)
    with_size = rng.random() < 1 / 4
    phrases = [Phrase.of(look, with_size=with_size) for look in looks]
    if rng.random() < 1 / 2:
        return _related("draw_two", world, rng, looks=looks, phrases=phrases)
    return _drawing("draw_two", world, rng, looks=looks, phrases=phrases)


def draw_three(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle, a blue square and a green cross"."""
    looks = different_looks(world, rng, 3, held_out=held_out)
    phrases = [Phrase.of(look, with_size=False) for look in looks]
    return _drawing("draw_three", world, rng, looks=looks, phrases=phrases)


def draw_count(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "three red circles", "two small blue squares"."""
    by_count = other_axis(rng, held_out, world.held_out_counts)
    look = world.sample_look(rng, held_out=held_out and not by_count)
    count = rng.choice([n for n in world.counts((look.shape, look.colour), held_out=by_count) if n > 1])
    if look.size not in world.sizes_for(count):
        look = replace(look, size=rng.choice(world.sizes_for(count)))
    phrase = Phrase.of(look, with_size=rng.random() < 1 / 2, count=count)
    return _drawing("draw_count", world, rng, looks=[look] * count, phrases=[phrase])


def draw_colour(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle", "a red object"."""
    look = world.sample_look(rng, held_out=held_out)
    phrase = Phrase(None if rng.random() < 1 / 4 and not held_out else look.shape, look.colour)
    return _drawing("draw_colour", world, rng, looks=[look], phrases=[phrase])


def draw_position(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle left of a blue square", "a circle above a square"."""
    by_relation = other_axis(rng, held_out, world.held_out_relations)
    looks = _unlike_looks(world, rng, held_out=held_out and not by_relation)
    plain = rng.random() < 1 / 2 and not held_out
    phrases = [Phrase(look.shape) if plain else Phrase.of(look, with_size=False) for look in looks]
    return _related("draw_position", world, rng, looks=looks, phrases=phrases, held_out=by_relation)


def draw_attribute(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a small red circle and a large blue square": two shapes in two colours."""
    looks = _unlike_looks(world, rng, held_out=held_out)
    with_size = rng.random() < 1 / 2
    phrases = [Phrase.of(look, with_size=with_size) for look in looks]
    return _drawing("draw_attribute", world, rng, looks=looks, phrases=phrases)


def draw_dense(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "on a white ground: a small red circle at the top left and …": everything, in any order."""
    most = world.max_things
    target = world.sample_scene(rng, rng.randint((most + 1) // 2, most), held_out=held_out)
    phrases = tuple(placed(thing) for thing in rng.sample(target.things, len(target.things)))
    words = enumerate_words([phrase.indefinite() for phrase in phrases])
    spec = Spec(phrases, ground=target.ground)
    return drawing("draw_dense", f"{on_ground(target.ground)}: {words}", target, spec)


DRAW: dict[str, Task] = {
    task.__name__: task
    for task in (
        draw_one,
        draw_two,
        draw_three,
        draw_count,
        draw_colour,
        draw_position,
        draw_attribute,
        draw_dense,
    )
}


def _unlike_looks(world: World, rng: random.Random, *, held_out: bool) -> list[Look]:
    """Two looks of different shapes and colours."""
    while True:
        a, b = different_looks(world, rng, 2, held_out=held_out)
        if a.shape != b.shape and a.colour != b.colour:
            return [a, b]


def _drawing(
    kind: str, world: World, rng: random.Random, *, looks: Sequence[Look], phrases: Sequence[Phrase]
) -> Example:
    """A prompt that names all phrases."""
    words = enumerate_words([phrase.indefinite() for phrase in phrases])
    return _on_some_ground(kind, rng, words, place(world, rng, looks), Spec(tuple(phrases)))


def _related(
    kind: str,
    world: World,
    rng: random.Random,
    *,
    looks: Sequence[Look],
    phrases: Sequence[Phrase],
    held_out: bool = False,
) -> Example:
    """A prompt of two phrases and their relation, which is held out or not."""
    target, relation = place_related(world, rng, looks, held_out=held_out)
    words = f"{phrases[0].indefinite()} {relation} {phrases[1].indefinite()}"
    return _on_some_ground(kind, rng, words, target, Spec(tuple(phrases), ((0, relation, 1),)))


def _on_some_ground(kind: str, rng: random.Random, words: str, target: Scene, spec: Spec) -> Example:
    """One time in three the prompt names the ground."""
    if rng.random() < 1 / 3:
        words, spec = f"{words} {on_ground(target.ground)}", replace(spec, ground=target.ground)
    return drawing(kind, words, target, spec)
