"""Requests are generators; someone else owns the loop.

A request yields either an event, or a `Forward` whose results it receives. `Engine.step` runs the forwards of
any number of requests as one pack, so a verb that drives one request and a server that drives many share all
code::

    request  ──Forward──▶ ┐                       ┌──▶ results
    request  ──Forward──▶ ├─ Engine.step (pack) ──┼──▶ results
    request  ──event────▶ │ (to whoever listens)  └──▶ results

Closing a request's generator cancels it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TypeVar

import torch
from torch import Tensor

from openbagel.inference.context import Context
from openbagel.inference.events import Event
from openbagel.model.bagel import BagelModel
from openbagel.sequence import PackedSequence, Packer, Segment, Text, VaeImage

T = TypeVar("T")
PIECE = 1024
"""Tokens of text that one forward takes in: between them other requests have their turns."""


class Read(Enum):
    """What a row wants to know: nothing, the next token's logits, or the velocity of its latents."""

    NOTHING = auto()
    LOGITS = auto()
    VELOCITY = auto()


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """New segments of one conversation. keep adds them to the context; hidden splits are never added.

    forecast: hidden states float[N, D] of the latents that stand in for running the stack.
    """

    context: Context
    segments: tuple[Segment, ...]
    keep: bool = False
    read: Read = Read.NOTHING
    forecast: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """output: float32 logits [vocabulary] or velocity [N, C]; hidden: float[N, D] of the latents, before the
    final norm.
    """

    output: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    rows: tuple[Row, ...]

    @property
    def is_light(self) -> bool:
        """Whether it is one token of a text, or its end."""
        segments = [segment for row in self.rows for segment in row.segments]
        return all(isinstance(s, Text) and s.bare and len(s.ids) <= 2 for s in segments)

    @property
    def size(self) -> int:
        """About how many tokens go through the stack; a patch of a picture counts as 16×16 pixels."""
        return sum(_tokens(s) for row in self.rows if row.forecast is None for s in row.segments)


Request = Generator[Forward | Event, tuple[Result, ...], T]


def in_pieces(ids: Sequence[int]) -> list[Text]:
    """One text, its markers among the ids, as texts that `take_in` takes in one by one."""
    return [Text(tuple(ids[first : first + PIECE]), bare=True) for first in range(0, len(ids), PIECE)]


def take_in(
    contexts: Sequence[Context], segments: Sequence[Segment], read: Read = Read.NOTHING
) -> Request[Tensor | None]:
    """Adds segments to each context, at most a `PIECE` of text at a time; what is read from the first one in
    the end.
    """
    groups, room = list[list[Segment]](), 0
    for segment in segments:
        size = len(segment.ids) if isinstance(segment, Text) else 0
        if not groups or size > room:
            groups, room = [*groups, []], PIECE
        groups[-1].append(segment)
        room -= size
    output = None
    for number, group in enumerate(groups, 1):
        rows = [Row(context, tuple(group), keep=True) for context in contexts]
        rows[0] = replace(rows[0], read=read if number == len(groups) else Read.NOTHING)
        output = (yield Forward(tuple(rows)))[0].output
    return output


