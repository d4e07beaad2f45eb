"""One sheet of what a model does: drawings, questions with answers, edits before and after, a thought."""

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from openbagel.inference.pipeline import Bagel

PROMPTS = (
    "a red circle",
    "a large blue triangle on a black ground",
    "a yellow square left of a green circle",
    "two purple squares",
    "a red cross above a cyan circle on a grey ground",
    "a small green triangle and a large red square",
)
QUESTIONS = (
    "how many objects are there?",
    "what colour is the circle?",
    "is the yellow square left of the green circle?",
    "describe the picture.",
)
EDITS = ("make the green circle red", "remove the yellow square", "add a blue triangle")
THINKING = "a blue circle and a red square"

CELL, MARGIN, TEXT = 192, 16, 17
INK, QUIET, PAPER, LINE = (25, 28, 35), (105, 112, 125), (250, 250, 248), (215, 216, 214)


Tile = tuple[Image.Image | None, str]
"""A picture (or none) and the caption under it."""


def sheet(bagel: Bagel, report: Callable[[str], None]) -> Image.Image:
    """Draws, asks, edits and thinks with fixed prompts and seeds; report gets a line on each."""
    report(f"drawing {len(PROMPTS)} pictures")
    pictures = bagel.generate(list(PROMPTS), seed=0)
    scene = pictures[2]
    rows: list[tuple[str, list[Tile]]] = [
        ("Text to image", [(p, prompt) for p, prompt in zip(pictures, PROMPTS, strict=True)])
    ]
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
    planned = bagel.generate(THINKING, seed=0, think=True)
    thought = (None, f"{THINKING}\n<think> {planned.info['thought']} </think>")
    rows.append(("Thinking before drawing", [thought, (planned, "drawn after the thought")]))
    return compose(rows)


def compose(rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
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
