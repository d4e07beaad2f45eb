"""The gate: strangers' pictures are refused or right, whatever they cost, and no worker outlives it."""

import asyncio
import base64
import io
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from openbagel.picture_files import open_picture
from openbagel.serve.gate import Gate
from openbagel.serve.limits import ServerLimits
from tests.serve import hostile_pictures as hostile

LIMITS = ServerLimits()
SHAPES = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return asyncio.run if request.param == "asyncio" else pytest.importorskip("uvloop").run


def png(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def shade(value: int, side: int = 8) -> bytes:
    return png(Image.new("RGB", (side, side), (value, value, value)))


def children() -> set[int]:
    """Processes of ours that run or wait to be reaped."""
    command = ["ps", "-o", "pid=", "--ppid", str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as lister:
        return {int(pid) for pid in lister.communicate()[0].split()} - {lister.pid}


def workers(gate: Gate) -> list[int]:
    return [worker.pid for worker in gate._idle]


@asynccontextmanager
async def opened(limits: ServerLimits = LIMITS) -> AsyncIterator[Gate]:
    """A gate; at its end no worker and no pipe is left."""
    pipes = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    gate = Gate(limits)
    try:
        yield gate
    finally:
        await gate.close()
    await asyncio.sleep(0)
    assert not gate._idle
    if pipes:
        assert len(os.listdir("/proc/self/fd")) <= pipes + 1


async def refused(answer: Awaitable[Any], words: str = "") -> None:
    with pytest.raises(ValueError, match=words) as caught:
        await answer
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert " object at 0x" not in str(caught.value)


# right pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_right_pictures_are_as_read_here(run: Callable[..., Any], form: str) -> None:
    async def case() -> None:
        buffer = io.BytesIO()
        Image.fromarray(SHAPES).save(buffer, form)
        async with opened() as gate:
            for _ in range(3):
                got = await gate.open(buffer.getvalue())
                assert (got.mode, got.size, got.info) == ("RGB", (40, 30), {})
                assert got.tobytes() == open_picture(buffer.getvalue()).tobytes()
            assert len(workers(gate)) == 1
            assert gate.killed == 0

    run(case())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_upright_and_without_metadata(form: str) -> None:
    async def case() -> None:
        async with opened() as gate:
            for turn in range(1, 9):
                tags = Image.Exif()
                tags[0x0112], tags[0x010F] = turn, "a camera"
                for mode in ("RGB", "L") if form == "JPEG" else ("RGB", "RGBA"):
                    buffer = io.BytesIO()
                    Image.fromarray(SHAPES).convert(mode).save(buffer, form, exif=tags, lossless=True)
                    with Image.open(buffer) as given:
                        wanted = ImageOps.exif_transpose(given).convert("RGB")
                    got = await gate.open(buffer.getvalue())
                    assert (got.size, got.info) == ((40, 30) if turn < 5 else (30, 40), {})
                    assert got.tobytes() == wanted.tobytes()
                    assert not got.getexif()

    asyncio.run(case())


def test_odd_tags_do_not_cost_the_picture() -> None:
    """A name that is a number: rewriting such tags fails, turning the picture needs no rewriting."""

    async def case() -> None:
        entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHIf", 0x010F, 11, 1, 1.5)
        tags = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
        buffer = io.BytesIO()
        Image.fromarray(SHAPES).save(buffer, "JPEG", exif=tags)
        async with opened() as gate:
            assert (await gate.open(buffer.getvalue())).size == (30, 40)
            assert gate.killed == 0

    asyncio.run(case())


def test_notes_are_gone_and_transparency_lies_on_white() -> None:
    async def case() -> None:
        notes = PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta>where I live</x:xmpmeta>")
        async with opened() as gate:
            got = await gate.open(png(Image.new("RGBA", (3, 2), (9, 9, 9, 0)), pnginfo=notes))
            assert (got.info, got.getpixel((0, 0))) == ({}, (255, 255, 255))
            frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10, 20)]
            for form in ("PNG", "WEBP"):
                buffer = io.BytesIO()
                frames[0].save(buffer, form, save_all=True, append_images=frames[1:], lossless=True)
                assert (await gate.open(buffer.getvalue())).getpixel((4, 4)) == (200, 0, 0)

    asyncio.run(case())


def test_everyone_gets_their_own_picture_from_few_workers(run: Callable[..., Any]) -> None:
    async def case() -> None:
        async with opened() as gate:
            before = children()
            got = await asyncio.gather(*(gate.open(shade(value, 8 + value)) for value in range(40)))
            assert [(one.width - 8, one.getpixel((0, 0))) for one in got] == [
                (v, (v, v, v)) for v in range(40)
            ]
            assert 1 <= len(workers(gate)) <= LIMITS.decoders
            assert len(children() - before) <= LIMITS.decoders

    run(case())


