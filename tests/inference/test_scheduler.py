"""The scheduler without a model: who goes, who waits, who is ended, and what is never lost."""

import random
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from threading import Thread
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbagel.inference import events
from openbagel.inference.engine import Forward
from openbagel.inference.scheduler import Full, Job, Load, Scheduler, Worker

LIGHT_SECONDS, HEAVY_SECONDS = 0.01, 0.2


@dataclass(frozen=True)
class Work(Forward):
    """Stands in for a forward on a model."""

    name: str
    light: bool = False
    tokens: int = 1
    fails: bool = False

    def __init__(self, name: str, *, light: bool = False, tokens: int = 1, fails: bool = False) -> None:
        values = {"rows": (), "name": name, "light": light, "tokens": tokens, "fails": fails}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def is_light(self) -> bool:
        return self.light

    @property
    def size(self) -> int:
        return self.tokens


class Machine:
    """Stands in for a model: its time passes as packs are run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.packs: list[list[Work]] = []

    def step(self, forwards: Sequence[Forward]) -> list[tuple[Any, ...]]:
        pack = cast(list[Work], list(forwards))
        self.now += LIGHT_SECONDS if all(one.is_light for one in pack) else HEAVY_SECONDS
        if any(one.fails for one in pack):
            raise RuntimeError("a device failed")
        self.packs.append(pack)
        return [(one.name,) for one in pack]

    def order(self) -> list[str]:
        return [one.name for pack in self.packs for one in pack]


def request(work: Work, times: int = 1, value: object = None) -> Callable[[], Any]:
    """What begins a request of some forwards; each must get the results of its own."""

    def begin() -> Generator[Any, Any, object]:
        for number in range(times):
            assert (yield work) == (work.name,)
            yield events.Text(str(number))
        return work.name if value is None else value

    return begin


def build(**load: int) -> tuple[Scheduler, Machine]:
    machine = Machine()
    return Scheduler(machine.step, Load(**load), clock=lambda: machine.now), machine


def submit(scheduler: Scheduler, begin: Callable[[], Any], **options: Any) -> Job:
    job = Job(begin, **options)
    scheduler.submit(job)
    return job


def drain(scheduler: Scheduler) -> None:
    while scheduler.tick():
        pass


def test_requests_share_packs_and_get_their_own_results() -> None:
    scheduler, machine = build()
    heard: dict[str, list[str]] = {name: [] for name in "abc"}
    jobs = [
        submit(
            scheduler,
            request(Work(name), times=number),
            listen=lambda event, name=name: heard[name].append(event.text),
        )
        for number, name in enumerate("abc", 1)
    ]
    drain(scheduler)
    assert [job.future.result() for job in jobs] == ["a", "b", "c"]
    assert [len(pack) for pack in machine.packs] == [3, 2, 1]
    assert heard == {"a": ["0"], "b": ["0", "1"], "c": ["0", "1", "2"]}
    assert scheduler.counts == {"accepted": 3, "done": 3, "packs": 3, "forwards": 6}
    assert not scheduler.running and not scheduler.waiting


def test_a_batch_of_one_lets_requests_take_turns() -> None:
    scheduler, machine = build(batch=1)
    for name in "abc":
        submit(scheduler, request(Work(name), times=3))
    drain(scheduler)
    assert all(len(pack) == 1 for pack in machine.packs)
    assert [sorted(machine.order()[at : at + 3]) for at in (0, 3, 6)] == [["a", "b", "c"]] * 3


def test_a_pack_holds_no_more_tokens_than_allowed() -> None:
    scheduler, machine = build(tokens=100)
    for name, size in {"a": 60, "b": 60, "c": 40, "huge": 500}.items():
        submit(scheduler, request(Work(name, tokens=size), times=2))
    drain(scheduler)
    for pack in machine.packs:
        assert len(pack) == 1 or sum(one.size for one in pack) <= 100
    assert sorted(machine.order()) == sorted([*"aabbcc", "huge", "huge"])


def test_a_long_picture_does_not_hold_up_an_answer() -> None:
    scheduler, machine = build()
    picture = submit(scheduler, request(Work("picture"), times=50))
    for _ in range(3):
        scheduler.tick()
    answer = submit(scheduler, request(Work("answer", light=True), times=30))
    started, passes = machine.now, len(machine.packs)
    while not answer.future.done():
        scheduler.tick()
    steps = machine.order()[passes:].count("picture")
    assert not picture.future.done() and 1 <= steps <= 4
    assert machine.now - started < steps * HEAVY_SECONDS + 31 * LIGHT_SECONDS


def test_many_answers_do_not_hold_up_a_picture() -> None:
    scheduler, machine = build(running=64)
    for number in range(20):
        submit(scheduler, request(Work(f"answer {number}", light=True), times=1000))
    picture = submit(scheduler, request(Work("picture"), times=10))
    while not picture.future.done():
        scheduler.tick()
    assert machine.now < 10 * HEAVY_SECONDS * 2 + 2 * HEAVY_SECONDS


def test_places_are_fair_to_keys() -> None:
    scheduler, machine = build(running=2, batch=2, waiting=1000, of_key=1000)
    for number in range(100):
        submit(scheduler, request(Work(f"greedy {number}"), times=2), key="greedy")
    scheduler.tick()
    modest = [submit(scheduler, request(Work("modest"), times=2), key="modest") for _ in range(5)]
    while not all(job.future.done() for job in modest):
        scheduler.tick()
    served = machine.order()
    assert served.count("modest") == 10 and len(served) <= 26


def test_a_full_queue_refuses_at_once() -> None:
    scheduler, _ = build(waiting=3, of_key=2)
    jobs = [submit(scheduler, request(Work("a")), key="a") for _ in range(2)]
    with pytest.raises(Full):  # a's own share
        submit(scheduler, request(Work("a")), key="a")
    jobs.append(submit(scheduler, request(Work("b")), key="b"))
    with pytest.raises(Full, match="try again in") as refused:
        submit(scheduler, request(Work("c")), key="c")
    assert refused.value.retry_after >= 1
    drain(scheduler)
    assert all(job.future.done() for job in jobs)
    assert (scheduler.counts["refused"], scheduler.counts["done"]) == (2, 3)


def test_a_cancelled_request_is_closed_before_its_next_forward() -> None:
    scheduler, machine = build(running=1)
    ended: list[str] = []

    def begin() -> Generator[Any, Any, None]:
        try:
            while True:
                yield Work("endless")
        finally:
            ended.append("endless")

    running = submit(scheduler, begin)
    waiting = submit(scheduler, request(Work("never")))
    after = submit(scheduler, request(Work("after")))
    scheduler.tick()
    scheduler.cancel(running)
    scheduler.cancel(waiting)
    drain(scheduler)
    assert machine.order() == ["endless", "after"] and ended == ["endless"]
    for job in (running, waiting):
        with pytest.raises(CancelledError):
            job.future.result()
    assert after.future.result() == "after"
    assert scheduler.counts["cancelled"] == 2


def test_deadlines_end_what_waits_and_what_runs() -> None:
    scheduler, machine = build(running=1)
    slow = submit(scheduler, request(Work("slow"), times=100), ends_by=1.0)
    late = submit(scheduler, request(Work("late")), starts_by=0.5)
    patient = submit(scheduler, request(Work("patient")))
    drain(scheduler)
    for job in (slow, late):
        with pytest.raises(TimeoutError):
            job.future.result()
    assert patient.future.result() == "patient"
    assert "late" not in machine.order() and machine.order().count("slow") <= 6


def test_only_the_request_that_fails_ends() -> None:
    scheduler, machine = build()
    good = [submit(scheduler, request(Work(name), times=3)) for name in "abc"]
    bad = submit(scheduler, request(Work("bad", fails=True), times=3))
    drain(scheduler)
    assert [job.future.result() for job in good] == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="a device failed"):
        bad.future.result()
    assert sorted(machine.order()) == sorted("abc" * 3)


def test_a_request_whose_own_code_fails_ends_alone() -> None:
    scheduler, _ = build()

    def refuses() -> Any:
        raise ValueError("no such picture")

    def breaks() -> Generator[Any, Any, None]:
        yield Work("breaks")
        raise KeyError("a bug")

    jobs = [submit(scheduler, begin) for begin in (refuses, breaks, request(Work("fine"), times=3))]
    drain(scheduler)
    with pytest.raises(ValueError, match="no such picture"):
        jobs[0].future.result()
    with pytest.raises(KeyError):
        jobs[1].future.result()
    assert jobs[2].future.result() == "fine"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
def test_every_accepted_request_ends_exactly_once(seed: int, running: int, batch: int) -> None:
    rng = random.Random(seed)
    scheduler, machine = build(running=running, batch=batch, waiting=12, of_key=6, tokens=20)
    jobs: list[Job] = []
    refused = 0
    for number in range(60):
        work = Work(
            f"{number}", light=rng.random() < 0.5, tokens=rng.randint(1, 15), fails=rng.random() < 0.1
        )
        begin = request(work, times=rng.randint(0, 4))
        try:
            ends_by = machine.now + rng.uniform(0, 5)
            jobs.append(submit(scheduler, begin, key=rng.choice("abc"), ends_by=ends_by))
        except Full:
            refused += 1
        if rng.random() < 0.3 and jobs:
            scheduler.cancel(rng.choice(jobs))
        if rng.random() < 0.5:
            scheduler.tick()
    drain(scheduler)
    counts = scheduler.counts
    assert all(job.future.done() for job in jobs)
    assert counts["accepted"] == len(jobs) and counts["refused"] == refused
    assert sum(counts[end] for end in ("done", "failed", "cancelled", "late")) == len(jobs)
    assert max(map(len, machine.packs), default=0) <= batch
    assert not scheduler.running and not scheduler.waiting


def test_a_worker_sleeps_wakes_and_closes() -> None:
    scheduler, _ = build()
    worker = Worker(scheduler)
    assert [submit(scheduler, request(Work("a"))).future.result(timeout=10) for _ in range(3)] == ["a"] * 3

    def begin() -> Generator[Any, Any, None]:
        while True:
            yield Work("endless")

    endless = submit(scheduler, begin)
    submitters = [
        Thread(target=lambda: submit(scheduler, request(Work("b"))).future.result()) for _ in range(8)
    ]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join(timeout=10)
        assert not thread.is_alive()
    worker.close()
    assert not worker.is_alive()
    with pytest.raises(CancelledError):
        endless.future.result()
