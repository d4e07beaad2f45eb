"""Prompts that are hard at once and easy step by step: the thought has the steps."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from openbagel.world.choice import fitting_sizes, place, rivals, sample_looks, shuffled, some_others
from openbagel.world.exercise import Draws, Example, Said, Shown, Spec, Task, Thinks, Writes
from openbagel.world.language import CORNERS, NUMBERS, Phrase, enumerate_words, layout
from openbagel.world.scene import Look, Scene, Shape, Thing, World


@dataclass(frozen=True, slots=True)
class Riddle:
    """Words for something that is not named, and how to find it."""

    words: str
    thought: str


Subject = tuple[Scene, Thing, Riddle]
"""A picture, an object of it, and a riddle for that."""


def think_draw(world: World, rng: random.Random, held_out: bool) -> Example:
    """Draw "as many red circles as five minus two minus one", or of a colour or shape that is to be found."""
    look = world.sample_look(rng, held_out=held_out)
    same = [shape for shape in world.shapes if CORNERS[shape] == CORNERS[look.shape]]
    by_corners = ("corners", "count corners", "colour corners") if len(same) == 1 else ()
    hidden = rng.choice(("count", "colour", "count colour", "count colour", *by_corners))
    named = Phrase(None if "corners" in hidden else look.shape, None if "colour" in hidden else look.colour)
    count, clauses = 1, [Riddle(named.indefinite(), "")]
    if "count" in hidden:
        count = rng.choice(world.counts((look.shape, look.colour), held_out=False))
        total = sum_riddle(rng, count)
        clauses = [Riddle(f"as many {named.noun(plural=True)} as {total.words}", total.thought)]
    if "colour" in hidden:
        riddle = _chain(world, rng, look) if rng.random() < 1 / 2 else None
        clauses.append(riddle or _left_over(world, rng, look))
    if "corners" in hidden:
        total = _corner_riddle(rng, look.shape)
        clauses.append(Riddle(f"the number of corners is {total.words}", total.thought))
    phrase = Phrase(look.shape, look.colour, count=count)
    target = place(world, rng, sample_looks(world, rng, count, phrase.matches, also=look))
    thoughts = [clause.thought for clause in clauses if clause.thought]
    thought = f"{' '.join(thoughts)} so {phrase.indefinite()}: {layout(target)}"
    prompt = ". ".join(clause.words for clause in clauses)
    return Example("think_draw", (Said(prompt), Thinks(thought), Draws(target, Spec((phrase,)))))


def think_edit(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "remove the odd one out", "add as many red circles as squares minus one"."""
    return rng.choice((_add_many, _remove, _recolour))(world, rng, held_out)


