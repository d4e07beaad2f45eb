"""Prompts to draw: the six kinds of GenEval, and long descriptions of everything."""

from collections.abc import Sequence
from dataclasses import replace

from openbagel.world.choice import Choice, again, require
from openbagel.world.exercise import Draws, Said, Spec, Steps, Thinks, kinds
from openbagel.world.language import Phrase, layout, listed, on_ground, placed
from openbagel.world.scene import Look, Relation, Scene


def drawing(prompt: str, target: Scene, spec: Spec) -> Steps:
    """The thought is the plan of the picture."""
    return Said(prompt), Thinks(layout(target)), Draws(target, spec)


def draw_one(choose: Choice) -> Steps:
    """Draw "a red circle", "a small red circle on a black ground"."""
    look = choose.look()
    return _named(choose, [look], [Phrase.of(look, with_size=choose.chance(1 / 2))])


def draw_two(choose: Choice) -> Steps:
    """Draw "a red circle and a blue square", "a red circle left of a blue square"."""
    looks, with_size = choose.different_looks(2), choose.chance(1 / 4)
    phrases = [Phrase.of(look, with_size=with_size) for look in looks]
    return _related(choose.free(), looks, phrases) if choose.chance(1 / 2) else _named(choose, looks, phrases)


def draw_three(choose: Choice) -> Steps:
    """Draw "a red circle, a blue square and a green cross"."""
    looks = choose.different_looks(3)
    return _named(choose, looks, [Phrase(*look.pair) for look in looks])


def draw_count(choose: Choice) -> Steps:
    """Draw "three red circles", "two small blue squares"."""
    world, (pairs, counts) = choose.world, choose.axes(choose.world.held_out_counts)
    look = pairs.look()
    count = choose.pick([n for n in world.counts(look.pair, held_out=counts.held_out) if n > 1])
    if look.size not in world.sizes_for(count):
        look = replace(look, size=choose.pick(world.sizes_for(count)))
    return _named(choose, [look] * count, [Phrase.of(look, with_size=choose.chance(1 / 2), count=count)])


def draw_colour(choose: Choice) -> Steps:
    """Draw "a red circle", "a red object"."""
    look = choose.look()
    any_shape = choose.chance(1 / 4) and not choose.held_out
    return _named(choose, [look], [Phrase(None if any_shape else look.shape, look.colour)])


def draw_position(choose: Choice) -> Steps:
    """Draw "a red circle left of a blue square", "a circle above a square"."""
    pairs, relations = choose.axes(choose.world.held_out_relations)
    looks = _unlike_looks(pairs)
    plain = choose.chance(1 / 2) and not choose.held_out
    return _related(relations, looks, [Phrase(look.shape, None if plain else look.colour) for look in looks])


def draw_attribute(choose: Choice) -> Steps:
    """Draw "a small red circle and a large blue square": two shapes in two colours."""
    looks, with_size = _unlike_looks(choose), choose.chance(1 / 2)
    return _named(choose, looks, [Phrase.of(look, with_size=with_size) for look in looks])


def draw_dense(choose: Choice) -> Steps:
    """Draw "on a white ground: a small red circle at the top left and …": everything, in any order."""
    target = choose.scene((choose.world.max_things + 1) // 2)
    phrases = tuple(map(placed, choose.rng.sample(target.things, len(target.things))))
    prompt = f"{on_ground(target.ground)}: {listed(phrases)}"
    return drawing(prompt, target, Spec(phrases, ground=target.ground))


DRAW = kinds(
    draw_one, draw_two, draw_three, draw_count, draw_colour, draw_position, draw_attribute, draw_dense
)


@again
def _unlike_looks(choose: Choice) -> list[Look]:
    """Two looks of different shapes and colours."""
    a, b = choose.different_looks(2)
    require(a.shape != b.shape and a.colour != b.colour)
    return [a, b]


def _named(choose: Choice, looks: Sequence[Look], phrases: Sequence[Phrase]) -> Steps:
    """A prompt that names all phrases."""
    return _on_some_ground(choose, listed(phrases), choose.place(looks), Spec(tuple(phrases)))


def _related(choose: Choice, looks: Sequence[Look], phrases: Sequence[Phrase]) -> Steps:
    """A prompt of two phrases and their relation, which is held out or not."""
    target, relation = _place_related(choose, looks)
    words = f"{phrases[0].indefinite()} {relation} {phrases[1].indefinite()}"
    return _on_some_ground(choose, words, target, Spec(tuple(phrases), ((0, relation, 1),)))


@again
def _place_related(choose: Choice, looks: Sequence[Look]) -> tuple[Scene, Relation]:
    """A scene of two looks, and a word for how the first clearly lies to the second."""
    scene = choose.place(looks)
    a, b = scene.things
    words = choose.world.relations(a.pair, b.pair, held_out=choose.held_out)
    return scene, choose.pick([relation for relation in words if relation.holds(a, b)])


def _on_some_ground(choose: Choice, words: str, target: Scene, spec: Spec) -> Steps:
    """One time in three the prompt names the ground."""
    if choose.chance(1 / 3):
        words, spec = f"{words} {on_ground(target.ground)}", replace(spec, ground=target.ground)
    return drawing(words, target, spec)
