"""One model behind a scheduler, for the HTTP interface and the web page alike."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from openbagel.inference.engine import Forward, Request, Result
from openbagel.inference.events import Event, Preview
from openbagel.inference.pipeline import Bagel
from openbagel.inference.scheduler import Job, Load, Scheduler, Worker
from openbagel.serve.gate import Gate
from openbagel.serve.limits import ServerLimits


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What a picture looks like after so many of its steps."""

    picture: Image.Image
    step: int
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """The last of a request's events, with its value."""

    value: Any


class Service:
    """Runs requests on a model's own thread. `name` is what clients call the model."""

    def __init__(self, bagel: Bagel, limits: ServerLimits, *, name: str = "nano") -> None:
        self.bagel, self.limits, self.name = bagel, limits, name
        load = Load(waiting=limits.queue, of_key=limits.key_queue, running=limits.running, batch=limits.batch)
        self.scheduler = Scheduler(self._step, load)
        self.worker = Worker(self.scheduler)
        self.gate = Gate(limits)

    @property
    def is_alive(self) -> bool:
        return self.worker.is_alive() and not self.worker.closed

    def check_heard(self, parts: Sequence[Any]) -> None:
        """ValueError for longer texts or more pictures than the limits; what is no `str` is a picture."""
        texts = [part for part in parts if isinstance(part, str)]
        self.limits.check(texts=sum(map(len, texts)), pictures=len(parts) - len(texts))
        self.limits.check(text_tokens=sum(len(self.bagel.codec.encode(text)) for text in texts))

    async def events(
        self, begin: Callable[[], Request[Any]], *, key: str = "", drafts: int = 0
    ) -> AsyncGenerator[Event | Draft | Ended, None]:
        """What a request reports, `Ended` last; drafts: how many pictures on the way, evenly over the steps.

        Raises `Full` at once, TimeoutError when the request was too long, and what the request raised.
        Closing it, as when a client leaves, cancels the request before its next forward.
        """
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Event | Draft | None]()

        def post(item: Event | Draft | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        def listen(event: Event) -> None:
            if not isinstance(event, Preview):
                post(event)
            elif _is_due(event, drafts):
                latents = event.latents if event.latents.dim() == 2 else event.latents[-1]
                post(Draft(self.bagel.decode(latents, event.grid), event.step, event.steps))

        now = time.monotonic()
        job = Job(
            begin,
            key=key,
            listen=listen,
            starts_by=now + self.limits.queue_seconds,
            ends_by=now + self.limits.request_seconds,
        )
        self.scheduler.submit(job)
        job.future.add_done_callback(lambda _: post(None))
        try:
            while (item := await inbox.get()) is not None:
                yield item
            yield Ended(job.future.result())
        finally:
            self.scheduler.cancel(job)

    async def close(self) -> None:
        """Cancels every request and ends the thread and the decoders."""
        await asyncio.to_thread(self.worker.close)
        await self.gate.close()

    def _step(self, forwards: Sequence[Forward]) -> list[tuple[Result, ...]]:
        try:
            return self.bagel.engine.step(forwards)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """On a card, or on the host, where torch raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _is_due(event: Preview, drafts: int) -> bool:
    """Whether one of so many drafts falls on this step; the last step is no draft."""
    before, now = ((step * (drafts + 1)) // event.steps for step in (event.step - 1, event.step))
    return before < now <= drafts