def think_ask(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "what colour is the odd one out?", "how much is circles minus squares plus two?"."""
    if rng.random() < 1 / 2:
        looks, riddle, total = _counted(world, rng, held_out, most=world.max_things)
        scene, question, answer = shuffled(world, rng, looks), f"how much is {riddle.words}?", NUMBERS[total]
    else:
        scene, thing, riddle = _subject(world, rng, held_out)
        about = "colour" if "corners" in riddle.words or rng.random() < 1 / 2 else "shape"
        question, answer = f"what {about} is {riddle.words}?", str(getattr(thing, about))
    return Example("think_ask", (Shown(scene), Said(question), Thinks(riddle.thought), Writes(answer)))


REASON: dict[str, Task] = {task.__name__: task for task in (think_draw, think_edit, think_ask)}


# edits ------------------------------------------------------------------------------------------------------


def _remove(world: World, rng: random.Random, held_out: bool) -> Example:
    scene, thing, riddle = _subject(world, rng, held_out)
    rest = tuple(other for other in scene.things if other is not thing)
    spec = Spec(ground=scene.ground, kept=rest)
    return _edited(scene, f"remove {riddle.words}", riddle.thought, replace(scene, things=rest), spec)


def _recolour(world: World, rng: random.Random, held_out: bool) -> Example:
    while True:
        scene, thing, riddle = _subject(world, rng, held_out)
        free = world.pairs(held_out=False)
        colour = rng.choice([c for s, c in free if s == thing.shape and c != thing.colour])
        after = replace(thing, colour=colour)
        things = tuple(after if other is thing else other for other in scene.things)
        if world.allows(things):
            break
    prompt, thought = f"make {riddle.words} {colour}", riddle.thought
    if rng.random() < 1 / 2:
        hidden = _left_over(world, rng, Look(thing.shape, colour, thing.size))
        prompt, thought = f"recolour {riddle.words}. {hidden.words}", f"{thought} {hidden.thought}"
    spec = Spec(ground=scene.ground, kept=things)
    return _edited(scene, prompt, thought, replace(scene, things=things), spec)


def _add_many(world: World, rng: random.Random, held_out: bool) -> Example:
    """As many as a sum over the picture."""
    count = rng.randint(1, world.max_things - 1)
    counted, riddle, _ = _counted(world, rng, False, most=world.max_things - count, total=count)
    look = world.sample_look(rng, held_out=held_out)
    phrase = Phrase(look.shape, look.colour, count=count)
    added = sample_looks(world, rng, count, phrase.matches, also=look)
    target = place(world, rng, [*rng.sample(counted, len(counted)), *added])
    scene = replace(target, things=target.things[:-count])
    prompt = f"add as many {phrase.noun(plural=True)} as {riddle.words}"
    spec = Spec((phrase,), ground=scene.ground, kept=scene.things)
    return _edited(scene, prompt, f"{riddle.thought} so {phrase.indefinite()}:", target, spec)


def _edited(scene: Scene, prompt: str, thought: str, target: Scene, spec: Spec) -> Example:
    thinks = Thinks(f"{thought} {layout(target)}")
    return Example("think_edit", (Shown(scene), Said(prompt), thinks, Draws(target, spec)))


# riddles for numbers ----------------------------------------------------------------------------------------


Terms = Sequence[tuple[int, int]]
"""Signs, 1 or -1, and numbers; the first is added."""


def sum_riddle(rng: random.Random, value: int) -> Riddle:
    """Three numbers that make `value`."""
    while True:
        terms = [(1, rng.randint(1, 9)), *((rng.choice((1, -1)), rng.randint(1, 6)) for _ in range(2))]
        thought = _reckoned(terms)
        if thought.endswith(f" is {NUMBERS[value]}."):
            return Riddle(_spoken(terms), thought)


def _corner_riddle(rng: random.Random, shape: Shape) -> Riddle:
    total = sum_riddle(rng, CORNERS[shape])
    return Riddle(total.words, f"{total.thought} {corner_fact(shape)}")


def corner_fact(shape: Shape) -> str:
    return f"{Phrase(shape).indefinite()} has {NUMBERS[CORNERS[shape]]} corners."


def _counted(
    world: World, rng: random.Random, held_out: bool, *, most: int, total: int | None = None
) -> tuple[list[Look], Riddle, int]:
    """At most so many objects, and a sum over their numbers with its total. Without the picture each value of
    its first part is as likely.
    """
    while True:
        value, sign = rng.randint(1, most), rng.choice((1, -1))
        two = rivals(world, rng, held_out, most=most, wanted=partial(_makes, value, sign))
        rest = rng.choice((-1, 1, 2, 3, 4, 5, 6)) if total is None else total - value
        terms = ((1, two.first), (sign, two.second), (1 if rest > 0 else -1, abs(rest)))
        if rest and (reckoned := _reckoned(terms)):
            break
    words = (two.a.noun(plural=True), two.b.noun(plural=True), NUMBERS[abs(rest)])
    seen = [replace(two.a, count=two.first).indefinite(), replace(two.b, count=two.second).indefinite()]
    riddle = Riddle(_spoken(terms, words), f"{' and '.join(seen)}. {reckoned}")
    return two.looks, riddle, value + rest


def _makes(value: int, sign: int, first: int, second: int) -> bool:
    return first + sign * second == value


def _spoken(terms: Terms, words: Sequence[str] = ()) -> str:
    """With `words` in place of the numbers."""
    words = words or [NUMBERS[number] for _, number in terms]
    signs = [" plus " if sign > 0 else " minus " for sign, _ in terms]
    return words[0] + "".join(sign + word for sign, word in zip(signs[1:], words[1:], strict=True))


def _reckoned(terms: Terms) -> str:
    """Every step from left to right, or "" where there is no word for a number."""
    steps, total = [], terms[0][1]
    for sign, number in terms[1:]:
        before, total = total, total + sign * number
        if not 0 <= total < len(NUMBERS):
            return ""
        steps.append(f"{_spoken([(1, before), (sign, number)])} is {NUMBERS[total]}.")
    return " ".join(steps)


# riddles for colours ----------------------------------------------------------------------------------------


def _left_over(world: World, rng: random.Random, look: Look) -> Riddle:
    """The one of four colours that is not ruled out."""
    others = rng.sample([colour for colour in world.colours if colour != look.colour], 3)
    colours = rng.sample([look.colour, *others], 4)
    tried = [f"{c} is {'left' if c == look.colour else 'out'}." for c in colours]
    rest = enumerate_words(rng.sample(others, 3), "or")
    return Riddle(f"the colour is {enumerate_words(colours, 'or')}, but not {rest}", " ".join(tried))


def _chain(world: World, rng: random.Random, look: Look) -> Riddle | None:
    """The colour of a shape that is like another one; nothing where too few shapes may have that colour."""
    free = [pair for pair in world.pairs(held_out=False) if pair[0] != look.shape]
    shapes = [shape for shape, colour in free if colour == look.colour]
    if len(shapes) < 2:
        return None
    near, far = rng.sample(shapes, 2)
    other = rng.choice([pair for pair in free if pair[0] not in (near, far) and pair[1] != look.colour])
    like, known = f"the {near} is like the {far}", f"the {far} is {look.colour}"
    facts = rng.sample([like, known, f"the {other[0]} is {other[1]}"], 3)
    return Riddle(f"the colour is that of the {near}. {'. '.join(facts)}", f"{like}. {known}.")


# riddles for objects ----------------------------------------------------------------------------------------


def _subject(world: World, rng: random.Random, held_out: bool) -> Subject:
    """In a picture of two objects or more; the one to find is held out or not."""
    while True:
        if subject := rng.choice((_odd, _odd, _odd, _cornered))(world, rng, held_out):
            return subject


def _odd(world: World, rng: random.Random, held_out: bool) -> Subject | None:
    """ "the odd one out": all others share a shape, a colour or a size, and in nothing else is one alone."""
    count = rng.randint(3, world.max_things)
    odd, by = world.sample_look(rng, held_out=held_out, count=count), rng.choice(("shape", "colour", "size"))
    (other,) = sample_looks(world, rng, 1, lambda o: getattr(o, by) != getattr(odd, by))
    same = getattr(other, by)
    others = sample_looks(world, rng, count - 1, lambda o: getattr(o, by) == same)
    looks = fitting_sizes(world, [odd, *others])
    if _alone(looks) != {0}:
        return None
    scene = shuffled(world, rng, looks)
    (at,) = _alone(scene.things)
    thing = scene.things[at]
    shared = Phrase(same).noun(plural=True) if by == "shape" else same
    thought = f"the others are {shared}, so the odd one out is {Phrase.of(thing).definite()}."
    return scene, thing, Riddle("the odd one out", thought)


def _alone(looks: Sequence[Look] | Sequence[Thing]) -> set[int]:
    """The places of objects that alone differ from all others, which are alike, in an attribute."""
    found = set()
    for name in ("shape", "colour", "size"):
        values = [getattr(look, name) for look in looks]
        if len(set(values)) == 2:
            found |= {values.index(value) for value in values if values.count(value) == 1}
    return found


def _cornered(world: World, rng: random.Random, held_out: bool) -> Subject:
    """ "the object with five minus two corners", of a picture that has one."""
    look = world.sample_look(rng, held_out=held_out)
    count = CORNERS[look.shape]
    others = some_others(world, rng, lambda other: CORNERS[other.shape] != count, least=1)
    scene = shuffled(world, rng, [look, *others])
    (thing,) = (thing for thing in scene.things if thing.shape == look.shape)
    riddle = _corner_riddle(rng, look.shape)
    thought = f"{riddle.thought} so it is {Phrase.of(thing).definite()}."
    return scene, thing, Riddle(f"the object with {riddle.words} corners", thought)
