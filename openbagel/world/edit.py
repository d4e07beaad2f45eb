"""Edits of pictures: what to change is said, everything else has to stay."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from openbagel.world.choice import place, roomy, some_others, unlike
from openbagel.world.exercise import Draws, Example, Said, Shown, Spec, Step, Task, Thinks, Writes
from openbagel.world.language import Phrase, layout, near_place, place_name
from openbagel.world.scene import Ground, Look, Pair, Scene, Thing, World


def editing(kind: str, scene: Scene, prompt: str, target: Scene, spec: Spec) -> Example:
    """The thought is the plan of the changed picture."""
    return Example(kind, (Shown(scene), Said(prompt), Thinks(layout(target)), Draws(target, spec)))


def edit_recolour(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "make the red circle blue"."""
    after = world.sample_look(rng, held_out=held_out)
    free = world.pairs(held_out=False)
    colours = [colour for shape, colour in free if shape == after.shape and colour != after.colour]
    before = replace(after, colour=rng.choice(colours))
    while True:
        scene = place(world, rng, [before, *some_others(world, rng, unlike(before))])
        named, *rest = scene.things
        target = replace(scene, things=(replace(named, colour=after.colour), *rest))
        if world.allows(target.things):
            break
    prompt = f"make {_name(rng, named)} {after.colour}"
    spec = Spec(ground=scene.ground, kept=target.things)
    return editing("edit_recolour", scene, prompt, target, spec)


