"""Questions about pictures, each with the one true answer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from openbagel.world.choice import Choice, again, require
from openbagel.world.edit import ask_change
from openbagel.world.exercise import Said, Shown, Steps, Thinks, Writes, kinds
from openbagel.world.language import NUMBERS, Phrase, caption, layout, places
from openbagel.world.scene import Look, Relation, Scene, Thing

Asked = tuple[str, str]
"""A question and its answer."""


def asking(scene: Scene, *asked: Asked) -> Steps:
    """Questions about one picture; each thought is what it shows."""
    thought = Thinks(layout(scene))
    turns = ((Said(question), thought, Writes(answer)) for question, answer in asked)
    return Shown(scene), *(step for turn in turns for step in turn)


def _how_many(phrase: Phrase, scene: Scene) -> Asked:
    return f"how many {phrase.noun(plural=True)} are there?", NUMBERS[len(_matches(phrase, scene))]


def _is_there(phrase: Phrase, scene: Scene) -> Asked:
    return f"is there {phrase.indefinite()}?", "yes" if _matches(phrase, scene) else "no"


def _what(about: str, phrase: Phrase, scene: Scene) -> Asked:
    return f"what {about} is {phrase.definite()}?", str(getattr(_only(phrase, scene), about))


def _where(phrase: Phrase, scene: Scene) -> Asked:
    found = places(_only(phrase, scene))
    require(len(found) == 1)
    return f"where is {phrase.definite()}?", f"at the {found.pop()}"


def _matches(phrase: Phrase, scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if phrase.matches(thing)]


def _only(phrase: Phrase, scene: Scene) -> Thing:
    """The one object that is meant; `Impossible` where others could be."""
    found = _matches(phrase, scene)
    require(len(found) == 1)
    return found[0]


def ask_count(choose: Choice) -> Steps:
    """Ask "how many red objects are there?", with answers from zero on."""
    pairs, counts = choose.axes(choose.world.held_out_counts)
    look, most = pairs.look(), choose.world.max_things
    asked = [Phrase(look.shape), Phrase(colour=look.colour), Phrase(*look.pair)]
    phrase = asked[-1]
    if not counts.held_out:
        phrase = choose.pick(asked if choose.held_out else [Phrase(), *asked])
    count = choose.rng.randint(int(choose.held_out or phrase == Phrase()), most)
    if counts.held_out:
        (count,) = choose.world.counts(look.pair, held_out=True)
    matching = [look, *choose.looks(most, phrase.matches, also=look)][:count]
    room = 0 if phrase == Phrase() else most - count
    others = choose.looks(choose.rng.randint(int(count == 0), room), phrase.misses)
    scene = choose.shuffled([*matching, *others])
    return asking(scene, _how_many(phrase, scene))


def ask_colour(choose: Choice) -> Steps:
    """Ask "what colour is the square?" of a picture with one square."""
    return _of_one(choose, lambda look: Phrase(look.shape), partial(_what, "colour"))


def ask_shape(choose: Choice) -> Steps:
    """Ask "what shape is the red object?" of a picture with one red object."""
    return _of_one(choose, lambda look: Phrase(colour=look.colour), partial(_what, "shape"))


def ask_place(choose: Choice) -> Steps:
    """Ask "where is the red circle?" of one that clearly lies in one of the nine places."""
    return _of_one(choose, lambda look: Phrase(*look.pair), _where)


def _of_one(choose: Choice, words: Callable[[Look], Phrase], ask: Callable[[Phrase, Scene], Asked]) -> Steps:
    """A question about an object, of a picture in which its words fit no other."""
    look = choose.look()
    phrase = words(look)
    scene = choose.shuffled([look, *choose.others(phrase.misses)])
    return asking(scene, ask(phrase, scene))


def ask_exists(choose: Choice) -> Steps:
    """Ask "is there a red circle?"; where there is none, there is something that differs in one attribute."""
    look = choose.look()
    asked = [Phrase.of(look), Phrase(*look.pair)]
    loose = [Phrase(look.shape), Phrase(colour=look.colour)]
    phrase = choose.pick(asked if choose.held_out else asked + loose)
    there = choose.chance(1 / 2)
    count = choose.rng.randint(1, choose.roomy if phrase.size else choose.world.max_things)
    others = choose.looks(count, phrase.misses)
    near = choose.looks(1, lambda other: phrase.misses(other) == 1)
    if there:
        near = [look, *near] if choose.chance(1 / 2) else [look]
    scene = choose.shuffled([*near, *others][:count])
    return asking(scene, _is_there(phrase, scene))


def ask_relation(choose: Choice) -> Steps:
    """Ask "is the red circle left of the blue square?", where it clearly is, or clearly is the opposite."""
    return _ask_relation(*choose.axes(choose.world.held_out_relations))


@again
def _ask_relation(pairs: Choice, relations: Choice) -> Steps:
    scene = pairs.place(pairs.different_looks(pairs.rng.randint(2, pairs.world.max_things)))
    first, second = pairs.rng.sample(scene.things, 2)
    if pairs.held_out and not {first.pair, second.pair} & pairs.world.held_out:
        first = next(thing for thing in scene.things if thing.pair in pairs.world.held_out)
    return asking(scene, _is_it(relations, first, second))


def _is_it(choose: Choice, first: Thing, second: Thing) -> Asked:
    """Whether it is left of (right of, above, below) the other one."""
    relation = choose.pick([relation for relation in Relation if relation.holds(first, second)])
    true = choose.chance(1 / 2)
    said = relation if true else relation.opposite
    require(said in choose.world.relations(first.pair, second.pair, held_out=choose.held_out))
    a, b = (Phrase(*thing.pair).definite() for thing in (first, second))
    return f"is {a} {said} {b}?", "yes" if true else "no"


def ask_caption(choose: Choice) -> Steps:
    """Ask "describe the picture."; the answer is the canonical caption."""
    scene = choose.scene()
    return asking(scene, ("describe the picture.", caption(scene)))


def ask_compare(choose: Choice) -> Steps:
    """Ask "which is larger, the red circle or the blue square?", "are there more circles than squares?"."""
    return (_which_is_larger if choose.chance(1 / 2) else _are_there_more)(choose)


def _which_is_larger(choose: Choice) -> Steps:
    world, rng = choose.world, choose.rng
    looks = choose.different_looks(rng.randint(2, choose.roomy))
    looks.sort(key=lambda look: look.pair not in world.held_out)
    a, b = (replace(look, size=size) for look, size in zip(looks, rng.sample(world.sizes, 2), strict=False))
    word = choose.pick(("larger", "smaller"))
    ordered = sorted((a, b), key=lambda look: world.sizes.index(look.size), reverse=word == "larger")
    names = {look: Phrase(*look.pair).definite() for look in rng.sample(ordered, 2)}
    question = f"which is {word}, {' or '.join(names.values())}?"
    return asking(choose.shuffled([a, b, *looks[2:]]), (question, names[ordered[0]]))


def _are_there_more(choose: Choice) -> Steps:
    more, turned = choose.chance(1 / 2), choose.chance(1 / 2)
    a, b, looks = choose.rivals(choose.world.max_things, lambda m, n: (n > m if turned else m > n) == more)
    first, second = (b, a) if turned else (a, b)
    question = f"are there more {first.noun(plural=True)} than {second.noun(plural=True)}?"
    return asking(choose.shuffled(looks), (question, "yes" if more else "no"))


def ask_turns(choose: Choice) -> Steps:
    """Ask two to five different things about one picture, one after the other."""
    scene = choose.scene()
    about = [thing.look for thing in scene.things if thing.pair in choose.world.held_out]
    asked = dict[str, str]()
    turns = choose.rng.randint(2, 5)
    while len(asked) < turns:
        asked |= [_any_question(choose.free(), scene, about.pop() if about else None)]
    return asking(scene, *asked.items())


@again
def _any_question(choose: Choice, scene: Scene, about: Look | None) -> Asked:
    """About this, or about what there is or might be."""
    look = about or (choose.pick(scene.things) if choose.chance(1 / 2) else choose.look())
    by_shape, by_colour, by_pair = Phrase(look.shape), Phrase(colour=look.colour), Phrase(*look.pair)
    named = choose.pick((by_shape, by_colour, by_pair))
    match choose.rng.randrange(8):
        case 0:
            return _how_many(named, scene)
        case 1:
            return _is_there(named, scene)
        case 2:
            return _what("colour", by_shape, scene)
        case 3:
            return _what("shape", by_colour, scene)
        case 4 | 5:
            return _where(by_pair, scene)
    other = choose.pick([thing for thing in scene.things if thing.pair != look.pair])
    return _is_it(choose, _only(by_pair, scene), _only(Phrase(*other.pair), scene))


ASK = kinds(ask_count, ask_colour, ask_shape, ask_exists, ask_relation, ask_caption, ask_compare, ask_change)
ASK |= kinds(ask_turns, ask_place)
