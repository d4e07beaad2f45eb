"""Frames of a video file (PyAV), decoded only when wanted."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from openbagel.config import nearest
from openbagel.data.samples import Picture
from openbagel.images import open_video


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
        if self.sample not in (choices := ("rand", "middle")):
            raise ValueError(f"sample {self.sample!r} is none of {choices}{nearest(self.sample, choices)}")

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
        return _decoded(self.content, self.indices)[self.place]


def video_frames(path: Path, indices: Sequence[int]) -> list[Picture]:
    """The frames at these rising places; nothing is decoded yet."""
    _, size = video_header(path)
    return [VideoFrame(path, size, tuple(indices), place) for place in range(len(indices))]


@lru_cache(maxsize=4096)
def video_header(path: Path) -> tuple[int, tuple[int, int]]:
    """(frames, (width, height)); a file whose header keeps no count is walked without decoding.

    ValueError when the file is missing or damaged.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return count, (stream.codec_context.width, stream.codec_context.height)


@lru_cache(maxsize=2)
def _decoded(path: Path, indices: tuple[int, ...]) -> list[Image.Image]:
    found = {}
    with open_video(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in indices:
                found[index] = frame.to_image()
            if index == indices[-1]:
                return [found[index] for index in indices]
    raise ValueError(f"{path} is truncated: it has no frame {indices[-1]}; get a complete copy of it")
