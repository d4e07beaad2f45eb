"""Questions about pictures, each with the one true answer."""

import random
from dataclasses import replace

from openbagel.world.choice import (
    different_looks,
    misses,
    other_axis,
    place,
    rivals,
    roomy,
    sample_looks,
    shuffled,
    some_others,
)
from openbagel.world.edit import ask_change
from openbagel.world.exercise import Example, Said, Shown, Task, Thinks, Writes
from openbagel.world.language import NUMBERS, Phrase, Relation, caption, layout
from openbagel.world.scene import Scene, World


def asking(kind: str, question: str, answer: str, scene: Scene) -> Example:
    """The thought is what the picture shows."""
    return Example(kind, (Shown(scene), Said(question), Thinks(layout(scene)), Writes(str(answer))))


def ask_count(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "how many red objects are there?", with answers from zero on."""
    by_count = other_axis(rng, held_out, world.held_out_counts)
    look = world.sample_look(rng, held_out=held_out and not by_count)
    pair = Phrase.of(look, with_size=False)
    asked = [Phrase(look.shape), Phrase(colour=look.colour), pair]
    phrase = pair if by_count else rng.choice(asked if held_out else [Phrase(), *asked])
    free = phrase != Phrase() and not held_out
    count = rng.randint(0 if free else 1, world.max_things)
    if by_count:
        (count,) = world.counts((look.shape, look.colour), held_out=True)
    matching = [look, *sample_looks(world, rng, world.max_things, phrase.matches, also=look)][:count]
    room = 0 if phrase == Phrase() else world.max_things - count
    others = sample_looks(
        world, rng, rng.randint(int(count == 0), room), lambda other: not phrase.matches(other)
    )
    question = f"how many {phrase.noun(plural=True)} are there?"
    return asking("ask_count", question, NUMBERS[count], shuffled(world, rng, [*matching, *others]))


def ask_colour(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "what colour is the square?" of a picture with one square."""
    look = world.sample_look(rng, held_out=held_out)
    others = some_others(world, rng, lambda other: other.shape != look.shape)
    question = f"what colour is {Phrase(look.shape).definite()}?"
    return asking("ask_colour", question, look.colour, shuffled(world, rng, [look, *others]))


def ask_shape(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "what shape is the red object?" of a picture with one red object."""
    look = world.sample_look(rng, held_out=held_out)
    others = some_others(world, rng, lambda other: other.colour != look.colour)
    question = f"what shape is {Phrase(colour=look.colour).definite()}?"
    return asking("ask_shape", question, look.shape, shuffled(world, rng, [look, *others]))


def ask_exists(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "is there a red circle?"; where there is none, there is something that differs in one attribute."""
    look = world.sample_look(rng, held_out=held_out)
    full, pair = Phrase.of(look), Phrase.of(look, with_size=False)
    loose = [Phrase(look.shape), Phrase(colour=look.colour)]
    phrase = rng.choice([full, pair] if held_out else [full, pair, *loose])
    there = rng.random() < 1 / 2
    count = rng.randint(1, roomy(world) if phrase.size else world.max_things)
    others = sample_looks(world, rng, count, lambda other: not phrase.matches(other))
    near = sample_looks(world, rng, 1, lambda other: misses(phrase, other) == 1)
    shown = (
        [look, *near, *others] if there and rng.random() < 1 / 2 else [*([look] if there else near), *others]
    )
    question = f"is there {phrase.indefinite()}?"
    return asking("ask_exists", question, "yes" if there else "no", shuffled(world, rng, shown[:count]))


def ask_relation(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "is the red circle left of the blue square?", where it clearly is, or clearly is the opposite."""
    by_relation = other_axis(rng, held_out, world.held_out_relations)
    by_pair = held_out and not by_relation
    while True:
        looks = different_looks(world, rng, rng.randint(2, world.max_things), held_out=by_pair)
        scene = place(world, rng, looks)
        first, second = rng.sample(scene.things, 2)
        if by_pair and not {first.pair, second.pair} & world.held_out:
            first = next(thing for thing in scene.things if thing.pair in world.held_out)
        if not (relations := [r for r in Relation if r.holds(first, second)]):
            continue
        relation = rng.choice(relations)
        true = rng.random() < 1 / 2
        said = relation if true else relation.opposite
        if said in world.relations(first.pair, second.pair, held_out=by_relation):
            break
    a, b = (Phrase.of(thing, with_size=False).definite() for thing in (first, second))
    return asking("ask_relation", f"is {a} {said} {b}?", "yes" if true else "no", scene)


def ask_caption(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "describe the picture."; the answer is the canonical caption."""
    scene = world.sample_scene(rng, rng.randint(1, world.max_things), held_out=held_out)
    return asking("ask_caption", "describe the picture.", caption(scene), scene)


def ask_compare(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "which is larger, the red circle or the blue square?", "are there more circles than squares?"."""
    return (_which_is_larger if rng.random() < 1 / 2 else _are_there_more)(world, rng, held_out)


def _which_is_larger(world: World, rng: random.Random, held_out: bool) -> Example:
    looks = different_looks(world, rng, rng.randint(2, roomy(world)), held_out=held_out)
    looks.sort(key=lambda look: (look.shape, look.colour) not in world.held_out)
    sizes = rng.sample(world.sizes, 2)
    a, b = (replace(look, size=size) for look, size in zip(looks, sizes, strict=False))
    word = rng.choice(("larger", "smaller"))
    first = world.sizes.index(a.size) > world.sizes.index(b.size)
    right, wrong = (a, b) if first == (word == "larger") else (b, a)
    names = {look: Phrase.of(look, with_size=False).definite() for look in rng.sample((right, wrong), 2)}
    question = f"which is {word}, {' or '.join(names.values())}?"
    return asking("ask_compare", question, names[right], shuffled(world, rng, [a, b, *looks[2:]]))


def _are_there_more(world: World, rng: random.Random, held_out: bool) -> Example:
    more, turned = rng.random() < 1 / 2, rng.random() < 1 / 2
    two = rivals(
        world, rng, held_out, most=world.max_things, wanted=lambda m, n: (n > m if turned else m > n) == more
    )
    first, second = (two.b, two.a) if turned else (two.a, two.b)
    question = f"are there more {first.noun(plural=True)} than {second.noun(plural=True)}?"
    return asking("ask_compare", question, "yes" if more else "no", shuffled(world, rng, two.looks))


ASK: dict[str, Task] = {
    task.__name__: task
    for task in (
        ask_count,
        ask_colour,
        ask_shape,
        ask_exists,
        ask_relation,
        ask_caption,
        ask_compare,
        ask_change,
    )
}
