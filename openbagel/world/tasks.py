"""The table of all kinds of exercises, and examples of them by number.

With `held_out` something held out (a pair of shape and colour, a relation, a count) is in the decisive place
(the object drawn, asked about or edited to); without, nothing held out occurs.
"""

import random
from collections import Counter
from collections.abc import Iterator

from openbagel.config import nearest
from openbagel.world.ask import ASK
from openbagel.world.draw import DRAW
from openbagel.world.edit import EDIT
from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Task, Thinks, Writes
from openbagel.world.motion import MOTION
from openbagel.world.reason import REASON
from openbagel.world.scene import Scene, World
from openbagel.world.tell import TELL

_CORPUS_EXAMPLES_PER_KIND = 150

TASKS: dict[str, Task] = DRAW | ASK | EDIT | REASON | TELL | MOTION
"""Every kind by its name; the part before "_" is its group: draw, ask, edit, think, tell, film, walk."""


def example(world: World, seed: int, index: int, kind: str, held_out: bool = False) -> Example:
    """Example `index` of a kind, with its thought; the same for the same arguments.

    Raises ValueError for an unknown kind, for one that the world has nothing for, and where nothing is held
    out.
    """
    if kind not in TASKS:
        raise ValueError(f"unknown kind of task {kind!r}{nearest(kind, TASKS)}; there are {', '.join(TASKS)}")
    if held_out and not world.held_out:
        raise ValueError("this world holds no pairs out; ask for examples with held_out=False")
    rng = random.Random(f"{seed}/{kind}/{index}/{held_out}")
    while True:
        made = TASKS[kind](world, rng, held_out)
        if held_out or not _shows_held_out_count(world, made):
            return made


def _shows_held_out_count(world: World, made: Example) -> bool:
    if not world.held_out_counts:
        return False
    shown = [step.view for step in made.steps if isinstance(step, Shown | Draws)]
    shown += [view for step in made.steps if isinstance(step, Films) for view in step.views]
    scenes = {view for view in shown if isinstance(view, Scene)}
    counts = (Counter(thing.pair for thing in scene.things) for scene in scenes)
    return any(not world.held_out_counts.isdisjoint(count.items()) for count in counts)


def corpus(world: World) -> Iterator[str]:
    """Prompts, thoughts and answers that cover the vocabulary, to train a tokenizer on."""
    for kind in TASKS:
        for index in range(_CORPUS_EXAMPLES_PER_KIND):
            steps = example(world, 0, index, kind).steps
            yield from (step.words for step in steps if isinstance(step, Said | Thinks | Writes))
