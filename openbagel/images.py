"""Pictures on their way in and out: opening, the resize rule, patches, position ids and the 2-D position
table.

Shapes: H, W pixels; h, w patches; C channels of a pixel; p pixels of a patch side; D width of the model.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from openbagel.checks import extra, retold

MAX_PICTURE_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
MAX_FRAMES = 256


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Sizes a picture may have once resized: both sides multiples of stride, in pixels."""

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024
    square: bool = False
    """Both sides become max_size, whatever the picture's shape, as the paper's alignment stage has it."""

    def fit(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """(width, height) after resizing; the area limit is shared by num_images. Source:
        reference/transforms.py.

        The area correction multiplies the sides by a ratio of areas, as the reference does and the weights
        saw.
        """
        if self.square:
            return self._scaled((1, 1), self.max_size)
        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        size = self._scaled((width, height), scale)
        budget = self.max_pixels / num_images
        if size[0] * size[1] > budget:
            size = self._scaled(size, budget / (size[0] * size[1]))
        if max(size) > self.max_size:
            size = self._scaled(size, self.max_size / max(size))
        return size

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        stride = self.stride
        width, height = (max(stride, round(round(side * scale) / stride) * stride) for side in size)
        return width, height

    def resize(self, picture: Image.Image, num_images: int = 1) -> Image.Image:
        size = self.fit(*picture.size, num_images)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


PictureSource = str | Path | bytes | BinaryIO | Image.Image
"""A file's path, encoded bytes or an open file of them, or a picture."""


def open_picture(source: PictureSource) -> Image.Image:
    """An RGB picture, its transparency laid on white.

    Raises ValueError naming the file and the remedy when it is missing, no picture, truncated, or too large
    to be safe.
    """
    with _header(source) as picture:
        return _rgb(picture)


def picture_size(source: PictureSource) -> tuple[int, int]:
    """(width, height) from the header alone; raises as `open_picture` does."""
    with _header(source) as picture:
        return picture.size


@contextmanager
def _header(source: PictureSource) -> Iterator[Image.Image]:
    """A picture with its header read and judged; what fails inside is told as the picture's fault."""
    if isinstance(source, Image.Image):
        yield source
        return
    name = source if isinstance(source, str | Path) else "the picture"
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise ValueError(f"no such picture: {name}; give the path of a PNG, JPEG or WebP file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MAX_PICTURE_PIXELS:
                    raise Image.DecompressionBombError(f"{width}x{height}, more than {MAX_PICTURE_PIXELS:,}")
                yield picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} unpacks to too many pixels ({error}); make it smaller first") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in one of the formats {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is damaged or truncated ({error}); get a complete copy of it") from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture.copy()
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def to_pixels(picture: Image.Image) -> Tensor:
    """float32[3, H, W] in [-1, 1]."""
    return normalised(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))


def normalised(pixels: Tensor) -> Tensor:
    """uint8[H, W, 3] to float32[3, H, W] in [-1, 1]."""
    return (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def to_picture(pixels: Tensor) -> Image.Image:
    """float[3, H, W] in [-1, 1] to a picture; values are clamped and truncated, as the reference does."""
    scaled = (pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(scaled.permute(1, 2, 0).to("cpu", torch.uint8).numpy())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture, its folder first; PNG files carry `picture.info` (seed, settings, thought)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = PngInfo()
    for key, value in picture.info.items():
        if value is not None:
            notes.add_itxt(str(key), str(value))
    picture.save(path, pnginfo=notes)  # other formats know no such option and leave it out


def read_frames(path: Path) -> list[Image.Image]:
    """The RGB frames of a video or GIF file, or of a still picture; raises as `open_picture` does."""
    if path.suffix.lower() in VIDEOS:
        with open_video(path) as container:
            frames = [frame.to_image() for frame in islice(container.decode(video=0), MAX_FRAMES + 1)]
    else:
        with _header(path) as picture:
            frames = [_rgb(frame) for frame in islice(ImageSequence.Iterator(picture), MAX_FRAMES + 1)]
    if len(frames) > MAX_FRAMES:
        raise ValueError(f"{path} has more than {MAX_FRAMES} frames; cut it to the last few")
    return frames


@contextmanager
def open_video(path: Path) -> Iterator[Any]:
    """A PyAV container; what fails inside is told as the file's fault."""
    av = extra("av", "video", "reading videos")
    if not path.is_file():
        raise ValueError(f"no such video: {path}; give the path of a video file")
    message = f"{path} cannot be read as a video ({{error}}); get a complete copy of it"
    with retold(message, av.error.FFmpegError, IndexError), av.open(str(path)) as container:
        yield container


def clip_writer(path: Path, fps: float) -> Callable[[Sequence[Image.Image]], None]:
    """What writes frames of one size to a GIF or MP4 file, as its suffix says, its folder first.

    ValueError at once when the suffix or fps are impossible, or PyAV is missing.
    """
    write = {".gif": _write_gif, ".mp4": _write_mp4}.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"{path} is no clip; end its name with .gif or .mp4")
    if not 0 < fps <= 100:
        raise ValueError(f"fps {fps} must be above 0 and at most 100")
    if write is _write_mp4:
        extra("av", "video", "writing MP4 files")
    return partial(write, path, fps)


def _write_gif(path: Path, fps: float, frames: Sequence[Image.Image]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = frames
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def _write_mp4(path: Path, fps: float, frames: Sequence[Image.Image]) -> None:
    """H.264 with every second colour sample, as every player reads it; an odd last row or column is cut."""
    av = extra("av", "video", "writing MP4 files")
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = (side // 2 * 2 for side in frames[0].size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "12"}
        for frame in frames:
            cut = frame.convert("RGB").crop((0, 0, width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(cut)))
        container.mux(stream.encode())


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """float[C, H, W] to float[h·w, p·p·C], patches row by row, inside a patch (row, column, channel)."""
    channels, height, width = image_CHW.shape
    h, w = height // patch, width // patch
    tiles = image_CHW.reshape(channels, h, patch, w, patch).permute(1, 3, 2, 4, 0)
    return tiles.reshape(h * w, patch * patch * channels)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of patchify: float[h·w, p·p·C] to float[C, h·p, w·p]."""
    h, w = grid
    tiles = tokens.reshape(h, w, patch, patch, -1).permute(4, 0, 2, 1, 3)
    return tiles.reshape(-1, h * patch, w * patch)


def grid_position_ids(grid: tuple[int, int], side: int, stretch: bool) -> Tensor:
    """int64[h·w]: the row of a side·side position table that each patch reads.

    stretch=False indexes row·side + column and needs h, w <= side (ValueError otherwise); stretch=True
    spreads the grid over the whole table (`interpolate_pos` of the reference), in float32 as the reference
    computes it.
    """
    h, w = grid
    if stretch:
        edges = torch.arange(1 / side, 1.0, 1 / side)
        places = (torch.arange(0, 1 - 1e-6, 1 / count) for count in (h, w))
        rows, columns = (torch.bucketize(place, edges, right=True) for place in places)
    elif max(h, w) > side:
        table = f"{side}x{side} position table"
        raise ValueError(f"a grid of {h}x{w} patches does not fit the {table}; use a smaller picture")
    else:
        rows, columns = torch.arange(h), torch.arange(w)
    return (rows[:, None] * side + columns).flatten()


def sincos_table(side: int, width: int) -> Tensor:
    """float32[side·side, D]: the first half of D encodes the column, the second the row; each half is [sin |
    cos].

    Angles are position / 10000^(i / (D/4)). Computed in float64, rounded once.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    encoded = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = encoded.repeat(side, 1)
    rows = encoded.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
