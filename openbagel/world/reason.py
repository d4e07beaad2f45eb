"""Prompts that are hard at once and easy step by step: the thought has the steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openbagel.world.choice import Choice, again, require
from openbagel.world.exercise import Draws, Said, Shown, Spec, Steps, Thinks, Writes, kinds
from openbagel.world.language import NUMBERS, Phrase, enumerate_words, layout
from openbagel.world.scene import Look, Scene, Shape, Thing


@dataclass(frozen=True, slots=True)
class Riddle:
    """Words for something that is not named, and how to find it."""

    words: str
    thought: str


Subject = tuple[Scene, Thing, Riddle]
"""A picture, an object of it, and a riddle for that."""


def think_draw(choose: Choice) -> Steps:
    """Draw "as many red circles as five minus two minus one", or of a colour or shape that is to be found."""
    look = choose.look()
    alike = sum(shape.corners == look.shape.corners for shape in choose.world.shapes)
    by_corners = ("corners", "count corners", "colour corners") if alike == 1 else ()
    hidden = choose.pick(("count", "colour", "count colour", "count colour", *by_corners))
    named = Phrase(None if "corners" in hidden else look.shape, None if "colour" in hidden else look.colour)
    count, riddles = 1, [Riddle(named.indefinite(), "")]
    if "count" in hidden:
        count = choose.pick(choose.world.counts(look.pair, held_out=False))
        riddles = [sum_riddle(choose, count, f"as many {named.noun(plural=True)} as {{}}")]
    if "colour" in hidden:
        riddles.append((choose.chance(1 / 2) and _chain(choose, look)) or _left_over(choose, look))
    if "corners" in hidden:
        riddles.append(_corner_riddle(choose, look.shape, "the number of corners is {}"))
    phrase = Phrase(*look.pair, count=count)
    target = choose.place(choose.looks(count, phrase.matches, also=look))
    thoughts = [*filter(None, (riddle.thought for riddle in riddles)), f"so {phrase.indefinite()}:"]
    prompt = ". ".join(riddle.words for riddle in riddles)
    return Said(prompt), Thinks(" ".join([*thoughts, layout(target)])), Draws(target, Spec((phrase,)))


def think_edit(choose: Choice) -> Steps:
    """Edit: "remove the odd one out", "add as many red circles as squares minus one".

    The thought ends with the plain instruction for the same edit.
    """
    return choose.pick((_add_many, _remove, _recolour))(choose)


def think_ask(choose: Choice) -> Steps:
    """Ask "what colour is the odd one out?", "how much is circles minus squares plus two?"."""
    if choose.chance(1 / 2):
        looks, riddle, total = _counted(choose, choose.world.max_things)
        scene, question, answer = choose.shuffled(looks), f"how much is {riddle.words}?", NUMBERS[total]
    else:
        scene, thing, riddle = _subject(choose)
        about = "colour" if "corners" in riddle.words or choose.chance(1 / 2) else "shape"
        question, answer = f"what {about} is {riddle.words}?", str(getattr(thing, about))
    return Shown(scene), Said(question), Thinks(riddle.thought), Writes(answer)


REASON = kinds(think_draw, think_edit, think_ask)


# edits ------------------------------------------------------------------------------------------------------


def _remove(choose: Choice) -> Steps:
    scene, thing, riddle = _subject(choose)
    thought = f"{riddle.thought} remove {Phrase.of(thing).definite()}."
    return _edited(scene, f"remove {riddle.words}", thought, scene.put(thing))


@again
def _recolour(choose: Choice) -> Steps:
    scene, thing, riddle = _subject(choose)
    after = replace(thing, colour=choose.pick(choose.free().colours(thing)))
    target = scene.put(thing, after)
    require(choose.world.allows(target.things))
    prompt, thought = f"make {riddle.words} {after.colour}", riddle.thought
    if choose.chance(1 / 2):
        hidden = _left_over(choose, after)
        prompt, thought = f"recolour {riddle.words}. {hidden.words}", f"{thought} {hidden.thought}"
    order = f"make {Phrase.of(thing).definite()} {after.colour}."
    return _edited(scene, prompt, f"{thought} {order}", target)


def _add_many(choose: Choice) -> Steps:
    """As many as a sum over the picture."""
    count = choose.rng.randint(1, choose.world.max_things - 1)
    counted, riddle, _ = _counted(choose.free(), choose.world.max_things - count, total=count)
    look = choose.look()
    phrase = Phrase(*look.pair, count=count)
    added = choose.looks(count, phrase.matches, also=look)
    target = choose.place([*choose.rng.sample(counted, len(counted)), *added])
    prompt = f"add as many {phrase.noun(plural=True)} as {riddle.words}"
    thought = f"{riddle.thought} add {phrase.indefinite()}."
    return _edited(replace(target, things=target.things[:-count]), prompt, thought, target, phrase)


def _edited(scene: Scene, prompt: str, thought: str, target: Scene, *added: Phrase) -> Steps:
    kept = scene.things if added else target.things
    spec = Spec(added, ground=scene.ground, kept=kept)
    return Shown(scene), Said(prompt), Thinks(thought), Draws(target, spec)


# riddles for numbers ----------------------------------------------------------------------------------------


@again
def sum_riddle(choose: Choice, value: int, words: str = "{}") -> Riddle:
    """Three numbers that make `value`, in place of {}."""
    rng = choose.rng
    terms = [(1, rng.randint(1, 9)), *((rng.choice((1, -1)), rng.randint(1, 6)) for _ in range(2))]
    require(sum(sign * number for sign, number in terms) == value)
    total = _sum(terms)
    return Riddle(words.format(total.words), total.thought)


def _corner_riddle(choose: Choice, shape: Shape, words: str) -> Riddle:
    total = sum_riddle(choose, shape.corners, words)
    return Riddle(total.words, f"{total.thought} {corner_fact(shape)}")


def corner_fact(shape: Shape) -> str:
    return f"{Phrase(shape).indefinite()} has {NUMBERS[shape.corners]} corners."


@again
def _counted(choose: Choice, most: int, total: int | None = None) -> tuple[list[Look], Riddle, int]:
    """At most so many objects, and a sum over their numbers with its total. Without the picture each value of
    its first part is as likely.
    """
    value, sign = choose.rng.randint(1, most), choose.pick((1, -1))
    a, b, looks = choose.rivals(most, lambda m, n: m + sign * n == value)
    rest = choose.pick((-1, 1, 2, 3, 4, 5, 6)) if total is None else total - value
    require(rest != 0)
    terms = ((1, a.count), (sign, b.count), (1 if rest > 0 else -1, abs(rest)))
    riddle = _sum(terms, a.noun(plural=True), b.noun(plural=True), NUMBERS[abs(rest)])
    thought = f"{a.indefinite()} and {b.indefinite()}. {riddle.thought}"
    return looks, Riddle(riddle.words, thought), value + rest


def _sum(terms: Sequence[tuple[int, int]], *names: str) -> Riddle:
    """Of signs, 1 or -1, and numbers, or their names, with every step from left to right; impossible where
    there is no word for a number. The first is added.
    """
    signs = ["plus" if sign > 0 else "minus" for sign, _ in terms]
    first, *others = names or [NUMBERS[number] for _, number in terms]
    steps, total = [], terms[0][1]
    for word, (sign, number) in list(zip(signs, terms, strict=True))[1:]:
        before, total = total, total + sign * number
        require(0 <= total < len(NUMBERS))
        steps.append(f"{NUMBERS[before]} {word} {NUMBERS[number]} is {NUMBERS[total]}.")
    words = [first, *map(" ".join, zip(signs[1:], others, strict=True))]
    return Riddle(" ".join(words), " ".join(steps))


# riddles for colours ----------------------------------------------------------------------------------------


def _left_over(choose: Choice, look: Look) -> Riddle:
    """The one of four colours that is not ruled out."""
    sample = choose.rng.sample
    others = sample([colour for colour in choose.world.colours if colour != look.colour], 3)
    colours = sample([look.colour, *others], 4)
    tried = [f"{colour} is {'left' if colour == look.colour else 'out'}." for colour in colours]
    rest = enumerate_words(sample(others, 3), "or")
    return Riddle(f"the colour is {enumerate_words(colours, 'or')}, but not {rest}", " ".join(tried))


def _chain(choose: Choice, look: Look) -> Riddle | None:
    """The colour of a shape that is like another one; nothing where too few shapes may have that colour."""
    free = [pair for pair in choose.world.pairs(held_out=False) if pair[0] != look.shape]
    shapes = [shape for shape, colour in free if colour == look.colour]
    if len(shapes) < 2:
        return None
    near, far = choose.rng.sample(shapes, 2)
    other = choose.pick([pair for pair in free if pair[0] not in (near, far) and pair[1] != look.colour])
    like, known = f"the {near} is like the {far}", f"the {far} is {look.colour}"
    facts = choose.rng.sample([like, known, f"the {other[0]} is {other[1]}"], 3)
    return Riddle(f"the colour is that of the {near}. {'. '.join(facts)}", f"{like}. {known}.")


# riddles for objects ----------------------------------------------------------------------------------------


@again
def _subject(choose: Choice) -> Subject:
    """In a picture of two objects or more; the one to find is held out or not."""
    return choose.pick((_odd, _odd, _odd, _cornered))(choose)


def _odd(choose: Choice) -> Subject:
    """ "the odd one out": all others share a shape, a colour or a size, and in nothing else is one alone."""
    count = choose.rng.randint(3, choose.world.max_things)
    odd, by = choose.look(count), choose.pick(("shape", "colour", "size"))
    (other,) = choose.looks(1, lambda one: getattr(one, by) != getattr(odd, by))
    same = getattr(other, by)
    looks = choose.fitted([odd, *choose.looks(count - 1, lambda one: getattr(one, by) == same)])
    require(_alone(looks) == {0})
    scene = choose.shuffled(looks)
    (at,) = _alone(scene.things)
    thing = scene.things[at]
    shared = Phrase(same).noun(plural=True) if by == "shape" else same
    thought = f"the others are {shared}, so the odd one out is {Phrase.of(thing).definite()}."
    return scene, thing, Riddle("the odd one out", thought)


def _alone(looks: Sequence[Look]) -> set[int]:
    """The places of objects that alone differ from all others, which are alike, in an attribute."""
    found = set()
    for name in ("shape", "colour", "size"):
        values = [getattr(look, name) for look in looks]
        if len(set(values)) == 2:
            found |= {values.index(value) for value in values if values.count(value) == 1}
    return found


def _cornered(choose: Choice) -> Subject:
    """ "the object with five minus two corners", of a picture that has one."""
    look = choose.look()
    others = choose.others(lambda other: other.shape.corners != look.shape.corners, least=1)
    scene = choose.shuffled([look, *others])
    (thing,) = (thing for thing in scene.things if thing.shape == look.shape)
    riddle = _corner_riddle(choose, look.shape, "the object with {} corners")
    thought = f"{riddle.thought} so it is {Phrase.of(thing).definite()}."
    return scene, thing, Riddle(riddle.words, thought)
