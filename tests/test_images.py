"""Pictures in and out: bad files, transparency, sizes, patches and position tables."""

import io
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openbagel import picture_files
from openbagel.images import (
    ImageLimits,
    grid_position_ids,
    patchify,
    sincos_table,
    to_picture,
    to_pixels,
    unpatchify,
)
from openbagel.picture_files import FORMATS, MAX_PICTURE_PIXELS, open_picture, picture_size, read_frames

OFFICIAL = ImageLimits(max_size=1024, min_size=512, stride=16)


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    values = np.arange(width * height * 3).reshape(height, width, 3) % 251
    return Image.fromarray(values.astype(np.uint8))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    gradient().save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such picture: .*; give the path of a picture file"),
        (b"", "is not a picture in one of the formats PNG"),
        (b"just some words", "is not a picture in one of the formats PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture in one of the formats PNG"),
        (encoded("PNG")[:-300], "is damaged or truncated"),
        (encoded("JPEG")[:-300], "is damaged or truncated"),
        (encoded("GIF")[:-300], "is damaged or truncated"),
        (png_header(9, 9).replace(b"\r" + b"IHDR", b"\x05" + b"IHDR"), "is damaged or truncated"),
        (png_header(9000, 8000), r"unpacks to too many pixels \(9000x8000, more than 64,000,000\)"),
        (png_header(9900, 9900), "unpacks to too many pixels"),
        (png_header(60000, 60000), "unpacks to too many pixels"),
    ],
    ids=[
        "missing",
        "empty",
        "text",
        "svg",
        "cut png",
        "cut jpeg",
        "cut gif",
        "short header",
        "large",
        "larger",
        "bomb",
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_picture(path)
    assert str(path) in str(caught.value)


def test_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such picture"):
        open_picture(tmp_path)


@pytest.mark.parametrize(
    "source",
    [None, 3, np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), [gradient()], {"type": "image"}],
    ids=lambda source: type(source).__name__,
)
def test_what_is_no_picture_is_told_what_one_is(source: Any) -> None:
    message = "a picture is a path, the bytes of a file, an open file or a PIL picture, not "
    with pytest.raises(ValueError, match=message + type(source).__name__):
        open_picture(source)


@pytest.mark.parametrize(
    "name", ["https://a.org/b.png", "data:image/png;base64,iVBOR", "/root/https:/a.org/b.png", "iVBOR" * 2000]
)
def test_what_can_be_no_path_is_told_in_short(name: str) -> None:
    hint = "URLs are not fetched, and base64 is not decoded; give the path of a"
    for read, kind in ((picture_size, "picture"), (lambda name: read_frames(Path(name + ".mp4")), "video")):
        with pytest.raises(ValueError, match=f"no such {kind}: .*; {hint} {kind} file") as caught:
            read(name)
        assert len(str(caught.value)) < 320


@pytest.mark.parametrize("fault", [TypeError, KeyError, struct.error, EOFError, RecursionError])
def test_whatever_pillow_raises_is_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    gradient().save(path := tmp_path / "odd.png")

    def broken(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ValueError, match="odd.png is damaged"):
        open_picture(path)


def test_pictures_that_pillow_has_not_read_yet() -> None:
    with pytest.raises(ValueError, match="the picture is damaged or truncated"):
        open_picture(Image.open(io.BytesIO(encoded("JPEG")[:-300])))


def test_threads_leave_the_filters_of_warnings_alone() -> None:
    before = list(warnings.filters)
    first, second = (picture_files._header(encoded("PNG")) for _ in range(2))
    for step in (first.__enter__, second.__enter__):
        step()
    for one in (first, second):
        one.__exit__(None, None, None)
    assert warnings.filters == before


@pytest.mark.parametrize("kind", FORMATS)
def test_good_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.bin"
    path.write_bytes(encoded(kind))
    picture = open_picture(str(path))
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    if kind not in ("JPEG", "WEBP", "GIF"):
        assert picture.tobytes() == gradient().tobytes()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300)
@given(
    kind=st.sampled_from(FORMATS), places=st.lists(st.floats(0, 0.999), max_size=6), value=st.integers(0, 255)
)
def test_damaged_files_open_or_say_so(
    tmp_path_factory: pytest.TempPathFactory, kind: str, places: list[float], value: int
) -> None:
    content = bytearray(encoded(kind))
    for place in places:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert open_picture(path).mode == "RGB"
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa", "La"])
def test_transparency_lies_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (3, 1), (10, 10, 10, 255))
    picture.putpixel((1, 0), (10, 10, 10, 0))
    if mode == "P":
        picture = Image.new("P", (3, 1), 0)
        picture.putpalette([10, 10, 10, 20, 20, 20])
        picture.putpixel((1, 0), 1)
        picture.info["transparency"] = 1
    else:
        picture = picture.convert("LA" if mode == "La" else mode).convert(mode)
    pixels = np.asarray(open_picture(picture))
    assert pixels[0, :, 0].tolist() == [10, 255, 10]