class Engine:
    """Runs forwards on one model; holds no state of any request. `passes` counts the samples that went
    through the stack.
    """

    def __init__(self, model: BagelModel, packer: Packer) -> None:
        self.model, self.packer = model, packer
        self.passes = 0

    @property
    def device(self) -> torch.device:
        """Where packs go and results come from; the last norm is there however the rest is placed."""
        return self.model.language_model.model.norm.weight.device

    @torch.inference_mode()
    def step(self, forwards: Sequence[Forward]) -> list[tuple[Result, ...]]:
        """Runs all rows of all forwards as one pack; results come in the same order.

        A step that fails leaves every context as it was.
        """
        rows = [row for forward in forwards for row in forward.rows]
        new = [row for row in rows if row.forecast is None]
        pack = self._pack(new) if new else None
        hidden = iter(self._run(new, pack) if pack else ())
        states = [next(hidden) if row.forecast is None else row.forecast for row in rows]
        results = iter(self._read(rows, states))
        if pack:
            for row, spans, position in zip(new, pack.spans, pack.next_positions, strict=True):
                if row.keep:
                    row.context.commit(sum(span.length for span in spans if not span.hidden), position)
        return [tuple(next(results) for _ in forward.rows) for forward in forwards]

    def _pack(self, rows: list[Row]) -> PackedSequence:
        positions = [row.context.position for row in rows]
        return self.packer.pack([row.segments for row in rows], positions).to(self.device)

    def _run(self, rows: list[Row], pack: PackedSequence) -> list[Tensor]:
        """Per row: the hidden state of its last token, or those of its latents."""
        self.passes += len(rows)
        for row, spans in zip(rows, pack.spans, strict=True):
            row.context.prepare(sum(span.length for span in spans), keep=row.keep)
        return _states(rows, pack, self.model(pack, caches=[row.context for row in rows]))

    def _read(self, rows: list[Row], states: list[Tensor]) -> list[Result]:
        results = [Result()] * len(rows)
        for read, head in ((Read.LOGITS, self.model.logits), (Read.VELOCITY, self.model.velocity)):
            places = [i for i, row in enumerate(rows) if row.read is read]
            if not places:
                continue
            outputs = head(torch.cat([states[i] for i in places])).float()
            split = outputs.split([len(states[i]) for i in places])
            for i, output in zip(places, split, strict=True):
                results[i] = Result(output[0] if read is Read.LOGITS else output, states[i])
        return results

    def run(self, requests: Sequence[Request[T]]) -> Generator[tuple[int, Event], None, list[T]]:
        """Drives requests together, one pack a step, and returns their values; closing it cancels them.

        Yields each event with its request's number.
        """
        answers: dict[int, T] = {}
        inbox: dict[int, tuple[Result, ...] | None] = dict.fromkeys(range(len(requests)))
        try:
            while inbox:
                waiting: dict[int, Forward] = {}
                for number, results in inbox.items():
                    heard: list[Event] = []
                    try:
                        waiting[number] = advance(requests[number], results, heard.append)
                    except StopIteration as stop:
                        answers[number] = stop.value
                    yield from ((number, event) for event in heard)
                inbox = dict(zip(waiting, self.step(list(waiting.values())), strict=True)) if waiting else {}
        finally:
            for request in requests:
                request.close()
        return [answers[number] for number in range(len(requests))]

    def stream(self, request: Request[T]) -> Iterator[Event]:
        """Drives one request and yields its events; closing the iterator cancels the request."""
        with closing(self.run([request])) as running:
            yield from (event for _, event in running)

    def drive(self, request: Request[T], listen: Callable[[Event], object] | None = None) -> T:
        """Drives one request to its end."""
        return self.drive_all([request], lambda _, event: listen(event) if listen else None)[0]

    def drive_all(
        self, requests: Sequence[Request[T]], listen: Callable[[int, Event], object] | None = None
    ) -> list[T]:
        """Drives requests to their ends; listen gets each event with its request's number."""
        running = self.run(requests)
        with closing(running):
            while True:
                try:
                    number, event = next(running)
                except StopIteration as stop:
                    return stop.value
                if listen is not None:
                    listen(number, event)


def advance(
    request: Request[T],
    results: tuple[Result, ...] | None = None,
    listen: Callable[[Event], object] = lambda event: None,
) -> Forward:
    """Runs a request to its next forward, handing events on; StopIteration carries its value when it ends."""
    item = request.send(results)  # pyright: ignore[reportArgumentType]
    while not isinstance(item, Forward):
        listen(item)
        item = next(request)
    return item


def _tokens(segment: Segment) -> int:
    if isinstance(segment, Text):
        return len(segment.ids)
    if isinstance(segment, VaeImage):
        return sum(len(frame.tokens) for frame in segment.frames)
    return 0 if segment.pixels is None else segment.pixels[0].numel() // 16**2


def _states(rows: list[Row], pack: PackedSequence, hidden_TD: Tensor) -> list[Tensor]:
    counts = [
        sum(len(f.tokens) for s in row.segments if isinstance(s, VaeImage) for f in s.frames) for row in rows
    ]
    latents = hidden_TD[pack.num_und :].split(counts)
    samples = torch.arange(len(rows), device=hidden_TD.device)
    last = torch.searchsorted(pack.sample[: pack.num_und].contiguous(), samples, right=True) - 1
    final = hidden_TD[: pack.num_und][last].split(1)
    return [latents[i] if row.read is Read.VELOCITY else final[i] for i, row in enumerate(rows)]
