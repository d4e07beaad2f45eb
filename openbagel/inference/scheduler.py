"""Many requests on one model: which of them are stepped together, and which wait.

It knows requests only as generators, the model only as `step`, and time only as a clock::

    submit ──▶ waiting, by key ──▶ running ──▶ tick: one forward each of some of them, packed
                  (bounded)        (bounded)     │
                                                 ├─ light: a token of an answer               } half of
                                                 └─ heavy: a denoising step, a prompt, a look } the time

so that a long picture does not hold up a short answer, nor many answers a picture. A place among the running,
or in a pack that is full, goes to the key that was served least.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from openbagel.inference.engine import Forward, Request, Result, advance
from openbagel.inference.events import Event

log = logging.getLogger(__name__)


class Full(Exception):
    """No place in the queue; retry_after: seconds after which there may be one."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False, slots=True)
class Job:
    """A request that waits or runs. begin makes it, on the thread that owns the model.

    key: who asked. listen gets its events on that thread. starts_by, ends_by: times of the scheduler's clock;
    past them `future` gets a TimeoutError. A cancelled job's future gets a CancelledError.
    """

    begin: Callable[[], Request[Any]]
    key: str = ""
    listen: Callable[[Event], object] = lambda event: None
    starts_by: float = math.inf
    ends_by: float = math.inf
    future: Future[Any] = field(default_factory=Future)
    cancelled: bool = False
    request: Request[Any] | None = None
    forward: Forward | None = None
    began: float = 0.0
    served: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is taken at a time. waiting, of_key: jobs in the queue, in all and of one key. running: jobs
    that share the model. batch, tokens: of one pack; a batch of 1 lets them take turns.
    """

    waiting: int = 64
    of_key: int = 64
    running: int = 16
    batch: int = 16
    tokens: int = 2**15


class Scheduler:
    """Drives jobs through `step`, which takes their forwards and gives back the results of each.

    `submit` and `cancel` may be called from any thread, `tick` from one.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Forward]], Sequence[tuple[Result, ...]]],
        load: Load,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step, self.load, self.clock = step, load, clock
        self.waiting: dict[str, deque[Job]] = {}
        self.running: list[Job] = []
        self.served: dict[str, float] = {}
        """Seconds of the model that each key had, since it was last without a job."""
        self.spent = {True: 0.0, False: 0.0}
        """Seconds that light and heavy packs took while both kinds were there."""
        self.counts: Counter[str] = Counter()
        """Jobs accepted, refused, done, failed, cancelled and late; packs, and the forwards in them."""
        self.changed = Condition()
        self.ended = False
        self._seconds = 1.0

    def submit(self, job: Job) -> None:
        """Lets a job wait for its turn; `Full` where too many do, CancelledError after the end of `run`."""
        with self.changed:
            self.check(job.key)
            if self.ended:
                raise CancelledError
            self.counts["accepted"] += 1
            self.waiting.setdefault(job.key, deque()).append(job)
            self.changed.notify()

    @property
    def num_waiting(self) -> int:
        with self.changed:
            return sum(map(len, self.waiting.values()))

    def check(self, key: str, open: Counter[str] | None = None) -> None:
        """Raises `Full` where too many jobs wait, in all or of a key. open: how many each key has that wait,
        run or are on their way here, for a caller that asks before it takes one in.
        """
        with self.changed:
            waiting, of_key = self.num_waiting, len(self.waiting.get(key, ()))
            if open is not None:
                waiting = max(waiting, open.total() - self.load.running)
                of_key = max(of_key, open[key] - self.load.running)
            if waiting >= self.load.waiting or of_key >= self.load.of_key:
                self.counts["refused"] += 1
                raise Full(max(1, math.ceil(self._seconds * (waiting + 1) / self.load.running)))

    def cancel(self, job: Job) -> None:
        """Ends a job before its next forward; one that waits is never begun."""
        with self.changed:
            job.cancelled = True
            self.changed.notify()

    def tick(self) -> bool:
        """Makes one pass of the model; False where no job is left."""
        self._sweep()
        self._admit()
        if not self.running:
            return False
        jobs, light = self._chosen()
        started = self.clock()
        results = list(self._results(jobs))
        seconds = self.clock() - started
        self.spent[light] += seconds
        self._charge(jobs, seconds)
        for job, given in results:
            self._go_on(job, given)
        return True

    def run(self, closed: Callable[[], bool]) -> None:
        """Ticks until closed, sleeping while there is no job; then cancels those that are left."""
        try:
            while not closed():
                if not self.tick():
                    with self.changed:
                        if not self.waiting and not closed():
                            self.changed.wait()
        finally:
            with self.changed:
                self.ended = True
                for job in [*self.running, *(job for jobs in self.waiting.values() for job in jobs)]:
                    job.cancelled = True
            self._sweep()

    # which jobs -------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Ends the jobs that were cancelled or are late."""
        now = self.clock()
        with self.changed:
            ended = [job for jobs in self.waiting.values() for job in jobs if self._is_over(job, now)]
            left = {key: deque(j for j in jobs if j not in ended) for key, jobs in self.waiting.items()}
            self.waiting = {key: jobs for key, jobs in left.items() if jobs}
        for job in [*ended, *(job for job in self.running if self._is_over(job, now))]:
            self._end(job, CancelledError() if job.cancelled else TimeoutError("the request took too long"))

    def _is_over(self, job: Job, now: float) -> bool:
        return job.cancelled or now > (job.ends_by if job.request else min(job.starts_by, job.ends_by))

    def _admit(self) -> None:
        """Begins jobs while there is room, those of the key served least first."""
        while len(self.running) < self.load.running:
            with self.changed:
                busy = {*self.waiting, *(job.key for job in self.running)}
                least = min((self.served[key] for key in busy if key in self.served), default=0.0)
                self.served = {key: max(self.served.get(key, 0.0), least) for key in busy}
                if not self.waiting:
                    return
                places = Counter(job.key for job in self.running)
                key = min(self.waiting, key=lambda key: (places[key], self.served[key]))
                job = self.waiting[key].popleft()
                if not self.waiting[key]:
                    del self.waiting[key]
            self.running.append(job)
            self._go_on(job, None)

    def _chosen(self) -> tuple[list[Job], bool]:
        """The jobs of the next pack, and whether only light ones may be in it."""
        least = sorted(self.running, key=lambda job: (self.served[job.key], job.served))
        light = [job for job in least if job.forward and job.forward.is_light]
        if len(light) in (0, len(least)):
            self.spent = dict.fromkeys(self.spent, 0.0)
        only = len(light) == len(least) or (bool(light) and self.spent[True] <= self.spent[False])
        wanted = light if only else [*(job for job in least if job not in light), *light]
        chosen: list[Job] = []
        room = self.load.tokens
        for job in wanted[: self.load.batch]:
            assert job.forward is not None
            room -= job.forward.size
            if chosen and room < 0:
                break
            chosen.append(job)
        return chosen, only

    def _charge(self, jobs: Sequence[Job], seconds: float) -> None:
        for job in jobs:
            job.served += seconds / len(jobs)
            self.served[job.key] += seconds / len(jobs)

    # one pass ---------------------------------------------------------------------------------------------

    def _results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, tuple[Result, ...]]]:
        """What a pack gives; where it fails each job goes alone, and only those that fail again end."""
        try:
            results = self.step([job.forward for job in jobs if job.forward])
        except Exception as error:
            log.warning("a pack of %d failed", len(jobs), exc_info=True)
            if len(jobs) == 1:
                self._end(jobs[0], error)
            else:
                for job in jobs:
                    yield from self._results([job])
            return
        self.counts.update(packs=1, forwards=len(jobs))
        yield from zip(jobs, results, strict=True)

    def _go_on(self, job: Job, results: tuple[Result, ...] | None) -> None:
        """Runs a job's own code up to its next forward, or to its end."""
        started = self.clock()
        try:
            if job.request is None:
                job.began, job.request = started, job.begin()
            job.forward = advance(job.request, results, job.listen)
        except StopIteration as stop:
            self._end(job, value=stop.value)
        except ValueError as error:
            self._end(job, error)
        except Exception as error:
            log.exception("a request failed")
            self._end(job, error)
        self._charge([job], self.clock() - started)

    def _end(self, job: Job, error: BaseException | None = None, value: object = None) -> None:
        if job in self.running:
            self.running.remove(job)
            self._seconds += 0.1 * (self.clock() - job.began - self._seconds)
        if job.request is not None:
            job.request.close()
        kinds = {CancelledError: "cancelled", TimeoutError: "late"}
        self.counts[kinds.get(type(error), "failed") if error else "done"] += 1
        if error is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(error)


class Worker(Thread):
    """The thread that owns a model: it runs a scheduler until `close`."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(name="openbagel model", daemon=True)
        self.scheduler, self.closed = scheduler, False
        self.start()

    def run(self) -> None:
        self.scheduler.run(lambda: self.closed)

    def close(self) -> None:
        """Cancels what is left and waits for the pass that is made."""
        with self.scheduler.changed:
            self.closed = True
            self.scheduler.changed.notify()
        self.join()
