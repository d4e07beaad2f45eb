"""The kinds that the first shipped model was trained on stay as they are, byte for byte (edits since they are
made as those of several steps are).
"""

import hashlib
import json

import pytest

from openbagel.world.exercise import Draws, Example, Said, Shown, Thinks, Writes
from openbagel.world.scene import Scene, Thing, View, nano_world
from openbagel.world.tasks import example

DIGESTS = {
    "draw_one": "a195520602d3cfee",
    "draw_two": "380a1297eb92d120",
    "draw_three": "5741faab7b7488c5",
    "draw_count": "2dde3e84d3571120",
    "ask_count": "2113465384abf84a",
    "ask_colour": "205b86844635cb6c",
    "ask_shape": "30df8ea9fec63bbc",
    "ask_exists": "ca81f729f0de264a",
    "ask_relation": "48f2459b2541be2f",
    "ask_caption": "f5adf6d0055b1757",
    "edit_recolour": "12a19c69f88ad6ed",
    "edit_remove": "a486d13e76d9b0fc",
    "edit_add": "1cd2062496f8a780",
}
"""Of the examples 0 to 49 with seed 0: first those without, then those with a held-out pair."""


def things(some: tuple[Thing, ...]) -> list[object]:
    return [[t.shape, t.colour, t.size, t.x, t.y, t.rotation] for t in some]


def scene(view: View) -> list[object]:
    assert isinstance(view, Scene)
    return [view.ground, things(view.things)]


def row(made: Example) -> list[object]:
    steps = made.steps
    (prompt,) = (step.words for step in steps if isinstance(step, Said))
    assert isinstance(thought := steps[-2], Thinks)
    answer = next((step.words for step in steps if isinstance(step, Writes)), None)
    target, spec = None, None
    for step in steps:
        if isinstance(step, Draws):
            target, wanted = scene(step.view), step.spec
            phrases = [[p.shape, p.colour, p.size, p.count] for p in wanted.objects]
            spec = [phrases, list(map(list, wanted.relations)), wanted.ground, things(wanted.kept)]
    given = [scene(step.view) for step in steps if isinstance(step, Shown)]
    return [prompt, given, thought.words, answer, target, spec]


@pytest.mark.parametrize("kind", DIGESTS)
def test_old_kinds_are_unchanged(kind: str) -> None:
    digest = hashlib.sha256()
    for held_out in (False, True):
        for index in range(50):
            made = example(nano_world(), 0, index, kind, held_out)
            digest.update(json.dumps(row(made)).encode())
    assert digest.hexdigest()[:16] == DIGESTS[kind]