def test_half_transparency_is_blended() -> None:
    (pixel,) = np.asarray(open_picture(Image.new("RGBA", (1, 1), (0, 100, 200, 128)))).reshape(1, 3).tolist()
    assert pixel == pytest.approx([127, 177, 227], abs=1)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16", "F", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert open_picture(Image.new(mode, (4, 4))).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_sixteen_bits_are_scaled(mode: str) -> None:
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}[mode]
    levels = np.array([[0, 257, 40000, 65535]], kind)
    shades = np.asarray(open_picture(Image.frombytes(mode, (4, 1), levels.tobytes())))
    assert shades[0, :, 0].tolist() == [0, 1, 156, 255]
    if mode in ("I", "F"):  # which hold bytes as well
        assert open_picture(Image.new(mode, (1, 1), 255)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright_once(tmp_path: Path, kind: str) -> None:
    held = Image.new("RGB", (64, 32), (255, 255, 255))
    held.paste((255, 0, 0), (0, 0, 32, 32))  # on the left, where the camera's top is
    tags = Image.Exif()
    tags[0x0112] = 6
    held.save(path := tmp_path / f"photo.{kind.lower()}", kind, exif=tags)
    for picture in (open_picture(path), open_picture(open_picture(path)), *read_frames(path)):
        assert picture.size == picture_size(path) == (32, 64)
        top, bottom = (picture.getpixel((16, y)) for y in (8, 56))
        assert top == pytest.approx((255, 0, 0), abs=8) and bottom == pytest.approx((255,) * 3, abs=8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.integers(0, 40), st.binary(min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_broken_tags_say_nothing(place: int, bytes_: bytes) -> None:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = 6, "a note"
    broken = tags.tobytes()[: 6 + place] + bytes_
    gradient().save(file := io.BytesIO(), "JPEG", exif=broken)
    picture = open_picture(file.getvalue())
    assert open_picture(picture).size == picture.size == picture_size(file.getvalue())


def test_opened_picture_is_a_copy() -> None:
    original = gradient()
    open_picture(original).putpixel((0, 0), (255, 255, 255))
    assert original.getpixel((0, 0)) == (0, 1, 2)


def test_pixels_there_and_back() -> None:
    pixels = to_pixels(gradient())
    assert (tuple(pixels.shape), pixels.dtype) == ((3, 30, 40), torch.float32)
    assert pixels.min() >= -1
    there_and_back = np.asarray(to_picture(pixels)).astype(int)
    assert np.abs(there_and_back - np.asarray(gradient())).max() <= 1  # truncation, not rounding


def test_values_are_clamped_and_truncated() -> None:
    values = torch.tensor([-3.0, -1.0, -0.001, 0.0, 0.9999, 1.0, 7.0])
    picture = to_picture(values.expand(3, 1, 7))
    assert np.asarray(picture)[0, :, 1].tolist() == [0, 0, 127, 127, 254, 255, 255]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_there_and_back(patch: int) -> None:
    image = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens = patchify(image, patch)
    grid = (8 // patch, 12 // patch)
    assert tokens.shape == (grid[0] * grid[1], patch * patch * 3)
    assert torch.equal(unpatchify(tokens, grid, patch), image)


def test_order_inside_a_patch_is_row_column_channel() -> None:
    image = torch.arange(2 * 4 * 6).view(2, 4, 6)
    expected = [image[c, 2 + y, 4 + x].item() for y in range(2) for x in range(2) for c in range(2)]
    assert patchify(image, 2)[1 * 3 + 2].tolist() == expected


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1024, 1024), (1024, 1024)),
        ((2048, 1024), (1024, 512)),
        ((100, 100), (512, 512)),
        ((100, 50), (1024, 512)),
        ((1024, 10), (1024, 16)),
        ((1, 5000), (16, 1024)),
        ((600, 521), (608, 528)),
    ],
)
def test_sizes_with_official_limits(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert OFFICIAL.fit(*size) == fitted


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12))
def test_every_size_is_allowed(width: int, height: int, num_images: int) -> None:
    size = OFFICIAL.fit(width, height, num_images)
    assert all(16 <= side <= 1024 and side % 16 == 0 for side in size)
    assert (size[0] >= size[1]) == (width >= height) or size[0] == size[1]


def test_a_fitting_picture_is_left_alone() -> None:
    picture = gradient(1024, 512)
    assert OFFICIAL.resize(picture) is picture
    assert replace(OFFICIAL, max_pixels=256 * 256).resize(picture).size != picture.size


def test_limits_of_open_picture_are_sane() -> None:
    assert MAX_PICTURE_PIXELS < 2 * Image.MAX_IMAGE_PIXELS  # ours decides before Pillow's hard limit does


def test_position_ids_by_hand() -> None:
    assert grid_position_ids((2, 3), 4, stretch=False).tolist() == [0, 1, 2, 4, 5, 6]
    assert grid_position_ids((2, 4), 4, stretch=True).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_stretched_ids_reach_over_any_table() -> None:
    ids = grid_position_ids((9, 30), 8, stretch=True)
    assert ids.min() == 0
    assert ids.max() == 63


def test_sincos_table_by_hand() -> None:
    side, width = 5, 16
    table = sincos_table(side, width)
    row, column, i = 3, 2, 1
    entry = table[row * side + column]
    angle = 10000 ** (-i / (width // 4))
    assert entry[i].item() == pytest.approx(np.sin(column * angle))
    assert entry[width // 4 + i].item() == pytest.approx(np.cos(column * angle))
    assert entry[width // 2 + i].item() == pytest.approx(np.sin(row * angle))
    assert entry[3 * width // 4 + i].item() == pytest.approx(np.cos(row * angle))


@pytest.mark.parametrize("size", [(1000, 300), (20, 700), (378, 378)])
def test_square_limits_ignore_the_shape(size: tuple[int, int]) -> None:
    limits = ImageLimits(378, 378, 14, square=True)
    assert limits.fit(*size) == (378, 378)
    assert limits.resize(Image.new("RGB", size)).size == (378, 378)
