"""Edits of pictures: what to change is said, everything else has to stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from openbagel.world.choice import Choice, again, require
from openbagel.world.exercise import Draws, Said, Shown, Spec, Step, Steps, Task, Thinks, Writes, kinds
from openbagel.world.language import Phrase, layout, place_name, places
from openbagel.world.scene import Ground, Look, Pair, Scene, Thing, exchanged


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a picture that is being edited. Where words left its place or looks open, `phrase` is all
    that is known of it; else it is known exactly.
    """

    thing: Thing
    phrase: Phrase | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A picture between edits, and the pairs that the instruction was about so far."""

    ground: Ground
    items: tuple[Item, ...]
    done: tuple[Pair, ...] = ()

    @property
    def scene(self) -> Scene:
        return Scene(self.ground, tuple(item.thing for item in self.items))

    @property
    def pairs(self) -> list[Pair]:
        return [item.thing.pair for item in self.items]

    @property
    def spec(self) -> Spec:
        exact = tuple(item.thing for item in self.items if item.phrase is None)
        return Spec(tuple(x.phrase for x in self.items if x.phrase), ground=self.ground, kept=exact)

    def put(self, old: Item | None, *new: Item) -> "State":
        """With `old` replaced by `new`, or taken away; without `old`, with one more on top."""
        items = exchanged(self.items, old, *new) if old else (*self.items, *new)
        about = [item.thing.pair for item in (old, *new) if item]
        return replace(self, items=items, done=(*self.done, *about))


@dataclass(frozen=True, slots=True)
class Change:
    """An edit: how to ask for it, how to tell of it, and what comes of it."""

    order: str
    news: str
    state: State


Verb = Callable[[Choice, State], Change]
"""Makes a random change about something that no instruction was about yet, held out or not."""


def _add(choose: Choice, state: State) -> Change:
    """What is not there yet."""
    pair, count = _new_pair(choose, state), len(state.items) + 1
    require(count <= choose.world.max_things)
    look = Look(*pair, choose.pick(choose.world.sizes_for(count)))
    thing = require(choose.world.find_place(choose.rng, look, state.scene.things))
    phrase = Phrase.of(thing, with_size=choose.chance(1 / 2))
    after = state.put(None, Item(thing, phrase))
    return Change(f"add {phrase.indefinite()}", f"{Phrase(*pair).indefinite()} is new", after)


def _remove(choose: Choice, state: State) -> Change:
    """Something else stays."""
    item = _named(choose, state, shown=True)
    require(len(state.items) > 1)
    return _changed(choose, state, item, order="remove {}", news="{} is gone")


def _replace(choose: Choice, state: State) -> Change:
    """By another shape in the same place."""
    item, (shape, colour) = _named(choose, state), _new_pair(choose, state)
    require(shape != item.thing.shape)
    turned = choose.pick(choose.world.turns(shape))
    thing = replace(item.thing, shape=shape, colour=colour, rotation=turned)
    phrase = Phrase(shape, colour)
    a_new = phrase.indefinite()
    if not item.phrase or item.phrase.place:
        phrase = replace(phrase, place=place_name(thing.x, thing.y))
    order, news = f"replace {{}} with {a_new}", f"{{}} became {a_new}"
    return _changed(choose, state, item, Item(thing, phrase), order=order, news=news)


def _recolour(choose: Choice, state: State) -> Change:
    item = _named(choose, state)
    colour = choose.pick(choose.colours(item.thing))
    after = Item(replace(item.thing, colour=colour), item.phrase and replace(item.phrase, colour=colour))
    return _changed(choose, state, item, after, order=f"make {{}} {colour}", news=f"{{}} became {colour}")


def _resize(choose: Choice, state: State) -> Change:
    item = _named(choose, state, shown=True)
    require(item.phrase is None)
    size = choose.pick([size for size in choose.world.sizes if size != item.thing.size])
    after = Item(replace(item.thing, size=size))
    return _changed(choose, state, item, after, order=f"make {{}} {size}", news=f"{{}} became {size}")


def _move(choose: Choice, state: State) -> Change:
    """To a corner or the centre: "to the left" might be taken for a direction."""
    item = _named(choose, state, shown=True)
    require(item.phrase is None or item.phrase.place is not None)
    thing, others = item.thing, [x.thing for x in state.items if x is not item]
    found = [choose.world.find_place(choose.rng, thing.look, others) for _ in range(3)]
    clear = require([one for one in found if one and place_name(one.x, one.y) in _CLEAR_PLACES])[0]
    where = place_name(clear.x, clear.y)
    require(where not in places(thing))
    after = Item(replace(thing, x=clear.x, y=clear.y), replace(Phrase.of(thing), place=where))
    where = f"to the {where}"
    return _changed(choose, state, item, after, order=f"move {{}} {where}", news=f"{{}} moved {where}")


def _ground(choose: Choice, state: State) -> Change:
    ground = choose.pick([ground for ground in choose.world.grounds if ground != state.ground])
    after = replace(state, ground=ground)
    return Change(f"make the ground {ground}", f"the ground became {ground}", after)


_VERBS: tuple[Verb, ...] = (_add, _remove, _replace, _recolour, _resize, _move, _ground)
_MAKES_PAIRS = {_add, _replace, _recolour}
_CLEAR_PLACES = {"top left", "top right", "bottom left", "bottom right", "centre"}


def _named(choose: Choice, state: State, *, shown: bool = False) -> Item:
    """An object that words can single out; a held-out one where only what is `shown` can be held out."""
    pairs = [pair for pair in state.pairs if state.pairs.count(pair) == 1 and pair not in state.done]
    if shown and choose.held_out:
        pairs = [pair for pair in pairs if pair in choose.world.held_out]
    return choose.pick([item for item in state.items if item.thing.pair in pairs])


def _new_pair(choose: Choice, state: State) -> Pair:
    used = {*state.done, *state.pairs}
    return choose.pick([pair for pair in choose.world.pairs(held_out=choose.held_out) if pair not in used])


def _changed(choose: Choice, state: State, item: Item, *after: Item, order: str, news: str) -> Change:
    """`order` and `news` have {} for the object. An order calls it by shape and colour, every fourth time by
    its size too if that is known, or by one word where that is enough: what is not said has to be seen.
    """
    sized = (not item.phrase or item.phrase.size is not None) and choose.chance(1 / 4)
    name, plain = (Phrase.of(item.thing, with_size=size) for size in (sized, False))
    words = (Phrase(colour=plain.colour), Phrase(plain.shape))
    enough = [word for word in words if sum(word.matches(one.thing) for one in state.items) == 1]
    if enough and choose.chance(1 / 2):
        name = choose.pick(enough)
    return Change(order.format(name.definite()), news.format(plain.definite()), state.put(item, *after))


def _start(choose: Choice, verb: Verb | None) -> State:
    """A picture to begin with, for a first change of this kind."""
    shown = choose.held_out and verb not in _MAKES_PAIRS
    count = choose.rng.randint(1, choose.roomy if verb is _resize else choose.world.max_things)
    scene = choose.world.sample_scene(choose.rng, count, held_out=shown)
    return State(scene.ground, tuple(map(Item, scene.things)))


def _change(choose: Choice, state: State, verb: Verb) -> Change:
    change = verb(choose, state)
    require(choose.world.allows(change.state.scene.things))
    return change


# kinds ------------------------------------------------------------------------------------------------------


def _edit(choose: Choice, turns: Sequence[Sequence[Verb]]) -> Steps:
    """One turn for each list of verbs; the first change is about what is held out."""
    state = _start(choose, turns[0][0])
    steps: list[Step] = [Shown(state.scene)]
    for verbs in turns:
        orders, state = list[str](), replace(state, done=())
        for verb in verbs:
            change = _change(choose, state, verb)
            choose, state = choose.free(), change.state
            orders.append(change.order)
        steps += [Said(" and ".join(orders)), Thinks(layout(state.scene)), Draws(state.scene, state.spec)]
    return tuple(steps)


def edit_combined(choose: Choice) -> Steps:
    """Edit: "remove the red circle and make the ground black"."""
    return _edit(choose, [choose.rng.sample(_VERBS, 2)])


def edit_turns(choose: Choice) -> Steps:
    """Two to four edits of different kinds, one after the other."""
    count = choose.rng.randint(2, 4)
    return again(lambda: _edit(choose, [[verb] for verb in choose.rng.sample(_VERBS, count)]))()


def ask_change(choose: Choice) -> Steps:
    """Ask "what changed?" of two pictures; one time in eight the answer is "nothing"."""
    verb = choose.pick([*_VERBS, None])
    state = _start(choose, verb)
    change = _change(choose, state, verb) if verb else Change("", "nothing", state)
    before, after = state.scene, change.state.scene
    thought = Thinks(f"before: {layout(before)}. after: {layout(after)}.")
    return Shown(before), Shown(after), Said("what changed?"), thought, Writes(change.news)


EDIT: dict[str, Task] = {f"edit{verb.__name__}": partial(_edit, turns=[[verb]]) for verb in _VERBS}
EDIT |= kinds(edit_combined, edit_turns)
