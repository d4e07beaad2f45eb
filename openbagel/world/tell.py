"""Stories, in which the model decides when to write and when to draw, and short texts that are true."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from openbagel.world.choice import Choice, again, require
from openbagel.world.exercise import Draws, Example, Said, Spec, Step, Steps, Writes, kinds
from openbagel.world.language import NUMBERS, Phrase, layout, on_ground
from openbagel.world.reason import corner_fact, sum_riddle
from openbagel.world.scene import Ground, Look, Pair, Scene, Thing, World, exchanged

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
    there, it = plot.pairs, "it" if len(plot.pairs) == 1 else "them"
    new = [pair for pair in pairs if pair not in there]
    joining = new if len(there) < world.max_things else []
    leaving = there if len(there) > 1 else ()

    turning = [(old, pair) for old in there for pair in new if old[0] == pair[0]]

    def after(old: Pair, *pair: Pair) -> Plot:
        return replace(plot, pairs=exchanged(there, old, *pair))

    kinds: list[list[Told]] = [
        [(f"the ground turns {g}.", replace(plot, ground=g)) for g in world.grounds if g != plot.ground],
        [(f"{Phrase(*p).indefinite()} joins {it}.", replace(plot, pairs=(*there, p))) for p in joining],
        [(f"{Phrase(*old).definite()} turns {p[1]}.", after(old, p)) for old, p in turning],
        [(f"{Phrase(*p).definite()} leaves.", after(p)) for p in leaving],
    ]
    return [kind for kind in kinds if kind]


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


def tell_story(choose: Choice) -> Steps:
    """Tell "a story about a red circle in three pictures": what happens is free, what comes when is not.

    Words come first, and pictures between them; to "show it and tell its story" a picture does.
    """
    look, pictures, shows = choose.look(), choose.rng.randint(2, 4), choose.chance(1 / 4)
    name, long = Phrase(*look.pair).indefinite(), f"in {NUMBERS[pictures]} pictures"
    prompt = f"show {name} and tell its story {long}" if shows else f"tell a story about {name} {long}"
    opening, plot = choose.pick(_openings(choose.world, look.pair))
    scene = choose.world.place(choose.rng, [look], ground=plot.ground)
    steps: list[Step] = [Said(prompt)]
    if shows:
        steps.append(Draws(scene, replace(plot.spec, ground=None)))
    sentences = [opening]
    for picture in range(int(shows), pictures):
        for _ in range(int(picture > 0) + choose.chance(1 / 4)):
            events = _events(choose.world, plot, choose.world.pairs(held_out=False))
            told, plot = choose.pick(choose.pick(events))
            scene = _staged(choose, scene, plot)
            sentences.append(told)
        steps += [Writes(" ".join(sentences)), Draws(scene, plot.spec)]
        sentences = []
    return *steps, Writes(THE_END)


def _staged(choose: Choice, scene: Scene, plot: Plot) -> Scene:
    """The next scene, with everything that may stay where it was."""
    things, find = list[Thing](), choose.world.find_place
    left = [thing for thing in scene.things if thing.pair not in plot.pairs]
    for pair in plot.pairs:
        same = [thing for thing in scene.things if thing.pair == pair]
        turned = [replace(thing, colour=pair[1]) for thing in left if thing.shape == pair[0]]
        look = Look(*pair, choose.pick(choose.world.sizes_for(len(plot.pairs))))
        things.append((same or turned or [require(find(choose.rng, look, scene.things))])[0])
    require(choose.world.allows(things))
    return Scene(plot.ground, tuple(things))


def tell_text(choose: Choice) -> Steps:
    """A text that is true: of how objects lie, of a picture, of a sum, of a shape."""
    forms = (_related, _described) if choose.held_out else (_related, _described, _reckoned, _shaped)
    return (Writes(choose.pick(forms)(choose)),)


@again
def _related(choose: Choice) -> str:
    """What is left of a thing is left of all that this is left of."""
    a, b, c = (look.pair for look in choose.different_looks(3))
    steps = ((a, b), (b, c), (a, c))
    allowed = [choose.world.relations(*step, held_out=False) for step in steps]
    relation = choose.pick([word for word in allowed[0] if word in allowed[1] and word in allowed[2]])
    parts = [f"{Phrase(*x).definite()} is {relation} {Phrase(*y).definite()}." for x, y in steps]
    return f"{parts[0]} {parts[1]} so {parts[2]}"


def _described(choose: Choice) -> str:
    count = choose.rng.randint(1, choose.world.max_things)
    return f"{layout(choose.place(choose.different_looks(count)))}: {Phrase(count=count).indefinite()}."


def _reckoned(choose: Choice) -> str:
    return sum_riddle(choose, choose.rng.randint(0, len(NUMBERS) - 1)).thought


def _shaped(choose: Choice) -> str:
    return corner_fact(choose.pick(choose.world.shapes))


TELL = kinds(tell_story, tell_text)
