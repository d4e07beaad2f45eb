"""The service: events of requests from the model's thread, drafts, cancelling, and seeds that are each
request's own.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openbagel.inference import events
from openbagel.inference.engine import Request
from openbagel.inference.scheduler import Full
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Draft, Ended, Service, is_out_of_memory
from tests import tiny

STEPS = 12
SAMPLING = replace(tiny.SAMPLING, num_timesteps=STEPS + 1, max_tokens=6, temperature=1.0)


def served(test: Callable[[Service], Coroutine[Any, Any, None]], **limits: Any) -> None:
    """Runs a test's coroutine with a service on the tiny model."""

    async def main() -> None:
        service = Service(tiny.bagel().using(SAMPLING), ServerLimits(**limits))
        try:
            await test(service)
        finally:
            await service.close()
        assert not service.is_alive

    asyncio.run(main())


def drawing(service: Service, prompt: str, seed: int = 0) -> Callable[[], Request[Image.Image]]:
    return lambda: service.bagel.draw_request([prompt], size=None, seed=seed, think=False, sampling=SAMPLING)


def writing(service: Service, prompt: str, seed: int = 0) -> Callable[[], Request[Any]]:
    return lambda: service.bagel.write_request([prompt], seed=seed, think=False)


async def value(service: Service, begin: Callable[[], Request[Any]], key: str = "") -> Any:
    """What a request comes to."""
    async for event in service.events(begin, key=key):
        if isinstance(event, Ended):
            return event.value


def test_events_come_in_order_and_end_with_the_value() -> None:
    async def test(service: Service) -> None:
        heard = [event async for event in service.events(drawing(service, "a"), drafts=3)]
        drafts = [event for event in heard if isinstance(event, Draft)]
        assert [draft.step for draft in drafts] == [3, 6, 9]
        assert {(draft.steps, draft.picture.size) for draft in drafts} == {(STEPS, (12, 8))}
        kinds = [type(event) for event in heard if not isinstance(event, Draft)]
        assert kinds == [events.Picture, events.Done, Ended]
        alone = tiny.bagel().using(SAMPLING).generate("a")
        assert heard[-1].value.tobytes() == alone.tobytes()
        assert "".join(
            [e.text async for e in service.events(writing(service, "b")) if isinstance(e, events.Text)]
        ) == tiny.bagel().using(SAMPLING).ask([], "b")

    served(test)


@pytest.mark.parametrize("batch", [1, 16])
def test_parallel_requests_equal_their_solo_runs(batch: int) -> None:
    """Bit for bit when they take turns; to rounding, and greedy tokens the same, when packed."""
    alone = tiny.bagel().using(SAMPLING)
    greedy = tiny.bagel().using(replace(SAMPLING, temperature=0.0))

    async def test(service: Service) -> None:
        answers = [
            value(service, lambda n=n: greedy.write_request([f"{n}"], seed=n, think=False), key=str(n % 3))
            for n in range(25)
        ]
        pictures = [value(service, drawing(service, f"{n}", seed=n), key=str(n % 3)) for n in range(25)]
        together = await asyncio.gather(*answers, *pictures)
        assert service.scheduler.counts["done"] == 50
        for n in range(25):
            assert together[n] == greedy.ask([], f"{n}", seed=n)
            expected, ours = (
                np.asarray(one, int) for one in (alone.generate(f"{n}", seed=n), together[25 + n])
            )
            assert np.abs(ours - np.asarray(expected, int)).max() <= (0 if batch == 1 else 1)

    served(test, batch=batch, running=50)


def test_a_listener_who_leaves_ends_the_request() -> None:
    async def test(service: Service) -> None:
        endless = replace(SAMPLING, num_timesteps=10_000)
        begin = lambda: service.bagel.draw_request(  # noqa: E731
            ["a"], size=None, seed=0, think=False, sampling=endless
        )
        stream = service.events(begin, drafts=5_000)
        async with aclosing(stream):
            async for event in stream:
                assert isinstance(event, Draft)
                break
        waiting = asyncio.create_task(value(service, begin))
        await asyncio.sleep(0.1)
        waiting.cancel()
        assert await value(service, writing(service, "b")) is not None  # whatever was left had its sweep
        passes = service.bagel.engine.passes
        await asyncio.sleep(0.1)
        assert service.bagel.engine.passes == passes
        assert service.scheduler.counts["cancelled"] == 2

    served(test)


def test_requests_that_fail_do_not_touch_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(service: Service) -> None:
        step = service.bagel.engine.step

        def short_of_memory(forwards: Any) -> Any:
            if any(len(row.segments[0].ids) > 30 for f in forwards for row in f.rows if _is_text(row)):
                raise torch.OutOfMemoryError("no memory")
            return step(forwards)

        monkeypatch.setattr(service.bagel.engine, "step", short_of_memory)
        texts = ["a", "b" * 40, "c", "d" * 50]
        jobs = [value(service, writing(service, text, seed=3)) for text in texts]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert [isinstance(one, Exception) and is_out_of_memory(one) for one in results] == [False, True] * 2
        assert results[0] == tiny.bagel().using(SAMPLING).ask([], "a", seed=3)
        with pytest.raises(ValueError, match="nothing was said"):
            chat = service.bagel.chat_request
            await value(service, lambda: chat([], reply="text", size=None, seed=0, think=False))

    served(test)


def _is_text(row: Any) -> bool:
    return hasattr(row.segments[0], "ids")


def test_full_late_and_closed() -> None:
    async def test(service: Service) -> None:
        jobs = [asyncio.create_task(value(service, drawing(service, "a"))) for _ in range(10)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert any(isinstance(one, Full) for one in results) and any(
            isinstance(one, Image.Image) for one in results
        )
        service.limits = replace(service.limits, request_seconds=0.0)
        with pytest.raises(TimeoutError):
            await value(service, drawing(service, "a"))
        service.limits = replace(service.limits, request_seconds=100.0)
        last = asyncio.create_task(value(service, drawing(service, "a")))
        await asyncio.sleep(0)
        await service.close()
        with pytest.raises(CancelledError):
            await last

    served(test, queue=2, running=1)


def test_memory_errors_are_known() -> None:
    host = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    assert all(map(is_out_of_memory, (host, MemoryError(), torch.OutOfMemoryError("no memory"))))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
