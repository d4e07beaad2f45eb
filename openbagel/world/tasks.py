"""The table of all kinds of exercises, and examples of them by number.

With `held_out` something held out (a pair of shape and colour, a relation, a count) is in the decisive place
(the object drawn, asked about or edited to); without, nothing held out occurs.
"""

import random
from collections.abc import Iterator

from openbagel.checks import check_choice
from openbagel.world.ask import ASK
from openbagel.world.choice import Choice, again, require
from openbagel.world.draw import DRAW
from openbagel.world.edit import EDIT
from openbagel.world.exercise import Example, Steps, Task, Words, views
from openbagel.world.motion import MOTION
from openbagel.world.reason import REASON
from openbagel.world.scene import Scene, View, World
from openbagel.world.tell import TELL

_CORPUS_EXAMPLES_PER_KIND = 150

TASKS: dict[str, Task] = DRAW | ASK | EDIT | REASON | TELL | MOTION
"""Every kind by its name; the part before "_" is its group: draw, ask, edit, think, tell, film, walk."""


def example(world: World, seed: int, index: int, kind: str, held_out: bool = False) -> Example:
    """Example `index` of a kind, with its thought; the same for the same arguments.

    Raises ValueError for an unknown kind, for one that the world has nothing for, and where nothing is held
    out.
    """
    check_choice("kind of task", kind, TASKS)
    if held_out and not world.held_out:
        raise ValueError("this world holds no pairs out; ask for examples with held_out=False")
    choose = Choice(world, random.Random(f"{seed}/{kind}/{index}/{held_out}"), held_out)
    return Example(kind, _made(choose, kind))


@again
def _made(choose: Choice, kind: str) -> Steps:
    steps = TASKS[kind](choose)
    scenes = (view for view in views(steps) if isinstance(view, Scene))
    require(choose.held_out or all(choose.world.allows_counts(scene.things) for scene in scenes))
    return steps


def sample_views(world: World, rng: random.Random, number: int) -> list[View]:
    """Pictures and frames of exercises, of every group of kinds as many; nothing held out."""
    kinds = [kind for kind in TASKS if kind != "tell_text"]
    groups = sorted({kind.partition("_")[0] for kind in kinds})
    found: list[View] = []
    for _ in range(number):
        group = rng.choice(groups)
        kind = rng.choice([kind for kind in kinds if kind.startswith(group)])
        found.append(rng.choice(views(example(world, rng.getrandbits(62), 0, kind).steps)))
    return found


def corpus(world: World) -> Iterator[str]:
    """Prompts, thoughts and answers that cover the vocabulary, to train a tokenizer on."""
    for kind in TASKS:
        for index in range(_CORPUS_EXAMPLES_PER_KIND):
            steps = example(world, 0, index, kind).steps
            yield from (step.words for step in steps if isinstance(step, Words))
