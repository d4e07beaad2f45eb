"""Picture and video files: judged by their header, read as RGB, written.

Pillow only, no tensors: the decoders of a server import this and nothing heavier.
"""

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from openbagel.checks import extra, retold

MAX_PICTURE_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
MAX_FRAMES = 256
ORIENTATION = 0x0112
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = dict(enumerate(_TURNS.split(), 2))
"""The turn, a name of `Image.Transpose`, that each value of the EXIF tag asks for."""
FAULTS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
FAULTS += (AssertionError, EOFError, RuntimeError, struct.error)
"""What Pillow raises over broken files, memory that is missing apart."""

PictureSource = str | Path | bytes | BinaryIO | Image.Image
"""A file's path, encoded bytes or an open file of them, or a picture."""


def open_picture(
    source: PictureSource,
    *,
    formats: list[str] | tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PICTURE_PIXELS,
    max_side: int | None = None,
) -> Image.Image:
    """An RGB picture, its transparency laid on white, turned as its EXIF tag says (cameras store pictures as
    they were held); of several frames the first.

    Raises ValueError naming the file and the remedy when it is missing, no picture, truncated, or too large
    to be safe; size and format are judged before any pixel is unpacked.
    """
    with _header(source, formats, max_pixels, max_side) as picture:
        return _rgb(_upright(picture))


def picture_size(source: PictureSource) -> tuple[int, int]:
    """(width, height) of what `open_picture` gives, from the header alone; raises as that does."""
    with _header(source) as picture:
        return (picture.height, picture.width) if _orientation(picture) in (5, 6, 7, 8) else picture.size


@contextmanager
def _header(
    source: PictureSource,
    formats: list[str] | tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PICTURE_PIXELS,
    max_side: int | None = None,
) -> Iterator[Image.Image]:
    """A picture with its header read and judged; what fails inside is told as the picture's fault."""
    name = "the picture"
    if isinstance(source, str | Path):
        name = _found(source, "picture")
    elif not (isinstance(source, bytes | Image.Image) or hasattr(source, "read")):
        told = "a path, the bytes of a file, an open file or a PIL picture"
        raise ValueError(f"a picture is {told}, not {type(source).__name__}")
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=formats) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width}x{height}, more than {max_pixels:,}")
            if max(width, height) > (max_side or max_pixels):
                raise Image.DecompressionBombError(f"{width}x{height}, a side above {max_side:,}")
            yield picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} unpacks to too many pixels ({error}); make it smaller first") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in one of the formats {', '.join(formats)}") from None
    except FAULTS as error:
        raise ValueError(f"{name} is damaged or truncated ({error}); get a complete copy of it") from None


def _found(path: str | Path, kind: str) -> str:
    """A path as errors name it. ValueError when there is no such file; what can be no path is cut short."""
    name = str(path)
    if os.path.isfile(name):
        return name
    odd = len(name) > 200 or any(mark in name for mark in ("http:", "https:", "data:"))
    more = "; URLs are not fetched, and base64 is not decoded" if odd else ""
    raise ValueError(f"no such {kind}: {name[:200]}{more}; give the path of a {kind} file")


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says, then without notes, so that nobody turns it again.
    `ImageOps.exif_transpose` would write the other tags anew, and fail on odd ones."""
    if turn := TURNS.get(_orientation(picture)):
        picture = picture.transpose(Image.Transpose[turn])
        picture.info.clear()
    return picture


def _orientation(picture: Image.Image) -> Any:
    """Of the tags before the pixels; the method of PNG files would unpack all pixels to look behind them.
    Broken tags say nothing. TIFF files are turned by Pillow itself.
    """
    with suppress(*FAULTS):
        return picture.format != "TIFF" and Image.Image.getexif(picture).get(ORIENTATION)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture.copy()
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    deep = picture.mode in ("I", "F") and picture.getextrema()[1] > 255  # pyright: ignore[reportOperatorIssue]
    if deep or picture.mode.startswith("I;16"):  # `convert` would cut off all above 255
        picture = picture.convert("I").point([round(value / 257) for value in range(2**16)], "L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture, its folder first; PNG files carry `picture.info` (seed, settings, thought)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = PngInfo()
    for key, value in picture.info.items():
        if value is not None:
            notes.add_itxt(str(key), str(value))
    picture.save(path, pnginfo=notes)  # other formats know no such option and leave it out


def png(picture: Image.Image) -> bytes:
    """A picture's bytes as a PNG file, without notes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def read_frames(path: Path) -> list[Image.Image]:
    """The RGB frames of a video or GIF file, or of a still picture; raises as `open_picture` does."""
    if path.suffix.lower() in VIDEOS:
        with open_video(path) as container:
            frames = [picture_of(frame) for frame in islice(container.decode(video=0), MAX_FRAMES + 1)]
    else:
        with _header(path) as picture:
            frames = [_rgb(_upright(f)) for f in islice(ImageSequence.Iterator(picture), MAX_FRAMES + 1)]
    if len(frames) > MAX_FRAMES:
        raise ValueError(f"{path} has more than {MAX_FRAMES} frames; cut it to the last few")
    return frames


@contextmanager
def open_video(path: Path) -> Iterator[Any]:
    """A PyAV container; what fails inside is told as the file's fault."""
    av = extra("av", "video", "reading videos")
    message = f"{_found(path, 'video')} cannot be read as a video ({{error}}); get a complete copy of it"
    with retold(message, av.error.FFmpegError, IndexError), av.open(str(path)) as container:
        yield container


def picture_of(frame: Any) -> Image.Image:
    """A decoded frame of a video the right way up: a phone that was held upright writes a rotation."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def clip_writer(path: Path, fps: float) -> Callable[[Sequence[Image.Image]], None]:
    """What writes frames of one size to a GIF or MP4 file, as its suffix says. Its folder is made at once.

    ValueError (or an OSError) at once when the suffix or fps are impossible, PyAV is missing, or the file
    cannot be written.
    """
    write = {".gif": _write_gif, ".mp4": _write_mp4}.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"{path} is no clip; end its name with .gif or .mp4")
    if not 0 < fps <= 100:
        raise ValueError(f"fps {fps} must be above 0 and at most 100")
    if write is _write_mp4:
        extra("av", "video", "writing MP4 files")
    make_place(path, "a .gif or .mp4 file")
    return partial(write, path, fps)


def make_place(path: Path, kind: str, *, fits: bool = True) -> None:
    """Makes a file's folder. ValueError, or an OSError, where a file of its name could not be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not fits or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; name {kind} in a folder of yours")


def _write_gif(path: Path, fps: float, frames: Sequence[Image.Image]) -> None:
    first, *others = frames
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def _write_mp4(path: Path, fps: float, frames: Sequence[Image.Image]) -> None:
    """H.264 with every second colour sample, as every player reads it; an odd last row or column is cut."""
    av = extra("av", "video", "writing MP4 files")
    width, height = (side // 2 * 2 for side in frames[0].size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "12"}
        for frame in frames:
            cut = frame.convert("RGB").crop((0, 0, width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(cut)))
        container.mux(stream.encode())
