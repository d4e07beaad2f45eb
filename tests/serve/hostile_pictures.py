"""Malformed pictures without end, the same ones for a seed: what strangers send to a server.

`malformed(seed)` goes round about forty kinds: damaged files, bombs, headers that lie, metadata that
misleads, other formats, no pictures at all. Every HEAVY_EVERY-th is one that costs the decoder up to a
second or its life.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

HEAVY_EVERY = 250
PNG = b"\x89PNG\r\n\x1a\n"

Maker = Callable[[Random], bytes]


def picture(random: Random, mode: str = "RGB") -> Image.Image:
    made = Image.new("RGB", (random.randint(1, 96), random.randint(1, 96)), tuple(random.randbytes(3)))
    draw = ImageDraw.Draw(made)
    for _ in range(6):
        x, y = random.randint(0, 90), random.randint(0, 90)
        draw.ellipse((x, y, x + random.randint(1, 40), y + random.randint(1, 40)), tuple(random.randbytes(3)))
    return made.convert(mode)


def encoded(random: Random, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(random).save(buffer, form, **options)
    return buffer.getvalue()


def any_good(random: Random) -> bytes:
    form = random.choice(("PNG", "JPEG", "WEBP"))
    extra = {"PNG": {}, "JPEG": {"progressive": random.random() < 0.5}, "WEBP": {"lossless": True}}
    return encoded(random, form, **extra[form])


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(size: tuple[int, int], *extra: bytes, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG with any claims in its header, `extra` chunks and what stands for its rows."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return PNG + head + b"".join(extra) + data


def small_png(*extra: bytes) -> bytes:
    """A right 4x4 picture but for the extra chunks."""
    return png((4, 4), *extra, rows=(b"\0" + b"\x40\x80\xc0" * 4) * 4)


@cache
def packed_zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


# damaged files ---------------------------------------------------------------------------------------------


def truncated(random: Random) -> bytes:
    data = any_good(random)
    return data[: random.randrange(len(data))]


def flipped_bits(random: Random) -> bytes:
    data = bytearray(any_good(random))
    for _ in range(random.randint(1, 30)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def flipped_header(random: Random) -> bytes:
    data = bytearray(any_good(random))
    for _ in range(random.randint(1, 4)):
        data[random.randrange(min(64, len(data)))] = random.randrange(256)
    return bytes(data)


def shuffled(random: Random) -> bytes:
    data = any_good(random)
    cuts = sorted(random.randrange(12, len(data)) for _ in range(4))
    parts = [data[start:end] for start, end in zip([12, *cuts], [*cuts, len(data)], strict=True)]
    random.shuffle(parts)
    return data[:12] + b"".join(parts)


def spliced(random: Random) -> bytes:
    first, second = any_good(random), any_good(random)
    return first[: random.randrange(len(first))] + second[random.randrange(len(second)) :]


def zeroed_middle(random: Random) -> bytes:
    data = any_good(random)
    start = random.randrange(len(data))
    end = random.randrange(start, len(data))
    return data[:start] + bytes(end - start) + data[end:]


def repeated(random: Random) -> bytes:
    data = any_good(random)
    start = random.randrange(len(data))
    return data[:start] + data[start : start + 40] * random.randint(2, 200) + data[start:]


def interlaced_cut(random: Random) -> bytes:
    size = (random.randint(1, 40), random.randint(1, 40))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 1))
    return PNG + head + chunk(b"IDAT", zlib.compress(random.randbytes(random.randint(0, 400))))


# bombs and headers that lie --------------------------------------------------------------------------------


def huge_png(random: Random) -> bytes:
    return png((random.randint(8193, 2**31 - 1), random.randint(8193, 2**31 - 1)))


def long_png(random: Random) -> bytes:
    return png(random.choice([(2**31 - 1, 1), (1, 2**31 - 1), (8193, 2), (65536, 255)]))


def empty_png(random: Random) -> bytes:
    return png(random.choice([(0, 0), (0, 5), (5, 0), (2**32 - 1, 2**32 - 1)]))


def huge_gif(random: Random) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF7, 0, 0) + bytes(1024 - random.randrange(512))


def huge_jpeg(random: Random) -> bytes:
    data = bytearray(encoded(random, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", random.randint(8193, 65535), random.randint(8193, 65535))
    return bytes(data)


def huge_webp(random: Random) -> bytes:
    size = (random.randint(8193, 2**24 - 1)).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + size + encoded(random, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def text_bomb(random: Random) -> bytes:
    name = random.choice((b"zTXt", b"iTXt"))
    start = b"Comment\0\0" if name == b"zTXt" else b"Comment\0\x01\0\0\0"
    return small_png(chunk(name, start + packed_zeros(50_000_000)))


def many_texts(random: Random) -> bytes:
    text = b"\0\0" + packed_zeros(900_000)
    return small_png(*(chunk(b"zTXt", b"key%d" % i + text) for i in range(random.randint(6, 80))))


def profile_bomb(random: Random) -> bytes:
    return small_png(chunk(b"iCCP", b"profile\0\0" + packed_zeros(50_000_000 + random.randrange(9))))


def row_bomb(random: Random) -> bytes:
    """Few rows claimed, 50 MB of them sent."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", random.randint(1, 9), 4, 8, 2, 0, 0, 0))
    return PNG + head + chunk(b"IDAT", packed_zeros(50_000_000)) + chunk(b"IEND", b"")


def long_chunk(random: Random) -> bytes:
    name = random.choice((b"IDAT", b"tEXt", b"eXIf", b"acTL", b"PLTE"))
    return small_png(struct.pack(">I", random.choice([2**31 - 1, 2**32 - 1, 2**24])) + name + b"short")


