"""Exercises: what is shown and said, and what the model is to write and draw, step by step.

Said("a red circle") Draws(scene)                                       draw
Shown(scene) Said("what shape is the red object?") Writes("circle")     ask
Shown(a) Said("remove the circle") Draws(b) Said("add a ring") Draws(c) edit in turns
Said("tell a story …") Writes("there is …") Draws(a) Writes(…) Draws(b) the model decides what comes next
Shown(a) Shown(b) Shown(c) Films((d, e, …))                             continue a clip
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from openbagel.world.choice import Choice
from openbagel.world.language import Phrase
from openbagel.world.scene import Ground, Relation, Thing, View


@dataclass(frozen=True, slots=True)
class Spec:
    """What a drawn picture must show: exactly these objects and no others.

    `objects` have the attributes that the prompt mentioned; `relations` are (i, relation, j) between objects
    of count one; `kept` must be where they were, looking as they did; `ground` is free if None. With `view`
    nothing else counts: the picture must show this view, and be nearer to it than to each of `wrong`.
    """

    objects: tuple[Phrase, ...] = ()
    relations: tuple[tuple[int, Relation, int], ...] = ()
    ground: Ground | None = None
    kept: tuple[Thing, ...] = ()
    view: View | None = None
    wrong: tuple[View, ...] = ()

    @property
    def total(self) -> int:
        """How many objects the picture has."""
        return sum(phrase.count for phrase in self.objects) + len(self.kept)


@dataclass(frozen=True, slots=True)
class Words:
    words: str


class Said(Words):
    """The user's words."""


class Thinks(Words):
    """What may be thought before the next step; scores do not read it."""


class Writes(Words):
    """A text that the model is to write, word for word."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture, or a frame of a clip, that is given."""

    view: View


@dataclass(frozen=True, slots=True)
class Draws:
    """A picture that the model is to draw: one that fulfils `spec`, of which `view` is an example."""

    view: View
    spec: Spec


@dataclass(frozen=True, slots=True)
class Films:
    """Frames that the model is to draw, each with the objects where they are here."""

    views: tuple[View, ...]


Step = Said | Shown | Thinks | Writes | Draws | Films
Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One exercise."""

    kind: str
    steps: Steps

    @property
    def decides(self) -> bool:
        """Whether the model is to make both texts and pictures: nobody says which of them comes next."""
        return {Writes, Draws} <= set(map(type, self.steps))

    def without_thought(self) -> "Example":
        return replace(self, steps=tuple(step for step in self.steps if not isinstance(step, Thinks)))


def views(steps: Sequence[Step]) -> list[View]:
    """What all pictures of some steps show, in order, frames too."""
    found: list[View] = []
    for step in steps:
        match step:
            case Shown(view) | Draws(view):
                found.append(view)
            case Films(frames):
                found += frames
    return found


Task = Callable[[Choice], Steps]
"""Makes one example, or finds it `Impossible`."""


def kinds(*tasks: Task) -> dict[str, Task]:
    """Tasks by their names."""
    return {task.__name__: task for task in tasks}
