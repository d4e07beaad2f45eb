"""The gate that strangers' pictures pass: judged and decoded in worker processes, never in the server's.

bytes ──> a free worker (or a new one, `decoders` at most) ──> raw pixels ──> a picture without metadata
          slow, out of memory, crashed, caller gone: killed, and the next picture starts another
"""

import asyncio
import base64
import json
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack, suppress

from PIL import Image

from openbagel.checks import retold
from openbagel.serve.decode import HEAD
from openbagel.serve.fetch import fetch, places
from openbagel.serve.limits import ServerLimits

START_SECONDS = 60.0


class Gate:
    """Opens pictures within the limits of one server, in one event loop.

    What is refused is a ValueError of one line; a worker that does not start, or a closed gate, is a
    RuntimeError. Where the system has no RLIMIT_AS (macOS, Windows), decode_bytes is not enforced.
    """

    def __init__(self, limits: ServerLimits) -> None:
        places(limits)  # refuses now what would fail with the first picture
        self.limits = limits
        self.killed = 0
        """Workers that a picture, a leaving caller or the end cost."""
        self._closed = False
        self._free = asyncio.Semaphore(limits.decoders)
        self._idle: list[Process] = []
        self._ending: set[asyncio.Task[tuple[bytes, bytes]]] = set()

    async def open(self, data: bytes) -> Image.Image:
        """RGB, upright as its EXIF tag says, without metadata; of several frames the first."""
        width, height, body = await self._decoded(data)
        if not width:
            raise ValueError(body.decode("ascii"))
        return Image.frombytes("RGB", (width, height), body)

    async def open_source(self, source: str) -> Image.Image:
        """The picture in a `data:` URL, or behind an https URL whose host is allowed; never a path."""
        if source[:6].lower() == "https:":
            return await self.open(await fetch(source, self.limits))
        head, comma, body = source.partition(",")
        if not comma or head[:5].lower() != "data:" or head[-7:].lower() != ";base64":
            raise ValueError("a picture must be sent as a data:image/png;base64,... URL or as an upload")
        if len(body) * 3 // 4 > self.limits.body_bytes:
            raise ValueError(f"the picture is larger than {self.limits.body_bytes:,} bytes; make it smaller")
        with retold("the picture's data: URL is not base64; encode its bytes again", ValueError):
            data = base64.b64decode(body, validate=True)
        return await self.open(data)

    async def close(self) -> None:
        """Refuses new pictures, waits for those being decoded, and returns when no worker is left."""
        self._closed = True
        async with AsyncExitStack() as stack:
            for _ in range(self.limits.decoders):
                await stack.enter_async_context(self._free)
            while self._idle:
                self._end(self._idle.pop())
            await asyncio.gather(*self._ending)

    async def _decoded(self, data: bytes) -> tuple[int, int, bytes]:
        async with self._free:
            worker, ready = await self._worker(), False
            assert worker.stdin
            try:
                async with asyncio.timeout(START_SECONDS):
                    await self._read(worker)
                ready = True
                async with asyncio.timeout(self.limits.decode_seconds):
                    worker.stdin.writelines([len(data).to_bytes(8), data])
                    await worker.stdin.drain()
                    answer = await self._read(worker)
                self._idle.append(worker)
                return answer
            except (OSError, EOFError) as error:  # a time-out is an OSError
                if not ready:
                    raise RuntimeError("a picture decoder does not start") from error
                raise ValueError("the picture takes too much time or memory; re-encode it") from None
            finally:
                if worker not in self._idle:
                    self._end(worker)

    async def _worker(self) -> Process:
        """One that waits for work, or a new one."""
        if self._closed:
            raise RuntimeError("the picture gate is closed")
        self._idle = [worker for worker in self._idle if worker.returncode is None]
        if self._idle:
            return self._idle.pop()
        caps = self.limits
        told = [caps.decode_bytes, caps.picture_formats, caps.picture_pixels, caps.picture_side]
        command = (sys.executable, "-m", "openbagel.serve.decode", json.dumps(told))
        # in a session of its own an interrupt typed at the server does not reach it: close() ends it
        return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)

    async def _read(self, worker: Process) -> tuple[int, int, bytes]:
        assert worker.stdout
        width, height = HEAD.unpack(await worker.stdout.readexactly(HEAD.size))
        length = 3 * width * height if width else height
        if length > 3 * self.limits.picture_pixels:
            raise EOFError("no decoder of ours answers so")
        return width, height, await worker.stdout.readexactly(length)

    def _end(self, worker: Process) -> None:
        """Kills it, and reaps it in a task of its own that a caller who leaves cannot cut short."""
        self.killed += 1
        with suppress(ProcessLookupError):
            worker.kill()
        task = asyncio.create_task(worker.communicate())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
