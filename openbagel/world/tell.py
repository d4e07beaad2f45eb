"""Stories, in which the model decides when to write and when to draw, and short texts that are true."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from openbagel.world.choice import different_looks, place
from openbagel.world.exercise import Draws, Example, Said, Spec, Step, Task, Writes
from openbagel.world.language import NUMBERS, Phrase, layout, on_ground
from openbagel.world.reason import corner_fact, sum_riddle
from openbagel.world.scene import Ground, Look, Pair, Scene, Thing, World

THE_END = "the end."


@dataclass(frozen=True, slots=True)
class Plot:
    """What a story has come to: a picture of it shows one object of each of these pairs and nothing else."""

    ground: Ground
    pairs: tuple[Pair, ...]

    @property
    def spec(self) -> Spec:
        return Spec(tuple(Phrase(*pair) for pair in self.pairs), ground=self.ground)


Told = tuple[str, Plot]


def _openings(world: World, pair: Pair) -> list[Told]:
    name = Phrase(*pair).indefinite()
    return [(f"there is {name} {on_ground(ground)}.", Plot(ground, (pair,))) for ground in world.grounds]


def _events(world: World, plot: Plot, pairs: Sequence[Pair]) -> list[list[Told]]:
    """All that may happen next, by kind, if no objects but those of `pairs` may come in."""
    there, grounds = plot.pairs, [ground for ground in world.grounds if ground != plot.ground]
    new = [pair for pair in pairs if pair not in there]
    kinds: list[list[Told]] = [
        [(f"the ground turns {ground}.", replace(plot, ground=ground)) for ground in grounds]
    ]
    if len(there) < world.max_things:
        joins = f"joins {'it' if len(there) == 1 else 'them'}."
        kinds.append([(f"{Phrase(*p).indefinite()} {joins}", replace(plot, pairs=(*there, p))) for p in new])
    turns: list[Told] = []
    leaves: list[Told] = []
    for i, pair in enumerate(there):
        before, after, name = there[:i], there[i + 1 :], Phrase(*pair).definite()
        others = [other for other in new if other[0] == pair[0]]
        turns += [(f"{name} turns {p[1]}.", replace(plot, pairs=(*before, p, *after))) for p in others]
        leaves += [(f"{name} leaves.", replace(plot, pairs=before + after))] * (len(there) > 1)
    return [kind for kind in (*kinds, turns, leaves) if kind]


def follow(world: World, texts: Iterable[str], about: Pair | None = None) -> Plot:
    """What a story told in these words, so far or to its end, has come to: its next picture shows that.

    Raises ValueError for a sentence that may not stand where it does, the first one if it is not `about`.
    """
    every = [*world.pairs(held_out=False), *world.pairs(held_out=True)]
    known = dict(told for pair in every if about in (None, pair) for told in _openings(world, pair))
    plot = None
    for sentence in re.findall(r"[^. ][^.]*\.?", " ".join(texts)):
        if plot and sentence == THE_END:
            known = {}
            continue
        plot = known.get(sentence)
        if plot is None:
            raise ValueError(f"a story of this world does not go on with {sentence!r}")
        known = dict(told for kind in _events(world, plot, every) for told in kind)
    if plot is None:
        raise ValueError("the story has no words")
    return plot


def as_told(world: World, story: Example, texts: Iterable[str]) -> Example:
    """The story's example with a model's own texts in order, and pictures that show what those tell.

    Raises ValueError where the texts are no story about what the example's own is about.
    """
    first = next(step.words for step in story.steps if isinstance(step, Writes))
    (about,) = follow(world, [first.partition(".")[0] + "."]).pairs
    own, told, steps = iter(texts), list[str](), list[Step]()
    for step in story.steps:
        if isinstance(step, Writes):
            told.append(next(own, ""))
            follow(world, told, about)
            step = Writes(told[-1])
        elif isinstance(step, Draws) and told:
            step = replace(step, spec=follow(world, told, about).spec)
        steps.append(step)
    return replace(story, steps=tuple(steps))


def tell_story(world: World, rng: random.Random, held_out: bool) -> Example:
    """Tell "a story about a red circle in three pictures": what happens is free, what comes when is not.

    Words come first, and pictures between them; to "show it and tell its story" a picture does.
    """
    while True:
        if made := _story(world, rng, held_out):
            return made


def _story(world: World, rng: random.Random, held_out: bool) -> Example | None:
    """Nothing where an object finds no place."""
    look, pictures, shows = world.sample_look(rng, held_out=held_out), rng.randint(2, 4), rng.random() < 1 / 4
    name, long = Phrase.of(look, with_size=False).indefinite(), f"in {NUMBERS[pictures]} pictures"
    prompt = f"show {name} and tell its story {long}" if shows else f"tell a story about {name} {long}"
    opening, plot = rng.choice(_openings(world, (look.shape, look.colour)))
    scene: Scene | None = world.place(rng, [look], ground=plot.ground)
    steps: list[Step] = [Said(prompt)]
    if shows:
        steps.append(Draws(scene, replace(plot.spec, ground=None)))
    sentences = [opening]
    for picture in range(int(shows), pictures):
        for _ in range(int(picture > 0) + (rng.random() < 1 / 4)):
            told, after = rng.choice(rng.choice(_events(world, plot, world.pairs(held_out=False))))
            scene = _staged(world, rng, scene, after)
            if scene is None:
                return None
            sentences.append(told)
            plot = after
        steps += [Writes(" ".join(sentences)), Draws(scene, plot.spec)]
        sentences = []
    return Example("tell_story", (*steps, Writes(THE_END)), decides=True)


def _staged(world: World, rng: random.Random, scene: Scene, plot: Plot) -> Scene | None:
    """The next scene, with everything that may stay where it was."""
    things: list[Thing] = []
    left = [thing for thing in scene.things if thing.pair not in plot.pairs]
    for pair in plot.pairs:
        same = [thing for thing in scene.things if thing.pair == pair]
        turned = [replace(thing, colour=pair[1]) for thing in left if thing.shape == pair[0]]
        look = Look(*pair, rng.choice(world.sizes_for(len(plot.pairs))))
        one = (same or turned or [world.find_place(rng, look, scene.things)])[0]
        if one is None:
            return None
        things.append(one)
    return Scene(plot.ground, tuple(things)) if world.allows(things) else None


def tell_text(world: World, rng: random.Random, held_out: bool) -> Example:
    """A text that is true: of how objects lie, of a picture, of a sum, of a shape."""
    form = rng.choice((_related, _described) if held_out else (_related, _described, _reckoned, _shaped))
    return Example("tell_text", (Writes(form(world, rng, held_out)),))


def _related(world: World, rng: random.Random, held_out: bool) -> str:
    """What is left of a thing is left of all that this is left of."""
    while True:
        a, b, c = ((look.shape, look.colour) for look in different_looks(world, rng, 3, held_out=held_out))
        steps = ((a, b), (b, c), (a, c))
        allowed = [world.relations(*step, held_out=False) for step in steps]
        if words := [word for word in allowed[0] if word in allowed[1] and word in allowed[2]]:
            break
    relation = rng.choice(words)
    parts = [f"{Phrase(*x).definite()} is {relation} {Phrase(*y).definite()}." for x, y in steps]
    return f"{parts[0]} {parts[1]} so {parts[2]}"


def _described(world: World, rng: random.Random, held_out: bool) -> str:
    count = rng.randint(1, world.max_things)
    scene = place(world, rng, different_looks(world, rng, count, held_out=held_out))
    return f"{layout(scene)}: {Phrase(count=count).indefinite()}."


def _reckoned(_: World, rng: random.Random, __: bool) -> str:
    return sum_riddle(rng, rng.randint(0, len(NUMBERS) - 1)).thought


def _shaped(world: World, rng: random.Random, _: bool) -> str:
    return corner_fact(rng.choice(world.shapes))


TELL: dict[str, Task] = {"tell_story": tell_story, "tell_text": tell_text}
