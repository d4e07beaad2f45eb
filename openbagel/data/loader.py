"""Packs in their order, decoded by workers, each with the place to go on from.

    planned here, one stream after the other          decoded in workers       taken in order
    pack r, r + R, r + 2R … of rank r of R ranks  ──>  [SampleId] -> Sample ──>  (Batch, cursor)

Workers hold no state: they plan a row again with the same random numbers and decode it. So neither the order
nor a sample depends on their number, and the cursor knows nothing of what is decoded ahead.
"""

import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from openbagel.checks import check_least, spared
from openbagel.config import BagelConfig, to_json
from openbagel.data.packing import Packing, Skipped, SkipReason, Stream, Supply, pair_cost
from openbagel.data.samples import Dataset, Part, Sample, SampleId, decode, extent

Cursor = dict[str, Any]
"""JSON values: what a loader goes on from."""

BAD_FROM_THE_START = 20
"""So many rows and all of them bad: an error."""
LEAST_ROWS = 1000
"""The allowed share of bad rows is counted on at least so many rows."""
MOST_LONG = 1000
"""So many rows of a dataset, one after the other too long: an error."""

_Planned = tuple[int, str, dict[str, Any], list[Skipped]]
"""Of a pack: its number, its stream, the stream's state after it, the rows skipped on the way to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How data is read; packing and seed alone decide what is in a pack."""

    packing: Packing = Packing()
    seed: int = 42
    workers: int = 0
    prefetch_factor: int = 2
    timeout: float = 0.0
    """Seconds until a worker that sends nothing is an error; 0 waits for ever."""
    max_bad: float = 0.01
    """The share of rows that may be bad."""

    def __post_init__(self) -> None:
        check_least(self, workers=0, prefetch_factor=1, timeout=0)
        if not 0 <= self.max_bad <= 0.5:
            raise ValueError(f"max_bad {self.max_bad} is a share in [0, 0.5]; mend the data above that")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One pack; number counts the packs of all ranks, skipped is what was left out on the way to it."""

    samples: list[Sample]
    skipped: list[Skipped]
    number: int


class BadRows:
    """Counts the rows that are left out since the start of this process; too many are an error.

    Rows that are too long are no fault of the data: they are counted, and bounded only one after the other.
    """

    def __init__(self, max_bad: float, quarantine: Path | None) -> None:
        self.max_bad, self.quarantine = max_bad, quarantine
        self.seen = self.bad = 0
        self.listed = 0
        """Bytes of the quarantine file."""
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """By dataset, reason, and shard: what `where` says before its first comma."""
        self._examples: dict[tuple[str, str, str], str] = {}
        self._long: Counter[str] = Counter()

    def planned(self, id: SampleId, skipped: Skipped | None) -> None:
        """Hears of every row that is planned; ValueError when too many are skipped."""
        self.seen += 1
        too_long = skipped and skipped.reason is SkipReason.LONG
        self._long[id.dataset] = self._long[id.dataset] + 1 if too_long else 0
        if skipped:
            self.count(skipped)
        if self._long[id.dataset] >= MOST_LONG:
            raise ValueError(f"too many long rows; raise max_num_tokens_per_sample\n{self.table()}")

    def count(self, skipped: Skipped) -> None:
        """A row that is left out; ValueError when they are too many."""
        key = (skipped.id.dataset, skipped.reason.value, skipped.where.split(",")[0])
        self.counts[key] += 1
        self._examples.setdefault(key, f"{skipped.where}: {skipped.what}")
        self.bad += skipped.reason is not SkipReason.LONG
        most = self.max_bad * max(self.seen, LEAST_ROWS)
        if self.bad > most or self.bad == self.seen >= BAD_FROM_THE_START:
            told = f"{self.bad} of {self.seen} rows are bad, max_bad is {self.max_bad:g}"
            remedy = "mend or remove them (openbagel data doctor), or raise max_bad"
            raise ValueError(f"{told}; {remedy}\n{self.table()}")

    def table(self, most: int = 10) -> str:
        """What was left out most: counts, reasons and shards, each with an example."""
        rows = [(count, *key, self._examples[key]) for key, count in self.counts.most_common(most)]
        return "\n".join("{:6d}  {}: {}, in {}; such as {}".format(*row) for row in rows)

    def write(self, skipped: Sequence[Skipped]) -> None:
        """Lists them in the quarantine file, if there is one; what a killed run listed ahead goes first."""
        if self.quarantine and skipped:
            with spared("skipped rows are not listed"), self.quarantine.open("ab") as file:
                file.seek(file.truncate(min(file.tell(), self.listed)))
                file.writelines(json.dumps(to_json(row)).encode() + b"\n" for row in skipped)
                self.listed = file.tell()


class _Decoder(TorchDataset[Sample | Skipped]):
    """Turns an id into a sample; runs in workers and changes nothing."""

    def __init__(self, datasets: Sequence[Dataset], seed: int) -> None:
        self.datasets = {dataset.name: dataset for dataset in datasets}
        self.seed = seed

    def __getitem__(self, id: SampleId) -> Sample | Skipped:
        try:
            return Sample(id, decode(self.parts(id)))
        except (OSError, ValueError) as error:
            where = self.datasets[id.dataset].where(id.row)
            return Skipped(id, SkipReason.DAMAGED, where, str(error))

    def parts(self, id: SampleId) -> list[Part]:
        return self.datasets[id.dataset].parts(id.row, id.random(self.seed, "parts"))


def _single(facts: dict[str, Any]) -> dict[str, int]:
    """The facts of a cursor, the rows of each dataset as one of them."""
    rows = {f"rows of {name}": count for name, count in facts["rows"].items()}
    return {name: value for name, value in facts.items() if name != "rows"} | rows


class Loader:
    """Yields (Batch, cursor) without end: the packs of one rank.

    The cursor holds the state after its batch, whatever is decoded ahead; iterating anew goes on after the
    batch that was yielded last. share: which rank of how many; skipped rows are appended to the JSONL file
    quarantine. ValueError when the streams cannot be shared by the ranks, a dataset has no rows, or too many
    rows are bad.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        config: BagelConfig,
        reading: Reading,
        *,
        share: tuple[int, int] = (0, 1),
        quarantine: Path | None = None,
    ) -> None:
        self.reading, (self.rank, self.ranks) = reading, share
        seed, streams = reading.seed, reading.packing.streams
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank {self.rank} must lie in [0, {self.ranks}), the number of ranks")
        if rest := -streams % self.ranks:
            remedy = f"set streams to {streams + rest}"
            raise ValueError(f"{streams} streams cannot be shared by {self.ranks} ranks; {remedy}")
        decoder = self._decoder = _Decoder(datasets, seed)
        self.bad_rows = BadRows(reading.max_bad, quarantine)
        measure, cost = (lambda id: extent(decoder.parts(id), config)), pair_cost(config)
        self._supply = Supply(datasets, reading.packing, seed=seed, measure=measure, pair_cost=cost)
        self._supply.watch = self.bad_rows.planned
        rows = {name: order.rows for name, order in self._supply.orders.items()}
        self._facts = {"seed": seed, "streams": streams, "rows": rows}
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        self._states: dict[str, Any] = {}

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        reading, parallel = self.reading, self.reading.workers > 0
        skipped: list[Skipped] = []
        while True:  # once, and once more after each pack that lost all its samples
            planned: deque[_Planned] = deque()
            errors: list[ValueError] = []
            decoded = DataLoader(
                self._decoder,
                batch_sampler=self._plans(planned, errors),
                num_workers=reading.workers,
                prefetch_factor=reading.prefetch_factor if parallel else None,
                timeout=reading.timeout if parallel else 0,
                collate_fn=list,
                generator=self._generator,
            )
            for found in decoded:
                number, stream, state, left_out = planned.popleft()
                self._states = self._states | {stream: state}
                damaged = [item for item in found if isinstance(item, Skipped)]
                samples = [item for item in found if isinstance(item, Sample)]
                self.bad_rows.write([*left_out, *damaged])
                for item in damaged:
                    self.bad_rows.count(item)
                skipped += [*left_out, *damaged]
                if not samples:
                    break  # its stream's next pack takes its place: all after it is planned anew
                self._step += 1
                yield Batch(samples, skipped, number), self.state_dict()
                skipped = []
            else:
                raise errors[0]

    def _plans(self, planned: deque[_Planned], errors: list[ValueError]) -> Iterator[list[SampleId]]:
        """The ids of pack after pack; what shall be known when its samples are back goes to `planned`.

        An error ends them, to be raised after the packs before it, with any number of workers.
        """
        streams: dict[str, Stream] = {}
        for step in itertools.count(self._step):
            number = step * self.ranks + self.rank
            name = str(number % self._facts["streams"])
            if name not in streams:
                streams[name] = Stream(self._supply, int(name), self._states.get(name))
            try:
                pack, skipped = streams[name].next_pack()
            except ValueError as error:
                errors.append(error)
                return
            planned.append((number, name, streams[name].state_dict(), skipped))
            yield [candidate.id for candidate in pack]

    def state_dict(self) -> Cursor:
        """The cursor after the batch that was yielded last."""
        return {"facts": self._facts, "step": self._step, "ranks": self.ranks, "states": self._states}

    def load_state_dict(self, cursor: Cursor) -> None:
        """Goes on from a cursor of this rank, or from those of all ranks merged, whatever their number.

        ValueError when seed, streams or datasets are others, when the packs consumed are no whole number of
        steps for the ranks there are now, or when streams are missing.
        """
        was, now = _single(cursor["facts"]), _single(self._facts)
        for name in was | now:
            if (one := was.get(name)) != (other := now.get(name)):
                raise ValueError(f"{name} was {one} for the cursor, is {other}; restore it or start anew")
        then, ranks = cursor["ranks"], self.ranks
        consumed = cursor["step"] * then
        if consumed % ranks:
            raise ValueError(f"{consumed} packs were consumed, no whole step of {ranks} ranks; use {then}")
        started = range(min(consumed, self._facts["streams"]))
        mine = {str(index) for index in started if index % ranks == self.rank}
        if missing := mine - cursor["states"].keys():
            raise ValueError(f"the cursor lacks streams {sorted(missing)}; merge those of all ranks first")
        self._step = consumed // ranks
        self._states = {name: cursor["states"][name] for name in mine}


def merge_cursors(cursors: Sequence[Cursor]) -> Cursor:
    """The cursors of all ranks after the same step as one, which serves any rank of any number."""
    steps = [cursor["step"] for cursor in cursors]
    if not cursors or len(cursors) != cursors[0]["ranks"] or len(set(steps)) > 1:
        raise ValueError(f"cursors after steps {steps} are not one of each rank after the same step")
    states = {name: state for cursor in cursors for name, state in cursor["states"].items()}
    return {**cursors[0], "states": states}
