"""An exercise as a row of the ordinary data tasks: what training learns and what is exported are one thing.

draw                  t2i_pretrain {image, captions}         ask     vlm_sft {image, conversations}
edit                  unified_edit {image_list, …}           text    text {text}
thought before those  reasoning {…, thought}                 film    video_interleaved {frames, given, …}
turns, stories        web_interleaved {texts, images, learned}
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from openbagel.data.samples import Picture
from openbagel.data.tasks import Row
from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Step, Thinks, Writes
from openbagel.world.render import render, render_picture, to_picture
from openbagel.world.scene import View


@dataclass(slots=True)
class Gallery:
    """The views of one exercise, rendered together when the first of them is opened."""

    views: tuple[View, ...]
    side: int
    pictures: list[Image.Image] = field(default_factory=list, compare=False, repr=False)

    def open(self, place: int) -> Image.Image:
        if not self.pictures:
            self.pictures = [to_picture(pixels) for pixels in render(self.views, self.side)]
        return self.pictures[place]


@dataclass(frozen=True, slots=True)
class Rendering(Picture):
    """A picture of a gallery: planning a sample needs its size alone. What is opened is not to be changed."""

    gallery: Gallery
    place: int

    def open(self) -> Image.Image:
        return self.gallery.open(self.place)


def renderings(steps: Sequence[Step], side: int) -> list[Rendering]:
    """Of the pictures of all steps in order, frames too."""
    views: list[View] = []
    for step in steps:
        match step:
            case Shown(view) | Draws(view):
                views.append(view)
            case Films(frames):
                views += frames
    gallery = Gallery(tuple(views), side)
    return [Rendering(b"", (side, side), gallery, place) for place in range(len(views))]


def as_heard(step: Said | Shown, side: int) -> str | Image.Image:
    """What a model hears of a step."""
    return step.words if isinstance(step, Said) else render_picture(step.view, side)


def row(example: Example, side: int, thinks: bool = False) -> tuple[str, Row]:
    """(task, row): pictures are `Rendering`s of `side` pixels. Thoughts are left out unless it thinks; in
    turns and stories they always are.
    """
    steps = (example if thinks else example.without_thought()).steps
    pictures = renderings(steps, side)
    if not example.decides:
        match steps:
            case (Writes(words),):
                return "text", {"text": words}
            case (*_, Films()):
                return "video_interleaved", _clip(steps, pictures)
            case (Said(prompt), Draws()):
                return "t2i_pretrain", {"image": pictures[0], "captions": {"prompt": prompt}}
            case (Shown(), Said(prompt), Draws()):
                return "unified_edit", {"image_list": pictures, "instruction_list": [[prompt]]}
            case (Said(prompt), Thinks(thought), Draws()):
                fields = {"image": pictures[0], "captions": {"prompt": prompt}, "thought": thought}
                return "reasoning", fields
            case (Shown(), Said(prompt), Thinks(thought), Draws()):
                return "reasoning", {"image_list": pictures, "instruction": prompt, "thought": thought}
        if not any(isinstance(step, Draws) for step in steps):
            return "vlm_sft", _talk(steps, pictures)
    return "web_interleaved", page(steps, side)


def page(steps: Sequence[Step], side: int) -> Row:
    """Texts and pictures in order, and which of them the model makes; without thoughts."""
    kept = [step for step in steps if not isinstance(step, Thinks)]
    pictures = iter(renderings(kept, side))
    return {
        "texts": [step.words if isinstance(step, Said | Writes) else None for step in kept],
        "images": [next(pictures) if isinstance(step, Shown | Draws) else None for step in kept],
        "learned": [isinstance(step, Writes | Draws) for step in kept],
    }


def _talk(steps: Sequence[Step], pictures: list[Rendering]) -> Row:
    """Questions about pictures, each with its answer."""
    turns: list[dict[str, str]] = []
    heard, thought = "", {}
    for step in steps:
        match step:
            case Shown():
                heard += "<image>\n"
            case Said(words):
                heard += words
            case Thinks(words):
                thought = {"thought": words}
            case Writes(words):
                turns += [{"from": "human", "value": heard}, {"from": "gpt", "value": words, **thought}]
                heard, thought = "", {}
    return {**({"image": pictures} if pictures else {}), "conversations": turns}


def _clip(steps: Sequence[Step], frames: list[Rendering]) -> Row:
    """Frames that are given, then frames to draw; what is said stands before the first that is drawn."""
    given = sum(isinstance(step, Shown) for step in steps)
    found: Row = {"frames": frames, "given": given}
    said = " ".join(step.words for step in steps if isinstance(step, Said))
    if said and given:
        found["captions"] = [said if place == given else None for place in range(1, len(frames))]
    elif said:
        found["caption"] = said
    return found


def stored(value: Any, encode: Callable[[Image.Image], bytes]) -> Any:
    """A row, or a value of one, with every picture encoded."""
    if isinstance(value, Picture):
        return encode(value.open())
    if isinstance(value, dict):
        return {name: stored(item, encode) for name, item in value.items()}
    return [stored(item, encode) for item in value] if isinstance(value, list) else value
