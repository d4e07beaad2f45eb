"""Tasks: prompts to draw, questions to answer, edits to make, each with the exact truth.

A generator `(world, rng, held_out) -> Example` makes one example. With `held_out` a held-out pair of shape
and colour is in the decisive place (the object drawn, asked about or edited to); without, none occurs.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from openbagel.world.language import NUMBERS, Phrase, Relation, caption, enumerate_words, layout, on_ground
from openbagel.world.scene import Colour, Ground, Look, Scene, Shape, Thing, World

_CORPUS_EXAMPLES_PER_KIND = 500


@dataclass(frozen=True, slots=True)
class Spec:
    """What a drawn picture must show: exactly these objects and no others.

    `objects` have the attributes that the prompt mentioned; `relations` are (i, relation, j) between objects
    of count one; `kept` must be where they were, looking as they did; `ground` is free if None.
    """

    objects: tuple[Phrase, ...] = ()
    relations: tuple[tuple[int, Relation, int], ...] = ()
    ground: Ground | None = None
    kept: tuple[Thing, ...] = ()

    @property
    def total(self) -> int:
        """How many objects the picture has."""
        return sum(phrase.count for phrase in self.objects) + len(self.kept)


@dataclass(frozen=True, slots=True)
class Example:
    """One exercise. Either `answer` is set (text to answer) or `target` and `spec` are (a picture to draw).

    `thought` is what may be thought before: a plan of the picture to draw, or what the given picture shows.
    """

    kind: str
    prompt: str
    pictures: tuple[Scene, ...] = ()
    thought: str | None = None
    answer: str | None = None
    target: Scene | None = None
    spec: Spec | None = None


Task = Callable[[World, random.Random, bool], Example]


def example(
    world: World, seed: int, index: int, kind: str, held_out: bool = False, think: bool = False
) -> Example:
    """Example `index` of a kind, the same for the same arguments; `think` only adds the thought.

    Raises ValueError for an unknown kind.
    """
    if kind not in TASKS:
        raise ValueError(f"unknown kind of task {kind!r}; there are {', '.join(TASKS)}")
    made = TASKS[kind](world, random.Random(f"{seed}/{kind}/{index}/{held_out}"), held_out)
    return with_thought(made) if think else made


def with_thought(made: Example) -> Example:
    """The example with its thought: the layout of the picture to draw, or else of the last picture given."""
    return replace(made, thought=layout(made.target or made.pictures[-1]))


def corpus(world: World) -> Iterator[str]:
    """Prompts, thoughts and answers that cover the vocabulary, to train a tokenizer on."""
    for kind in TASKS:
        for index in range(_CORPUS_EXAMPLES_PER_KIND):
            made = example(world, 0, index, kind, think=True)
            yield from filter(None, (made.prompt, made.thought, made.answer))


def draw_one(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle", "a small red circle on a black ground"."""
    look = world.sample_look(rng, held_out=held_out)
    phrase = Phrase.of(look, with_size=rng.random() < 1 / 2)
    return _drawing("draw_one", world, rng, looks=[look], phrases=[phrase])


