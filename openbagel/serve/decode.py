"""The worker behind the gate: encoded pictures on standard input, their pixels on standard output.

    ready     0, 0 (4 bytes each), before every request
    request   length (8 bytes), the encoded picture
    answer    width, height (4 bytes each), then 3·width·height bytes of RGB, row by row
    refusal   0, length (4 bytes each), then a line of ASCII

Run as `python -m openbagel.serve.decode` by `openbagel.serve.gate`. It imports Pillow and nothing heavier,
and lives as long as its input is open; whatever but a ValueError a picture raises ends it too.
"""

import json
import os
import struct
import sys
from contextlib import suppress

from PIL import Image, PngImagePlugin

from openbagel.picture_files import open_picture

HEAD = struct.Struct(">II")
READY = HEAD.pack(0, 0)


def confine(memory: int) -> None:
    """Caps the bytes this process may allocate, where the system can; no core files; nothing on standard
    error from here on, which strangers could fill.
    """
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def answer(data: bytes, formats: list[str], pixels: int, side: int) -> tuple[bytes, bytes]:
    try:
        picture = open_picture(data, formats=formats, max_pixels=pixels, max_side=side)
        return HEAD.pack(*picture.size), picture.tobytes()
    except ValueError as error:
        line = " ".join(str(error).split()).encode("ascii", "replace")[:400]
        return HEAD.pack(0, len(line)), line


def main() -> None:
    memory, *limits = json.loads(sys.argv[1])
    Image.init()  # every format's module, before memory is capped
    PngImagePlugin.MAX_TEXT_MEMORY = 4 * PngImagePlugin.MAX_TEXT_CHUNK
    confine(memory)
    reply: tuple[bytes, ...] = ()
    while True:
        sys.stdout.buffer.writelines((*reply, READY))
        sys.stdout.buffer.flush()
        if len(head := sys.stdin.buffer.read(8)) < 8:
            return
        reply = answer(sys.stdin.buffer.read(int.from_bytes(head)), *limits)


if __name__ == "__main__":
    main()
