"""A row of data on its way to segments: planned from headers, decoded in a worker, encoded by the trainer.

    row ── task ──> [Text | Look | Draw] ── decode ──> [Text | VitImage | Pixels] ── encode ──> [Segment]
           sizes come from headers           workers                autoencoder and noise: train/latents.py

Nothing here draws from a global generator: whatever is random is derived from (seed, dataset, epoch, row,
purpose), so that it depends on no worker, rank or order.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from openbagel.checks import check_choice
from openbagel.config import BagelConfig
from openbagel.images import ImageLimits, to_pixels
from openbagel.picture_files import open_picture, open_video, picture_of, picture_size
from openbagel.sequence import Span, Text, VitImage


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
        return cls(content, picture_size(content))

    def open(self) -> Image.Image:
        """RGB; ValueError when it is damaged or truncated."""
        return open_picture(self.content)


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
    return tuple(map(_decoded, parts))


def _decoded(part: Part) -> Text | VitImage | Pixels:
    if isinstance(part, Text):
        return part
    if isinstance(part, Look):
        return VitImage(part.picture and to_pixels(part.limits.resize(part.picture.open(), part.num_images)))
    frames = tuple(to_pixels(part.limits.resize(picture.open())) for picture in part.pictures)
    return Pixels(frames, part.role, part.position_step, part.copies)


@dataclass(frozen=True, slots=True)
class Extent:
    """What a sample costs: its tokens, and the (query, key) pairs that attention computes."""

    tokens: int
    pairs: int


def extent(parts: Iterable[Part], config: BagelConfig) -> Extent:
    """Counts a sample as packing will lay it out, from headers alone."""
    spans: list[Span] = []
    for part in parts:
        hidden = isinstance(part, Draw) and part.role is Role.TARGET
        copies = part.copies if isinstance(part, Draw) else 1
        spans += [Span(0, _length(part, config), isinstance(part, Text), hidden)] * copies
    return Extent(sum(span.length for span in spans), visible_pairs(spans))


def visible_pairs(spans: Iterable[Span]) -> int:
    """(query, key) pairs of one sample that see each other; where its spans start does not matter."""
    pairs = before = 0
    for span in spans:
        own = span.length * (span.length + 1) // 2 if span.causal else span.length**2
        pairs += span.length * before + own
        before += 0 if span.hidden else span.length
    return pairs


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


# frames of a video file, decoded (PyAV) only when wanted ---------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampler:
    """Which frames of a video are seen: a random count of them, one from each of as many equal stretches.

    sample: "rand" takes a random frame of its stretch, "middle" the middle one.
    """

    max_num_frames: int = 12
    min_num_frames: int = 8
    sample: str = "rand"

    def __post_init__(self) -> None:
        least, most = self.min_num_frames, self.max_num_frames
        if not 1 <= least <= most:
            raise ValueError(f"min_num_frames {least} must lie in 1 … max_num_frames {most}")
        check_choice("sample", self.sample, ("rand", "middle"))

    def indices(self, length: int, rng: random.Random) -> tuple[int, ...]:
        """Rising places in a video of `length` frames: all of them when it is short."""
        count = min(rng.randint(self.min_num_frames, self.max_num_frames), length)
        bounds = [index * length // count for index in range(count + 1)]
        stretches = zip(bounds, bounds[1:], strict=False)
        if self.sample == "middle":
            return tuple((first + end - 1) // 2 for first, end in stretches)
        return tuple(rng.randrange(first, end) for first, end in stretches)


def evenly(count: int, length: int) -> tuple[int, ...]:
    """`count` places from the first frame to the last."""
    return tuple(index * (length - 1) // max(count - 1, 1) for index in range(count))


@dataclass(frozen=True, slots=True)
class VideoFrame(Picture):
    """One of the wanted frames of a video; opening the first decodes all of them in one pass."""

    indices: tuple[int, ...]
    place: int

    def open(self) -> Image.Image:
        assert isinstance(self.content, Path)
        return _frames_at(self.content, self.indices)[self.place]


def video_frames(path: Path, choose: Callable[[int], tuple[int, ...]]) -> list[Picture]:
    """The frames at the rising places that are chosen from so many; nothing is decoded yet."""
    length, size = video_header(path)
    indices = choose(length)
    return [VideoFrame(path, size, indices, place) for place in range(len(indices))]


@lru_cache(maxsize=4096)
def video_header(path: Path) -> tuple[int, tuple[int, int]]:
    """(frames that can be shown, (width, height)); a file without an index is walked, nothing decoded.

    A clip that was cut from another without encoding it anew also holds frames that are not shown, or lacks
    the whole frame that its first ones build on. ValueError when the file is missing or damaged.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        turned = any(frame.rotation % 180 for frame in islice(container.decode(stream), 1))
        index = stream.frames and getattr(stream, "index_entries", ())  # which older versions of PyAV lack
        shown = dropwhile(lambda frame: not frame.is_keyframe, index or _packets(path))
        if not (count := sum(not frame.is_discard for frame in shown)):
            raise ValueError(f"{path} holds no frame that can be shown; cut it anew, from a whole frame on")
        return count, (height, width) if turned else (width, height)


def _packets(path: Path) -> Iterator[Any]:
    with open_video(path) as container:
        yield from (packet for packet in container.demux(video=0) if packet.size)


@lru_cache(maxsize=2)
def _frames_at(path: Path, indices: tuple[int, ...]) -> list[Image.Image]:
    with open_video(path) as container:
        decoded = enumerate(islice(container.decode(video=0), indices[-1] + 1))
        found = {index: picture_of(frame) for index, frame in decoded if index in indices}
    if indices[-1] in found:
        return [found[index] for index in indices]
    raise ValueError(f"{path} is truncated: it has no frame {indices[-1]}; get a complete copy of it")
