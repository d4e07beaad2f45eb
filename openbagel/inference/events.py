"""What a request reports on its way; streaming, progress bars, servers and user interfaces live on these."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """The next piece of a thought."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """A denoising step was made. latents: float[h·w, C] on a grid (h, w), what the picture would be if the
    rest of the way were straight; float[frames, h·w, C] where frames are drawn together.
    """

    step: int
    steps: int
    latents: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A finished picture, or frame of a clip."""

    picture: Image.Image


@dataclass(frozen=True, slots=True)
class Done:
    """The request is complete."""


Event = Text | Thought | Preview | Picture | Done
