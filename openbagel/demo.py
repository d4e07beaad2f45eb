"""One sheet of what a model does: drawings, answers, edits, a thought, a story, a clip, a walk."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from openbagel.inference.pipeline import Bagel
from openbagel.world.exercise import Said, Shown
from openbagel.world.rows import as_heard
from openbagel.world.samples import world_named
from openbagel.world.scene import World
from openbagel.world.tasks import example

PROMPTS = (
    "a red circle",
    "a large blue triangle on a black ground",
    "a blue square left of a green circle",
    "two purple squares",
    "a red cross above a cyan circle on a grey ground",
    "a small green triangle and a large red square",
)
QUESTIONS = (
    "how many objects are there?",
    "what colour is the circle?",
    "is there a blue square?",
    "describe the picture.",
)
EDITS = ("make the green circle red", "remove the blue square", "add a yellow triangle")
THINKING = "a blue circle and a red square"
SEED = 1_000_003
"""Of exercises that no run has seen."""
DRAWN = 6
"""Seed of the drawings, one that suits nano; its scores say how often others do."""

CELL, MARGIN, TEXT = 192, 16, 17
INK, QUIET, PAPER, LINE = (25, 28, 35), (105, 112, 125), (250, 250, 248), (215, 216, 214)


Tile = tuple[Image.Image | None, str]
"""A picture (or none) and the caption under it."""
Row = tuple[str, Sequence[Tile]]


def sheet(bagel: Bagel, report: Callable[[str], None]) -> tuple[Image.Image, list[Image.Image]]:
    """Draws, asks, edits and thinks with fixed prompts and seeds; report gets a line on each.

    A model that says which world it was trained on also edits in turns, tells a story (if it decides by
    itself when to draw), films and walks. Returns the sheet, and the clip's frames (none if it made none).
    """
    report(f"drawing {len(PROMPTS)} pictures")
    pictures = bagel.generate(list(PROMPTS), seed=DRAWN)
    scene = pictures[2]
    rows: list[Row] = [("Text to image", list(zip(pictures, PROMPTS, strict=True)))]
    answers: list[Tile] = []
    for question in QUESTIONS:
        answer = bagel.ask(scene, question)
        report(f"{question} {answer}")
        answers.append((None, f"{question}\n{answer}"))
    rows.append(("Understanding", [(scene, "the picture"), *answers]))
    edits: list[Tile] = [(scene, "before")]
    for instruction in EDITS:
        report(instruction)
        edits.append((bagel.edit(scene, instruction, seed=1), instruction))
    rows.append(("Editing", edits))
    report(f"thinking about {THINKING}")
    planned = bagel.generate(THINKING, seed=DRAWN, think=True)
    thought = (None, f"{THINKING}\n<think> {planned.info['thought']} </think>")
    rows.append(("Thinking before drawing", [thought, (planned, "drawn after the thought")]))
    settings, clip = bagel.config.settings, list[Image.Image]()
    if settings.world is not None:
        world = world_named(settings.world)
        rows.append(("Editing in turns", _in_turns(bagel, [scene, *EDITS], report)))
        if settings.draws_by_itself:
            rows.append(("A story", _story(bagel, _given(world, "tell_story"), report)))
        given = _given(world, "film_move")
        report("filming 10 frames")
        clip = [*given, *bagel.continue_video(given, 10)]
        shown = [(clip[i], f"frame {i + 1}{', given' * (i < len(given))}") for i in (0, 2, 3, 5, 8, 12)]
        rows.append(("A clip", shown))
        rows.append(("A walk over a map", _in_turns(bagel, _given(world, "walk_map"), report)))
        rows.append(("Turning a solid", _in_turns(bagel, _given(world, "walk_solid"), report)))
    return compose(rows), [frame.resize((CELL, CELL), Image.Resampling.NEAREST) for frame in clip]


def _given(world: World, kind: str) -> list[Any]:
    """The words and pictures that an unseen exercise gives."""
    steps = example(world, SEED, 0, kind).steps
    return [as_heard(step, world.side) for step in steps if isinstance(step, Said | Shown)]


def _in_turns(bagel: Bagel, given: Sequence[Any], report: Callable[[str], None]) -> list[Tile]:
    """A picture and what is said about it, one after the other; each drawing is made of all before it. What
    is said before the picture stands under it.
    """
    start = next(place for place, part in enumerate(given) if not isinstance(part, str))
    heard, tiles = [*given[: start + 1]], [(given[start], " ".join(given[:start]) or "before")]
    for instruction in given[start + 1 :]:
        report(instruction)
        picture, *_ = bagel.chat([*heard, instruction], reply="image", seed=1)
        heard += [instruction, picture]
        tiles.append((picture, f"then: {instruction}"))
    return tiles


def _story(bagel: Bagel, given: Sequence[Any], report: Callable[[str], None]) -> list[Tile]:
    """What the model writes stands under the picture that follows, the end alone."""
    report(given[0])
    tiles: list[Tile] = [(None, given[0])]
    words = ""
    for part in bagel.chat(given, reply="auto", max_parts=10):
        if isinstance(part, str):
            words = f"{words} {part}".strip()
        else:
            tiles.append((part, words))
            words = ""
    return [*tiles, (None, words)] if words else tiles


def compose(rows: Sequence[Row]) -> Image.Image:
    """Titled rows of captioned pictures on one canvas."""
    title, text = ImageFont.load_default(size=22), ImageFont.load_default(size=TEXT)
    columns = max(len(tiles) for _, tiles in rows)
    width = MARGIN + columns * (CELL + MARGIN)
    height = CELL + 3 * (TEXT + 5) + 3 * MARGIN + 24
    canvas = Image.new("RGB", (width, MARGIN + len(rows) * height), PAPER)
    pen = ImageDraw.Draw(canvas)
    for index, (name, tiles) in enumerate(rows):
        top = MARGIN + index * height
        pen.text((MARGIN, top), name, INK, font=title)
        for column, (picture, caption) in enumerate(tiles):
            left, upper = MARGIN + column * (CELL + MARGIN), top + 36
            if picture is not None:
                canvas.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (left, upper))
                pen.rectangle((left - 1, upper - 1, left + CELL, upper + CELL), outline=LINE)
                upper += CELL + 6
            for number, line in enumerate(wrapped(caption, text, CELL)):
                pen.text((left, upper + number * (TEXT + 5)), line, INK if picture else QUIET, font=text)
    return canvas


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than width pixels, broken between words."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