def edit_remove(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "remove the red circle", of a picture where something else stays."""
    look = world.sample_look(rng, held_out=held_out)
    scene = place(world, rng, [look, *some_others(world, rng, unlike(look), least=1)])
    named, *rest = scene.things
    target = replace(scene, things=tuple(rest))
    spec = Spec(ground=scene.ground, kept=target.things)
    return editing("edit_remove", scene, f"remove {_name(rng, named)}", target, spec)


def edit_add(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "add a blue square"."""
    look = world.sample_look(rng, held_out=held_out)
    target = place(world, rng, [look, *some_others(world, rng, lambda _: True, least=1)], overlaps=False)
    added, *rest = target.things
    scene = replace(target, things=tuple(rest))
    phrase = Phrase.of(added, with_size=rng.random() < 1 / 2)
    spec = Spec(objects=(phrase,), ground=scene.ground, kept=scene.things)
    return editing("edit_add", scene, f"add {phrase.indefinite()}", target, spec)


def _name(rng: random.Random, thing: Thing) -> str:
    """An object whose pair is unique in its picture; one time in four with its size."""
    return Phrase.of(thing, with_size=rng.random() < 1 / 4).definite()


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a picture that is being edited. Where words left its place or looks open, `phrase` is all
    that is known of it; else it is known exactly.
    """

    thing: Thing
    phrase: Phrase | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A picture between edits."""

    ground: Ground
    items: tuple[Item, ...]

    @classmethod
    def of(cls, scene: Scene) -> "State":
        return cls(scene.ground, tuple(map(Item, scene.things)))

    @property
    def scene(self) -> Scene:
        return Scene(self.ground, tuple(item.thing for item in self.items))

    @property
    def spec(self) -> Spec:
        exact = tuple(item.thing for item in self.items if item.phrase is None)
        return Spec(tuple(x.phrase for x in self.items if x.phrase), ground=self.ground, kept=exact)

    def put(self, old: Item, *new: Item) -> "State":
        """With `old` replaced by `new`, or taken away."""
        at = self.items.index(old)
        return replace(self, items=(*self.items[:at], *new, *self.items[at + 1 :]))


@dataclass(frozen=True, slots=True)
class Change:
    """An edit: how to ask for it, how to tell of it, what comes of it, and the pairs that it was about."""

    order: str
    news: str
    state: State
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class Editor:
    """Makes random changes, each about something held out, or about nothing that is.

    `done` are pairs that an instruction was about already. A method gives None where it finds no change.
    """

    world: World
    rng: random.Random
    held_out: bool

    def start(self, verb: str) -> State:
        """A picture to begin with, for a first change of this kind."""
        shown = self.held_out and verb not in _MAKES_PAIRS
        count = self.rng.randint(1, roomy(self.world) if verb == "resize" else self.world.max_things)
        return State.of(self.world.sample_scene(self.rng, count, held_out=shown))

    def change(self, state: State, verb: str, done: tuple[Pair, ...] = ()) -> Change | None:
        made = _VERBS[verb](self, state, done)
        return made if made and self.world.allows(made.state.scene.things) else None

    def recolour(self, state: State, done: tuple[Pair, ...]) -> Change | None:
        if not (item := self._named(state, done)):
            return None
        shape, now = item.thing.pair
        colours = [c for s, c in self.world.pairs(held_out=self.held_out) if s == shape and c != now]
        if not colours:
            return None
        colour = self.rng.choice(colours)
        after = Item(replace(item.thing, colour=colour), item.phrase and replace(item.phrase, colour=colour))
        return self._changed(state, item, after, order=f"make {{}} {colour}", news=f"{{}} became {colour}")

    def resize(self, state: State, done: tuple[Pair, ...]) -> Change | None:
        if not (item := self._named(state, done, shown=True)) or item.phrase:
            return None
        size = self.rng.choice([size for size in self.world.sizes if size != item.thing.size])
        after = Item(replace(item.thing, size=size))
        return self._changed(state, item, after, order=f"make {{}} {size}", news=f"{{}} became {size}")

    def move(self, state: State, done: tuple[Pair, ...]) -> Change | None:
        """To a corner or the centre: "to the left" might be taken for a direction."""
        if not (item := self._named(state, done, shown=True)) or (item.phrase and not item.phrase.place):
            return None
        thing, others = item.thing, [x.thing for x in state.items if x is not item]
        look = Look(*thing.pair, thing.size)
        found = [self.world.find_place(self.rng, look, others) for _ in range(3)]
        free = [one for one in found if one and place_name(one.x, one.y) in _CLEAR_PLACES]
        if not free or near_place(thing, where := place_name(free[0].x, free[0].y)):
            return None
        after = Item(replace(thing, x=free[0].x, y=free[0].y), replace(Phrase.of(thing), place=where))
        where = f"to the {where}"
        return self._changed(state, item, after, order=f"move {{}} {where}", news=f"{{}} moved {where}")

    def replace(self, state: State, done: tuple[Pair, ...]) -> Change | None:
        """By another shape in the same place."""
        item, pair = self._named(state, done), self._new_pair(state, done)
        if not item or not pair or pair[0] == item.thing.shape:
            return None
        thing = replace(item.thing, shape=pair[0], colour=pair[1])
        thing = replace(thing, rotation=self.rng.choice(self.world.turns(thing.shape)))
        phrase = Phrase(*pair)
        a_new = phrase.indefinite()
        if not item.phrase or item.phrase.place:
            phrase = replace(phrase, place=place_name(thing.x, thing.y))
        return self._changed(
            state, item, Item(thing, phrase), order=f"replace {{}} with {a_new}", news=f"{{}} became {a_new}"
        )

    def remove(self, state: State, done: tuple[Pair, ...]) -> Change | None:
        """Something else stays."""
        item = self._named(state, done, shown=True)
        if not item or len(state.items) == 1:
            return None
        return self._changed(state, item, order="remove {}", news="{} is gone")

    def add(self, state: State, done: tuple[Pair, ...]) -> Change | None:
        """What is not there yet."""
        pair, count = self._new_pair(state, done), len(state.items) + 1
        if not pair or count > self.world.max_things:
            return None
        look = Look(*pair, self.rng.choice(self.world.sizes_for(count)))
        thing = self.world.find_place(self.rng, look, state.scene.things)
        if thing is None:
            return None
        phrase = Phrase.of(thing, with_size=self.rng.random() < 1 / 2)
        after = replace(state, items=(*state.items, Item(thing, phrase)))
        return Change(f"add {phrase.indefinite()}", f"{Phrase(*pair).indefinite()} is new", after, (pair,))

    def ground(self, state: State, _: tuple[Pair, ...]) -> Change:
        ground = self.rng.choice([ground for ground in self.world.grounds if ground != state.ground])
        after = replace(state, ground=ground)
        return Change(f"make the ground {ground}", f"the ground became {ground}", after)

    def _named(self, state: State, done: tuple[Pair, ...], *, shown: bool = False) -> Item | None:
        """An object that words can single out; a held-out one where only what is `shown` can be held out."""
        pairs = [item.thing.pair for item in state.items]
        fitting = [
            item
            for item, pair in zip(state.items, pairs, strict=True)
            if pairs.count(pair) == 1 and pair not in done
            if not (shown and self.held_out) or pair in self.world.held_out
        ]
        return self.rng.choice(fitting) if fitting else None

    def _new_pair(self, state: State, done: tuple[Pair, ...]) -> Pair | None:
        used = {*done, *(item.thing.pair for item in state.items)}
        pairs = [pair for pair in self.world.pairs(held_out=self.held_out) if pair not in used]
        return self.rng.choice(pairs) if pairs else None

    def _changed(self, state: State, item: Item, *after: Item, order: str, news: str) -> Change:
        """`order` and `news` have {} for the object; it is called by its size only if that is known."""
        pair = item.thing.pair
        sized = (not item.phrase or item.phrase.size) and self.rng.random() < 1 / 4
        name = Phrase.of(item.thing, with_size=bool(sized)).definite()
        pairs = (pair, *(x.thing.pair for x in after))
        news = news.format(Phrase(*pair).definite())
        return Change(order.format(name), news, state.put(item, *after), pairs)


_VERBS: dict[str, Callable[[Editor, State, tuple[Pair, ...]], Change | None]] = {
    "add": Editor.add,
    "remove": Editor.remove,
    "replace": Editor.replace,
    "recolour": Editor.recolour,
    "resize": Editor.resize,
    "move": Editor.move,
    "ground": Editor.ground,
}
_CLEAR_PLACES = {"top left", "top right", "bottom left", "bottom right", "centre"}
_MAKES_PAIRS = {"add", "replace", "recolour"}


def _single(world: World, rng: random.Random, held_out: bool, *, verb: str) -> Example:
    return _in_turns(f"edit_{verb}", Editor(world, rng, held_out), lambda: [[verb]])


def edit_combined(world: World, rng: random.Random, held_out: bool) -> Example:
    """Edit: "remove the red circle and make the ground black"."""
    return _in_turns("edit_combined", Editor(world, rng, held_out), lambda: [rng.sample([*_VERBS], 2)])


def edit_turns(world: World, rng: random.Random, held_out: bool) -> Example:
    """Two to four edits of different kinds, one after the other."""
    editor, count = Editor(world, rng, held_out), rng.randint(2, 4)
    return _in_turns("edit_turns", editor, lambda: [[verb] for verb in rng.sample([*_VERBS], count)])


def _in_turns(kind: str, editor: Editor, verbs: Callable[[], list[list[str]]]) -> Example:
    """Tries until all changes can be made; the first is about what is held out."""
    while True:
        if steps := _steps(editor, verbs()):
            return Example(kind, tuple(steps))


def _steps(editor: Editor, turns: list[list[str]]) -> list[Step]:
    """One turn for each list of verbs; nothing where a change is impossible."""
    state = editor.start(turns[0][0])
    steps: list[Step] = [Shown(state.scene)]
    for verbs in turns:
        orders: list[str] = []
        done: tuple[Pair, ...] = ()
        for verb in verbs:
            change = editor.change(state, verb, done)
            if change is None:
                return []
            editor, state, done = replace(editor, held_out=False), change.state, done + change.pairs
            orders.append(change.order)
        target = state.scene
        steps += [Said(" and ".join(orders)), Thinks(layout(target)), Draws(target, state.spec)]
    return steps


def ask_change(world: World, rng: random.Random, held_out: bool) -> Example:
    """Ask "what changed?" of two pictures; one time in eight the answer is "nothing"."""
    editor = Editor(world, rng, held_out)
    while True:
        verb = rng.choice([*_VERBS, "nothing"])
        state = editor.start(verb)
        change = Change("", "nothing", state) if verb == "nothing" else editor.change(state, verb)
        if change:
            break
    before, after = state.scene, change.state.scene
    thought = Thinks(f"before: {layout(before)}. after: {layout(after)}.")
    steps = (Shown(before), Shown(after), Said("what changed?"), thought, Writes(change.news))
    return Example("ask_change", steps)


EDIT: dict[str, Task] = {
    "edit_add": edit_add,
    "edit_remove": edit_remove,
    "edit_replace": partial(_single, verb="replace"),
    "edit_recolour": edit_recolour,
    "edit_resize": partial(_single, verb="resize"),
    "edit_move": partial(_single, verb="move"),
    "edit_ground": partial(_single, verb="ground"),
    "edit_combined": edit_combined,
    "edit_turns": edit_turns,
}