def odd_depth(random: Random) -> bytes:
    rows = random.randbytes(random.randint(0, 600))
    depth, colour = random.choice((0, 1, 2, 3, 4, 16, 255)), random.randrange(8)
    return png((random.randint(1, 16), random.randint(1, 16)), depth=depth, colour=colour, rows=rows)


# metadata --------------------------------------------------------------------------------------------------


def exif(random: Random) -> bytes:
    """A TIFF header and entries of random kinds, counts and offsets, some pointing at themselves."""
    entries = b"".join(
        struct.pack(
            "<HHII",
            random.choice((0x0112, 0x8769, 0x8825, 0xA005, 0x010F, random.randrange(2**16))),
            random.randrange(16),
            random.choice((0, 1, 2, 2**16, 2**31, 2**32 - 1)),
            random.choice((1, 6, 8, 9, 200, 2**32 - 1)),
        )
        for _ in range(random.randint(1, 12))
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", random.randint(0, 40)) + entries + b"\x08\0\0\0"


def bad_exif_jpeg(random: Random) -> bytes:
    data, body = encoded(random, "JPEG"), b"Exif\0\0" + exif(random)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def bad_exif_png(random: Random) -> bytes:
    return small_png(chunk(b"eXIf", exif(random)[random.randrange(2) :]))


def bad_exif_webp(random: Random) -> bytes:
    return encoded(random, "WEBP", exif=exif(random))


def bad_xmp(random: Random) -> bytes:
    text = "<x:xmpmeta" + random.choice(("", " tiff:Orientation='99'", ' tiff:Orientation="x"', "&a;" * 999))
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text)
    return encoded(random, "PNG", pnginfo=info)


def many_markers(random: Random) -> bytes:
    data = encoded(random, "JPEG")
    marker = b"\xff" + bytes([random.randrange(0xE0, 0xFF)]) + b"\0\x04ab"
    return data[:2] + marker * random.randint(100, 3000) + data[2:]


# several frames --------------------------------------------------------------------------------------------


def animated(random: Random, form: str) -> bytes:
    frames = [picture(random).resize((24, 24)) for _ in range(random.randint(2, 12))]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def animated_webp(random: Random) -> bytes:
    return animated(random, "WEBP")


def animated_png(random: Random) -> bytes:
    return animated(random, "PNG")


def cut_animation(random: Random) -> bytes:
    data = animated(random, random.choice(("WEBP", "PNG")))
    return data[: random.randrange(40, len(data))]


def lying_animation(random: Random) -> bytes:
    frames = random.choice((0, 1, 2**31 - 1, 2**32 - 1))
    frame = struct.pack(">IIIIIHHBB", 0, *(random.choice((0, 4, 2**31 - 1)) for _ in range(4)), 1, 1, 9, 9)
    return small_png(chunk(b"acTL", struct.pack(">II", frames, 0)), chunk(b"fcTL", frame))


# no picture that is allowed --------------------------------------------------------------------------------


def other_format(random: Random) -> bytes:
    return encoded(
        random, random.choice(("BMP", "GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF"))
    )


def words(random: Random) -> bytes:
    page = (
        b"<html><img src=x></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    )
    return random.choice((*page, b"SIMPLE  =  T", b"\x1f\x8b\x08\0", b"PK\x03\x04", b"#define x_width 9\n"))


def empty(_: Random) -> bytes:
    return b""


def noise(random: Random) -> bytes:
    return random.randbytes(random.randrange(4000))


def magic_and_noise(random: Random) -> bytes:
    start = (
        PNG,
        b"\xff\xd8\xff\xe0",
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"RIFF\0\0\0\0WEBPVP8L",
        PNG + b"\0\0\0\rIHDR",
    )
    return random.choice(start) + random.randbytes(random.randrange(2000))


def appended(random: Random) -> bytes:
    """A right picture with something else behind it."""
    return any_good(random) + b"PK\x03\x04" + random.randbytes(500)


# heavy -----------------------------------------------------------------------------------------------------


def large_zeros(_: Random) -> bytes:
    """16 million right pixels in 50 kB."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4096, 4096, 8, 6, 0, 0, 0))
    return PNG + head + chunk(b"IDAT", packed_zeros(4096 * (4 * 4096 + 1))) + chunk(b"IEND", b"")


@cache
def _scan_bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2048, 2048), 99).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    starts = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    return data[: starts[-1]] + data[starts[-1] : -2] * 4000 + data[-2:]


def scan_bomb(_: Random) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    return _scan_bomb()


LIGHT: tuple[Maker, ...] = (
    *(truncated, flipped_bits, flipped_header, shuffled, spliced, zeroed_middle, repeated, interlaced_cut),
    *(huge_png, long_png, empty_png, huge_gif, huge_jpeg, huge_webp, text_bomb, many_texts, profile_bomb),
    *(row_bomb, long_chunk, odd_depth, bad_exif_jpeg, bad_exif_png, bad_exif_webp, bad_xmp, many_markers),
    *(animated_webp, animated_png, cut_animation, lying_animation),
    *(other_format, words, empty, noise, magic_and_noise, appended),
)
HEAVY: tuple[Maker, ...] = (large_zeros, scan_bomb)


def malformed(seed: int) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) for ever; the n-th depends on seed and n alone."""
    number = 0
    while True:
        random, (rounds, rest) = Random(f"{seed}/{number}"), divmod(number, HEAVY_EVERY)
        make = LIGHT[number % len(LIGHT)] if rest != HEAVY_EVERY - 1 else HEAVY[rounds % len(HEAVY)]
        yield make.__name__, make(random)
        number += 1
