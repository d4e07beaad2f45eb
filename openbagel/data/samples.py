"""A row of data on its way to segments: planned from headers, decoded in a worker, encoded by the trainer.

    row ── task ──> [Text | Look | Draw] ── decode ──> [Text | VitImage | Pixels] ── encode ──> [Segment]
           sizes come from headers           workers                autoencoder and noise: train/latents.py

Nothing here draws from a global generator: whatever is random is derived from (seed, dataset, epoch, row,
purpose), so that it depends on no worker, rank or order.
"""

import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from openbagel.config import BagelConfig
from openbagel.images import ImageLimits, open_picture, picture_size, to_pixels
from openbagel.sequence import Text, VitImage


class BadRow(ValueError):
    """A row that cannot be used; the message says what is wrong with which field and how to mend it."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is decoded only when wanted; `size` is (width, height) in pixels, from its header."""

    content: bytes | Path | Image.Image
    size: tuple[int, int]

    @classmethod
    def of(cls, content: bytes | Path | Image.Image) -> "Picture":
        """ValueError when there is no such file, or it is no picture or too large to be safe."""
        return cls(content, picture_size(_opened(content)))

    def open(self) -> Image.Image:
        """RGB; ValueError when it is damaged or truncated."""
        return open_picture(_opened(self.content))


def _opened(content: bytes | Path | Image.Image) -> io.BytesIO | Path | Image.Image:
    return io.BytesIO(content) if isinstance(content, bytes) else content


class Role(StrEnum):
    """What a picture in the latents is for."""

    CONDITION = "condition"
    """Clean; everything after it sees it."""
    TARGET = "target"
    """Noised and learned; nothing else sees it."""
    GROUP = "group"
    """Noised and learned, frames at one time in full attention; later parts see its noisy tokens (diffusion
    forcing)."""


@dataclass(frozen=True, slots=True)
class Look:
    """A picture the model looks at; None: a dropped condition. num_images share the area limit."""

    picture: Picture | None
    limits: ImageLimits
    num_images: int = 1


@dataclass(frozen=True, slots=True)
class Draw:
    """Pictures in the latents, the frames of one split; none: a dropped condition."""

    pictures: tuple[Picture, ...]
    limits: ImageLimits
    role: Role
    position_step: int = 0
    """Rotary positions from a frame to the next."""
    copies: int = 1
    """Noised copies of a target, each at its own time: they share what comes before."""


Part = Text | Look | Draw


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """A decoded `Draw`: frames float32[3, H, W] in [-1, 1] at their final sizes."""

    frames: tuple[Tensor, ...]
    role: Role
    position_step: int = 0
    copies: int = 1


@dataclass(frozen=True, slots=True, order=True)
class SampleId:
    """Names one use of one row; all its randomness comes from here."""

    dataset: str
    epoch: int
    row: int

    def random(self, seed: int, purpose: str) -> random.Random:
        return random.Random(f"{seed}/{self.dataset}/{self.epoch}/{self.row}/{purpose}")

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.random(seed, purpose).getrandbits(62))


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A decoded sample."""

    id: SampleId
    parts: tuple[Text | VitImage | Pixels, ...]


class Dataset(Protocol):
    """One group of the mixture, as packing and loading see it."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def is_mandatory(self) -> bool: ...

    @property
    def blocks(self) -> Sequence[int]:
        """Rows of each block that is read as a whole (a row group, a file); rows are numbered through all."""
        ...

    def parts(self, row: int, rng: random.Random) -> list[Part]:
        """The row's sample, nothing decoded. BadRow when the row cannot be used."""
        ...

    def where(self, row: int) -> str:
        """The place of a row in words: file, row group, row."""
        ...


def decode(parts: Iterable[Part]) -> tuple[Text | VitImage | Pixels, ...]:
    """Opens, resizes and normalises every picture. ValueError when one is damaged."""
    decoded: list[Text | VitImage | Pixels] = []
    for part in parts:
        match part:
            case Text():
                decoded.append(part)
            case Look(picture, limits, num_images):
                pixels = to_pixels(limits.resize(picture.open(), num_images)) if picture else None
                decoded.append(VitImage(pixels))
            case Draw(pictures, limits):
                frames = tuple(to_pixels(limits.resize(picture.open())) for picture in pictures)
                decoded.append(Pixels(frames, part.role, part.position_step, part.copies))
    return tuple(decoded)


@dataclass(frozen=True, slots=True)
class Extent:
    """What a sample costs: its tokens, and the (query, key) pairs that attention computes."""

    tokens: int
    pairs: int


def extent(parts: Iterable[Part], config: BagelConfig) -> Extent:
    """Counts a sample as packing will lay it out, from headers alone."""
    tokens = pairs = visible = 0
    for part in parts:
        length = _length(part, config)
        hidden = isinstance(part, Draw) and part.role is Role.TARGET
        copies = part.copies if isinstance(part, Draw) else 1
        own = length * (length + 1) // 2 if isinstance(part, Text) else length * length
        tokens += copies * length
        pairs += copies * (length * visible + own)
        visible += 0 if hidden else length
    return Extent(tokens, pairs)


def _length(part: Part, config: BagelConfig) -> int:
    if isinstance(part, Text):
        return len(part.ids) + (0 if part.bare else 2)
    if isinstance(part, Draw):
        pictures, num_images, side = part.pictures, 1, config.latent_stride
    else:
        pictures, num_images = (part.picture,) if part.picture else (), part.num_images
        side = config.vit.patch_size if config.vit else 1  # without a ViT every look is dropped
    sizes = [part.limits.fit(*picture.size, num_images) for picture in pictures]
    return sum((width // side) * (height // side) + 2 for width, height in sizes)