def test_a_worker_knows_pillow_and_nothing_heavier() -> None:
    code = (
        "import openbagel.serve.decode, sys; print({'torch', 'numpy', 'httpx', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# hostile pictures ------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_malformed_pictures_are_refused_or_right() -> None:
    async def case() -> None:
        kinds: set[str] = set()
        async with opened() as gate:
            await gate.open(shade(1, 2048))
            before = resident()
            for kind, data in islice(hostile.malformed(7), 200):
                kinds.add(kind)
                try:
                    got = await gate.open(data)
                except ValueError as error:
                    assert "\n" not in str(error), kind
                    assert " object at 0x" not in str(error), kind
                else:
                    assert (got.mode, got.info) == ("RGB", {}), kind
                    assert got.width * got.height <= LIMITS.picture_pixels, kind
            assert (await gate.open(shade(77))).getpixel((0, 0)) == (77, 77, 77)
            assert resident() - before < 100 * 2**20
            assert gate.killed == 0
        assert {make.__name__ for make in hostile.LIGHT} <= kinds

    asyncio.run(case())


def test_malformed_pictures_are_the_same_for_a_seed() -> None:
    first, again, other = (list(islice(hostile.malformed(seed), 40)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (hostile.huge_png, "too many pixels"),
        (hostile.huge_jpeg, "too many pixels"),
        (hostile.huge_gif, "not a picture in one of the formats PNG, JPEG, WEBP"),
        (hostile.other_format, "not a picture in one of the formats"),
        (hostile.text_bomb, "damaged"),
        (hostile.many_texts, "Too much memory used in text chunks"),
        (hostile.profile_bomb, "damaged"),
        (hostile.empty, "not a picture"),
        (hostile.words, "not a picture"),
        (lambda _: shade(5, 300), "300x300, more than 10,000"),
        (lambda _: png(Image.new("RGB", (65, 1))), "65x1, a side above 64"),
    ],
)
def test_refusals_say_why(make: hostile.Maker, words: str) -> None:
    async def case() -> None:
        async with opened(ServerLimits(picture_pixels=10_000, picture_side=64, decoders=1)) as gate:
            for number in range(3):
                await refused(gate.open(make(Random(number))), words)
            assert (await gate.open(shade(3))).size == (8, 8)
            assert gate.killed == 0

    asyncio.run(case())


@pytest.mark.parametrize("limit", [{"decode_seconds": 0.4}, {"decode_bytes": 120 * 2**20}])
def test_what_takes_too_long_or_too_much_costs_one_worker(
    run: Callable[..., Any], limit: dict[str, Any]
) -> None:
    data = (hostile.scan_bomb if "decode_seconds" in limit else hostile.large_zeros)(Random(0))

    async def case() -> None:
        async with opened(ServerLimits(**limit, decoders=1)) as gate:
            small, large, after = gate.open(shade(1)), gate.open(data), gate.open(shade(2))
            got = await asyncio.gather(small, large, after, return_exceptions=True)
            assert [getattr(one, "size", type(one)) for one in got] == [(8, 8), ValueError, (8, 8)]
            assert "too much time or memory" in str(got[1])
            assert gate.killed == 1

    run(case())


def test_a_worker_that_dies_while_it_waits_is_replaced() -> None:
    async def case() -> None:
        async with opened() as gate:
            await gate.open(shade(1))
            (pid,) = workers(gate)
            os.kill(pid, signal.SIGKILL)
            while gate._idle[0].returncode is None:
                await asyncio.sleep(0.01)
            assert (await gate.open(shade(2))).getpixel((0, 0)) == (2, 2, 2)
            assert workers(gate) != [pid]

    asyncio.run(case())


def test_a_worker_that_cannot_start_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case() -> None:
        async with opened() as gate:
            with monkeypatch.context() as broken:
                broken.setattr(sys, "executable", "/bin/false")
                with pytest.raises(RuntimeError, match="does not start"):
                    await gate.open(shade(1))
            assert (await gate.open(shade(2))).size == (8, 8)

    asyncio.run(case())


# callers who leave, and the end ----------------------------------------------------------------------------


def test_callers_who_leave_disturb_nobody(run: Callable[..., Any]) -> None:
    data = shade(200, 1000)

    async def case() -> None:
        async with opened(ServerLimits(decoders=1)) as gate:
            await gate.open(shade(1))
            for number in range(5):
                leaving = asyncio.create_task(gate.open(data))
                staying = asyncio.create_task(gate.open(shade(number)))
                await asyncio.sleep(number * 0.01)
                leaving.cancel()
                assert (await staying).getpixel((0, 0)) == (number,) * 3
                await asyncio.gather(leaving, return_exceptions=True)
            assert gate.killed >= 1

    run(case())


def test_callers_who_leave_while_a_worker_starts(run: Callable[..., Any]) -> None:
    async def case() -> None:
        before = children()
        async with opened() as gate:
            for number in range(6):
                leaving = asyncio.create_task(gate.open(shade(1)))
                await asyncio.sleep(number * 0.01)
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
        for _ in range(100):  # a process that was cut off at its birth is killed, and reaped a moment later
            if not children() - before:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(children() - before)

    run(case())


def test_closing_finishes_what_runs_and_leaves_no_process(run: Callable[..., Any]) -> None:
    async def case() -> None:
        before = children()
        gate = Gate(ServerLimits(decoders=2))
        running = [asyncio.create_task(gate.open(shade(value, 400))) for value in range(2)]
        waiting = [asyncio.create_task(gate.open(shade(value))) for value in range(3)]
        while not children() - before:
            await asyncio.sleep(0.01)
        await gate.close()
        assert [(await task).size for task in running] == [(400, 400)] * 2
        late = await asyncio.gather(*waiting, gate.open(shade(1)), return_exceptions=True)
        assert [str(error) for error in late] == ["the picture gate is closed"] * 4
        await gate.close()
        assert children() - before == set()

    run(case())


# sources ---------------------------------------------------------------------------------------------------

SECRETS = ("/etc/passwd", "../../etc/passwd", "/proc/self/environ", "C:\\Windows\\win.ini", "~/.ssh/id_rsa")


def path_probes() -> list[str]:
    spelled = [
        *(
            "{}",
            "file://{}",
            "file:{}",
            "FILE://localhost{}",
            "file:///{}",
            "\\\\server\\share{}",
            "//server{}",
        ),
        *(" {}", "{}%00.png", "{}\0.png", "{}?.png", "{}#.png", "./{}", "....//....//{}", "%2e%2e%2f{}"),
        *("path:{}", "local:{}", "pathlib://{}", "zip://{}", "jar:file:{}!/a", "php://filter/resource={}"),
        *(
            "gopher://{}",
            "ftp://localhost{}",
            "http://localhost{}",
            "blob:{}",
            "data:{}",
            "data:image/png,{}",
        ),
        *(
            "data:file://{};base64",
            "data:;base64,file://{}",
            "data:image/png;base64,{}",
            "https:{}",
            "https://{}",
        ),
        *("httpsfile://{}", "HTTPS:/{}", "unix:{}", "fd://{}", "\t{}", "{}\n", "@{}", "|cat {}", "$(cat {})"),
    ]
    return [form.format(secret) for form in spelled for secret in SECRETS]


def test_paths_are_never_read(watched: list[tuple[str, Any]]) -> None:
    async def case() -> None:
        async with opened(ServerLimits(url_hosts=("pictures.example",))) as gate:
            await asyncio.sleep(0)
            watched.clear()
            for probe in path_probes():
                with pytest.raises(ValueError) as caught:
                    await gate.open_source(probe)
                assert "root:" not in str(caught.value)
            assert watched == []
            assert workers(gate) == []

    assert len(path_probes()) >= 200
    asyncio.run(case())


def test_data_urls() -> None:
    async def case() -> None:
        data = base64.b64encode(shade(9)).decode()
        large = base64.b64encode(bytes(3001)).decode()
        async with opened(ServerLimits(body_bytes=3000)) as gate:
            for head in ("data:image/png;base64,", "DATA:;BASE64,", "data:image/png;name=a;base64,"):
                assert (await gate.open_source(head + data)).getpixel((0, 0)) == (9, 9, 9)
            await refused(gate.open_source(f"data:image/png;base64,{large}"), "larger than 3,000 bytes")
            for source in (
                f"data:image/png,{data}",
                data,
                "",
                "data:",
                "data:image/png;base64",
                "data:base64," + data,
            ):
                await refused(gate.open_source(source), "must be sent as a data:")
            for body in ("é", "a", data[:-3] + "\n", data + "!", "=", "%41"):
                await refused(gate.open_source(f"data:image/png;base64,{body}"), "not base64")
            await refused(gate.open_source("data:image/png;base64,"), "not a picture")

    asyncio.run(case())
