"""An exercise as a row of the ordinary data tasks: what training learns and what is exported are one thing.

draw                  t2i_pretrain {image, captions}         ask     vlm_sft {image, conversations}
edit                  unified_edit {image_list, …}           text    text {text}
thought before those  reasoning {…, thought}                 film    video_interleaved {frames, given, …}
turns, stories        web_interleaved {texts, images, learned}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from openbagel.data.samples import Picture
from openbagel.data.tasks import Row
from openbagel.picture_files import png
from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Step, Thinks, Writes, views
from openbagel.world.render import render, render_picture, to_picture
from openbagel.world.scene import View


@dataclass(frozen=True)
class Gallery:
    """The views of one exercise, rendered together when the first of them is opened."""

    views: list[View]
    side: int

    @cached_property
    def pictures(self) -> list[Image.Image]:
        return [to_picture(pixels) for pixels in render(self.views, self.side)]


@dataclass(frozen=True, slots=True)
class Rendering(Picture):
    """A picture of a gallery: planning a sample needs its size alone. What is opened is not to be changed."""

    gallery: Gallery
    place: int

    def open(self) -> Image.Image:
        return self.gallery.pictures[self.place]


def renderings(steps: Sequence[Step], side: int) -> list[Rendering]:
    """Of the pictures of all steps in order, frames too."""
    gallery = Gallery(views(steps), side)
    return [Rendering(b"", (side, side), gallery, place) for place in range(len(gallery.views))]


def as_heard(step: Said | Shown, side: int) -> str | Image.Image:
    """What a model hears of a step."""
    return step.words if isinstance(step, Said) else render_picture(step.view, side)


def row(example: Example, side: int, thinks: bool = False) -> tuple[str, Row]:
    """(task, row): pictures are `Rendering`s of `side` pixels. Thoughts are left out unless it thinks; in
    turns and stories they always are.
    """
    steps = example.without_thought().steps
    thoughts = [step.words for step in example.steps if thinks and isinstance(step, Thinks)]
    thought = {"thought": thoughts[0]} if len(thoughts) == 1 else {}
    pictures = renderings(steps, side)
    match steps:
        case (Writes(words),):
            return "text", {"text": words}
        case (Said(words), Films()):
            return "video_interleaved", {"frames": pictures, "given": 0, "caption": words}
        case (*given, Films()):
            return "video_interleaved", {"frames": pictures, "given": len(given)}
        case (Said(prompt), Draws()):
            fields = {"image": pictures[0], "captions": {"prompt": prompt}, **thought}
            return "reasoning" if thought else "t2i_pretrain", fields
        case (Shown(), Said(prompt), Draws()) if thought:
            return "reasoning", {"image_list": pictures, "instruction": prompt, **thought}
        case (Shown(), Said(prompt), Draws()):
            return "unified_edit", {"image_list": pictures, "instruction_list": [[prompt]]}
        case (*_, Writes()) if not example.decides:
            return "vlm_sft", {"image": pictures, "conversations": _conversation(steps, thought)}
    return "web_interleaved", page(steps, side)


def _conversation(steps: Sequence[Step], thought: Row) -> list[Row]:
    turns, heard = list[Row](), ""
    for step in steps:
        if isinstance(step, Writes):
            human, gpt = {"from": "human", "value": heard}, {"from": "gpt", "value": step.words, **thought}
            turns, heard = [*turns, human, gpt], ""
        else:
            heard += step.words if isinstance(step, Said) else "<image>\n"
    return turns


def page(steps: Sequence[Step], side: int) -> Row:
    """Texts and pictures in order, and which of them the model makes; without thoughts."""
    kept = [step for step in steps if not isinstance(step, Thinks)]
    pictures = iter(renderings(kept, side))
    return {
        "texts": [step.words if isinstance(step, Said | Writes) else None for step in kept],
        "images": [next(pictures) if isinstance(step, Shown | Draws) else None for step in kept],
        "learned": [isinstance(step, Writes | Draws) for step in kept],
    }


def stored(value: Any) -> Any:
    """A row, or a value of one, with every picture as a PNG file."""
    if isinstance(value, Picture):
        return png(value.open())
    if isinstance(value, dict):
        return {name: stored(item) for name, item in value.items()}
    return [stored(item) for item in value] if isinstance(value, list) else value