def draw_two(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle and a blue square", "a red circle left of a blue square"."""
    looks = _different_looks(world, rng, 2, held_out=held_out)
    with_size = rng.random() < 1 / 4
    phrases = [Phrase.of(look, with_size=with_size) for look in looks]
    related = rng.random() < 1 / 2
    return _drawing("draw_two", world, rng, looks=looks, phrases=phrases, related=related)


def draw_three(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "a red circle, a blue square and a green cross"."""
    looks = _different_looks(world, rng, 3, held_out=held_out)
    phrases = [Phrase.of(look, with_size=False) for look in looks]
    return _drawing("draw_three", world, rng, looks=looks, phrases=phrases)


def draw_count(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "three red circles", "two small blue squares"."""
    look = world.sample_look(rng, held_out=held_out)
    count = rng.randint(2, world.max_things)
    phrase = Phrase.of(look, with_size=rng.random() < 1 / 2, count=count)
    return _drawing("draw_count", world, rng, looks=[look] * count, phrases=[phrase])


def ask_count(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "how many red objects are there?", with answers from zero on."""
    look = world.sample_look(rng, held_out=held_out)
    asked = [Phrase(look.shape), Phrase(colour=look.colour), Phrase(look.shape, look.colour)]
    phrase = rng.choice(asked if held_out else [Phrase(), *asked])
    free = phrase != Phrase() and not held_out
    count = rng.randint(0 if free else 1, world.max_things)
    matching = [look, *_sample_looks(world, rng, world.max_things, phrase.matches, also=look)][:count]
    room = 0 if phrase == Phrase() else world.max_things - count
    others = _sample_looks(
        world, rng, rng.randint(int(count == 0), room), lambda other: not phrase.matches(other)
    )
    question = f"how many {phrase.noun(plural=True)} are there?"
    return _asking("ask_count", question, NUMBERS[count], _shuffled(world, rng, [*matching, *others]))


def ask_colour(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "what colour is the square?" of a picture with one square."""
    look = world.sample_look(rng, held_out=held_out)
    others = _some_others(world, rng, lambda other: other.shape != look.shape)
    question = f"what colour is {Phrase(look.shape).definite()}?"
    return _asking("ask_colour", question, look.colour, _shuffled(world, rng, [look, *others]))


def ask_shape(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "what shape is the red object?" of a picture with one red object."""
    look = world.sample_look(rng, held_out=held_out)
    others = _some_others(world, rng, lambda other: other.colour != look.colour)
    question = f"what shape is {Phrase(colour=look.colour).definite()}?"
    return _asking("ask_shape", question, look.shape, _shuffled(world, rng, [look, *others]))


def ask_exists(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "is there a red circle?"; where there is none, there is something that differs in one attribute."""
    look = world.sample_look(rng, held_out=held_out)
    full, pair = Phrase.of(look), Phrase.of(look, with_size=False)
    loose = [Phrase(look.shape), Phrase(colour=look.colour)]
    phrase = rng.choice([full, pair] if held_out else [full, pair, *loose])
    there = rng.random() < 1 / 2
    count = rng.randint(1, world.max_things)
    others = _sample_looks(world, rng, count, lambda other: not phrase.matches(other))
    near = _sample_looks(world, rng, 1, lambda other: _misses(phrase, other) == 1)
    shown = (
        [look, *near, *others] if there and rng.random() < 1 / 2 else [*([look] if there else near), *others]
    )
    question = f"is there {phrase.indefinite()}?"
    return _asking("ask_exists", question, "yes" if there else "no", _shuffled(world, rng, shown[:count]))


def ask_relation(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "is the red circle left of the blue square?", where it clearly is, or clearly is the opposite."""
    looks = _different_looks(world, rng, rng.randint(2, world.max_things), held_out=held_out)
    scene = world.place(rng, looks)
    first, second = rng.sample(scene.things, 2)
    if held_out and not {first.pair, second.pair} & world.held_out:
        first = next(thing for thing in scene.things if thing.pair in world.held_out)
    relation = rng.choice([r for r in Relation if r.holds(first, second)])
    true = rng.random() < 1 / 2
    a, b = (Phrase.of(thing, with_size=False).definite() for thing in (first, second))
    question = f"is {a} {relation if true else relation.opposite} {b}?"
    return _asking("ask_relation", question, "yes" if true else "no", scene)


def ask_caption(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "describe the picture."; the answer is the canonical caption."""
    scene = world.sample_scene(rng, rng.randint(1, world.max_things), held_out=held_out)
    return _asking("ask_caption", "describe the picture.", caption(scene), scene)


def edit_recolour(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "make the red circle blue"."""
    after = world.sample_look(rng, held_out=held_out)
    free = world.pairs(held_out=False)
    colours = [colour for shape, colour in free if shape == after.shape and colour != after.colour]
    before = replace(after, colour=rng.choice(colours))
    scene = world.place(rng, [before, *_some_others(world, rng, _unlike(before))])
    named, *rest = scene.things
    target = replace(scene, things=(replace(named, colour=after.colour), *rest))
    prompt = f"make {_name(rng, named)} {after.colour}"
    spec = Spec(ground=scene.ground, kept=target.things)
    return Example("edit_recolour", prompt, (scene,), target=target, spec=spec)


def edit_remove(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "remove the red circle", of a picture where something else stays."""
    look = world.sample_look(rng, held_out=held_out)
    scene = world.place(rng, [look, *_some_others(world, rng, _unlike(look), least=1)])
    named, *rest = scene.things
    target = replace(scene, things=tuple(rest))
    spec = Spec(ground=scene.ground, kept=target.things)
    return Example("edit_remove", f"remove {_name(rng, named)}", (scene,), target=target, spec=spec)


def edit_add(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "add a blue square"."""
    look = world.sample_look(rng, held_out=held_out)
    target = world.place(rng, [look, *_some_others(world, rng, lambda _: True, least=1)])
    scene = replace(target, things=target.things[1:])
    phrase = Phrase.of(look, with_size=rng.random() < 1 / 2)
    spec = Spec(objects=(phrase,), ground=scene.ground, kept=scene.things)
    return Example("edit_add", f"add {phrase.indefinite()}", (scene,), target=target, spec=spec)


TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (
        draw_one,
        draw_two,
        draw_three,
        draw_count,
        ask_count,
        ask_colour,
        ask_shape,
        ask_exists,
        ask_relation,
        ask_caption,
        edit_recolour,
        edit_remove,
        edit_add,
    )
}
"""Every kind of task by its name; the part before "_" says what is done: draw, ask or edit."""


def _drawing(
    kind: str,
    world: World,
    rng: random.Random,
    *,
    looks: Sequence[Look],
    phrases: Sequence[Phrase],
    related: bool = False,
) -> Example:
    """A prompt of `phrases`, if `related` with the relation of the two; one time in three with the ground."""
    target = world.place(rng, looks)
    words, relations = enumerate_words([phrase.indefinite() for phrase in phrases]), ()
    if related:
        first, second = target.things[:2]
        relation = rng.choice([r for r in Relation if r.holds(first, second)])
        words = f"{phrases[0].indefinite()} {relation} {phrases[1].indefinite()}"
        relations = ((0, relation, 1),)
    ground = target.ground if rng.random() < 1 / 3 else None
    prompt = f"{words} {on_ground(ground)}" if ground else words
    return Example(kind, prompt, target=target, spec=Spec(tuple(phrases), relations, ground))


def _asking(kind: str, question: str, answer: str, scene: Scene) -> Example:
    return Example(kind, question, (scene,), answer=str(answer))


def _shuffled(world: World, rng: random.Random, looks: Sequence[Look]) -> Scene:
    return world.place(rng, rng.sample(looks, len(looks)))


def _name(rng: random.Random, thing: Thing) -> str:
    """An object whose pair is unique in its picture; one time in four with its size."""
    return Phrase.of(thing, with_size=rng.random() < 1 / 4).definite()


def _unlike(look: Look) -> Callable[[Look], bool]:
    """Whether another look has a different pair of shape and colour."""
    return lambda other: (other.shape, other.colour) != (look.shape, look.colour)


def _misses(phrase: Phrase, look: Look) -> int:
    """In how many of the mentioned attributes an object differs."""
    wanted = ((phrase.shape, look.shape), (phrase.colour, look.colour), (phrase.size, look.size))
    return sum(word is not None and word != seen for word, seen in wanted)


def _sample_looks(
    world: World, rng: random.Random, count: int, fits: Callable[[Look], bool], *, also: Look | None = None
) -> list[Look]:
    """`count` looks, not held out (except the pair of `also`), that fit."""
    pairs: list[tuple[Shape, Colour]] = world.pairs(held_out=False)
    if also is not None and (also.shape, also.colour) in world.held_out:
        pairs.append((also.shape, also.colour))
    fitting = [look for pair in pairs for size in world.sizes if fits(look := Look(*pair, size))]
    return rng.choices(fitting, k=count)


def _some_others(
    world: World, rng: random.Random, fits: Callable[[Look], bool], *, least: int = 0
) -> list[Look]:
    """From `least` to so many looks that fit that one more object has room in the world's pictures."""
    return _sample_looks(world, rng, rng.randint(least, world.max_things - 1), fits)


def _different_looks(world: World, rng: random.Random, count: int, *, held_out: bool) -> list[Look]:
    """`count` looks in random order whose pairs all differ; with `held_out` one of them is held out."""
    pairs = rng.sample(world.pairs(held_out=False), count)
    if held_out:
        pairs[0] = rng.choice(world.pairs(held_out=True))
    return [Look(*pair, rng.choice(world.sizes)) for pair in rng.sample(pairs, count)]
