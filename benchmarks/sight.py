"""What a drawing keeps of the object that it was shown: its shape, size, colour and place.

python -m benchmarks.sight --model nano --samples 64

Pictures of one object are edited, the object called by its colour alone ("make the red object large"), and
the frame after three of a clip is drawn. Nothing but the pictures says what the shape is. The judge reads
each drawing back; where it finds one object, that is compared with the right one. A place is right within
0.06 of the side, and for moves within the cell that was named.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

from PIL import Image

from openbagel import Bagel
from openbagel.evals.world import BATCH, SEED
from openbagel.world.exercise import Films, Shown
from openbagel.world.judge import parse
from openbagel.world.language import places
from openbagel.world.render import render_picture
from openbagel.world.samples import world_named
from openbagel.world.scene import Scene, Thing
from openbagel.world.tasks import example

WORLD = world_named("nano")
CORNER = "top left"
NEAR = 0.06
Question = tuple[list[Image.Image | str], Thing]
"""What is shown and said, and the object that is right."""


def edits(change: Callable[[Thing], tuple[str, Thing]]) -> Iterator[Question]:
    rng = random.Random(SEED)
    while True:
        scene = WORLD.sample_scene(rng, 1)
        words, right = change(scene.things[0])
        yield [render_picture(scene, WORLD.side), words], right


def recoloured(thing: Thing) -> tuple[str, Thing]:
    colour = WORLD.colours[WORLD.colours.index(thing.colour) - 1]
    return f"make the {thing.colour} object {colour}", replace(thing, colour=colour)


def resized(thing: Thing) -> tuple[str, Thing]:
    size = WORLD.sizes[WORLD.sizes.index(thing.size) - 1]
    return f"make the {thing.colour} object {size}", replace(thing, size=size)


def moved(thing: Thing) -> tuple[str, Thing]:
    return f"move the {thing.colour} object to the {CORNER}", replace(thing, x=1 / 6, y=1 / 6)


def frames() -> Iterator[Question]:
    for number in count():
        steps = example(WORLD, SEED, number, "film_move").steps
        films = steps[-1]
        assert isinstance(films, Films) and isinstance(films.views[0], Scene)
        if len(films.views[0].things) == 1:
            shown = [render_picture(step.view, WORLD.side) for step in steps if isinstance(step, Shown)]
            yield [*shown], films.views[0].things[0]


def drawn(bagel: Bagel, questions: list[Question], film: bool) -> list[Image.Image]:
    made = list[Any]()
    for first in range(0, len(questions), BATCH):
        numbered = list(enumerate(questions))[first : first + BATCH]
        if film:
            some = [bagel.film_request(heard, num_frames=1, seed=seed) for seed, (heard, _) in numbered]
        else:
            edit = {"size": None, "think": False, "sampling": bagel.config.settings.edit}
            some = [bagel.draw_request(heard, seed=seed, **edit) for seed, (heard, _) in numbered]
        made += bagel.engine.drive_all(some)
    return [one[0] if film else one for one in made]


def compare(pictures: list[Image.Image], questions: list[Question], cell: str | None) -> list[int]:
    """One object found; of those: shape, size, colour, place."""
    right = [0] * 5
    for picture, (_, wanted) in zip(pictures, questions, strict=True):
        scene = parse(picture, WORLD).scene
        if scene is None or len(scene.things) != 1:
            continue
        (found,) = scene.things
        near = max(abs(found.x - wanted.x), abs(found.y - wanted.y)) <= NEAR
        looks = [getattr(found, name) == getattr(wanted, name) for name in ("shape", "size", "colour")]
        for place, value in enumerate([True, *looks, cell in places(found) if cell else near]):
            right[place] += value
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description="What a drawing keeps of the object that it was shown.")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    bagel = Bagel.load(given.model)
    print(f"of {given.samples}\tone object\tshape\tsize\tcolour\tplace")
    kinds = {
        "recolour": edits(recoloured),
        "resize": edits(resized),
        "move": edits(moved),
        "next frame": frames(),
    }
    for kind, source in kinds.items():
        questions = list(islice(source, given.samples))
        pictures = drawn(bagel, questions, kind == "next frame")
        found = compare(pictures, questions, CORNER if kind == "move" else None)
        print("\t".join([kind, *map(str, found)]), flush=True)


if __name__ == "__main__":
    main()
