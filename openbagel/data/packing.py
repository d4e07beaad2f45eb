"""Which samples stand together in a pack: logical streams over the rows, each packing alone.

    rows of a dataset in the order of an epoch   | share 0 | share 1 | … | share 63 |
    epoch 0                                        stream 0  stream 1  …   stream 63
    epoch 1                                        stream 63 stream 0  …   stream 62

A stream draws a dataset by weight, takes its own next row of it, and fills packs. It sees no rank, worker or
other stream: pack g of a run comes from stream g mod streams whoever trains on it. Its whole state is JSON.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np

from openbagel.checks import check_least
from openbagel.config import BagelConfig
from openbagel.data.samples import Dataset, Extent, SampleId

COST_SLACK = 1.01
"""A best-fit pack may cost so many times what a full pack costs in the mean."""
MEAN_OF_PACKS = 1000
"""The mean is that of about so many packs' tokens, so that it follows when the mixture is changed."""
MANDATORY_TRIES = 8
"""Samples drawn in search of a mandatory one that fits beside the oldest candidate."""
EPOCHS_KEPT = 4


class PackingMethod(StrEnum):
    """How samples are chosen for a pack."""

    BEST_FIT = "best_fit"
    """The largest that fits of a pool of candidates, under a limit of cost: fuller packs, equal work."""
    OFFICIAL = "official"
    """The reference's rules: in the order of drawing, what overflows goes to a buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The reference's names and defaults; prefer_buffer_before, max_buffer_size and expected_num_tokens
    matter to the official method only, pool to best fit only. Ranks share the streams evenly.
    """

    method: PackingMethod = PackingMethod.BEST_FIT
    max_num_tokens: int = 36864
    expected_num_tokens: int | None = None
    """None: 8/9 of max_num_tokens."""
    max_num_tokens_per_sample: int | None = None
    """None: 16384, or max_num_tokens if that is less."""
    prefer_buffer_before: int = 16384
    max_buffer_size: int = 50
    pool: int = 64
    streams: int = 64

    def __post_init__(self) -> None:
        check_least(self, max_num_tokens=1, expected_num_tokens=1, max_num_tokens_per_sample=1)
        check_least(self, prefer_buffer_before=0, max_buffer_size=0, pool=1, streams=1)
        values = {"expected_num_tokens": self.expected, "max_num_tokens_per_sample": self.longest}
        for name, value in values.items():
            if value > self.max_num_tokens:
                raise ValueError(f"{name} {value} is above max_num_tokens {self.max_num_tokens}; lower it")

    @property
    def expected(self) -> int:
        return self.max_num_tokens * 8 // 9 if self.expected_num_tokens is None else self.expected_num_tokens

    @property
    def longest(self) -> int:
        most = self.max_num_tokens_per_sample
        return min(16384, self.max_num_tokens) if most is None else most


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample that waits or is packed."""

    id: SampleId
    extent: Extent


def _total(samples: Sequence[Candidate]) -> Extent:
    extents = [sample.extent for sample in samples]
    return Extent(sum(extent.tokens for extent in extents), sum(extent.pairs for extent in extents))


class SkipReason(StrEnum):
    """Why a row is left out."""

    BAD = "cannot be used"
    DAMAGED = "cannot be decoded"
    LONG = "too long"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out; where and what are words for people."""

    id: SampleId
    reason: SkipReason
    where: str
    what: str


def pair_cost(config: BagelConfig) -> float:
    """FLOPs of attention for one (query, key) pair, as a share of the linear layers' FLOPs for one token.

    tokens + pairs·pair_cost is what a sample costs, in tokens.
    """
    llm = config.llm
    return 2 * llm.num_attention_heads * llm.head_dim / llm.block_weights


def shuffled(index: int, size: int, key: str) -> int:
    """Where `index` of range(size) goes in the permutation named by `key`; needs no memory for any size.

    Four Feistel rounds over the next power of four, repeated until inside the range (cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half | right
        if index < size:
            return index


class Order:
    """The order of one dataset's rows, epoch by epoch: blocks permuted, rows permuted inside each block.

    Memory grows with the blocks, not with the rows. ValueError when there are no rows.
    """

    def __init__(self, dataset: Dataset, streams: int, seed: int) -> None:
        self.sizes = np.asarray(dataset.blocks, dtype=np.int64)
        self.rows, self.streams = int(self.sizes.sum()), streams
        if not self.rows:
            raise ValueError(f"dataset {dataset.name!r} has no rows; check its paths or take it out")
        self.first_rows = np.cumsum(self.sizes) - self.sizes
        self.key = f"{seed}/{dataset.name}"
        self.layout = lru_cache(EPOCHS_KEPT)(self._layout)

    def row(self, stream: int, epoch: int, place: int) -> int | None:
        """The row at a place of the stream's share of an epoch; None when the share ends before it."""
        share = (stream + epoch) % self.streams
        index = share * self.rows // self.streams + place
        if index >= (share + 1) * self.rows // self.streams:
            return None
        blocks, ends = self.layout(epoch)
        turn = int(np.searchsorted(ends, index, side="right"))
        block, size = int(blocks[turn]), int(self.sizes[blocks[turn]])
        inside = shuffled(index - int(ends[turn]) + size, size, f"{self.key}/{epoch}/{block}")
        return int(self.first_rows[block]) + inside

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in this epoch's order, and where each ends."""
        blocks = list(range(len(self.sizes)))
        random.Random(f"{self.key}/{epoch}").shuffle(blocks)
        return np.asarray(blocks), np.cumsum(self.sizes[blocks])


Measure = Callable[[SampleId], Extent]
"""Gives a sample's extent, or raises ValueError for a bad row."""


class Supply:
    """What all streams draw from.

    Whoever sets `watch` hears of every row that is looked at: None, or why it is skipped; it may raise.
    """

    def __init__(
        self, datasets: Sequence[Dataset], packing: Packing, *, seed: int, measure: Measure, pair_cost: float
    ) -> None:
        self.datasets = {dataset.name: dataset for dataset in datasets}
        self.packing, self.seed = packing, seed
        self.measure, self.pair_cost = measure, pair_cost
        self.watch: Callable[[SampleId, Skipped | None], None] = lambda _id, _skipped: None
        self.weights = [dataset.weight for dataset in datasets]
        if len(self.datasets) < len(datasets):
            raise ValueError(f"two of the datasets {[d.name for d in datasets]} share a name; rename one")
        if not sum(self.weights) > 0 or min(self.weights) < 0:
            raise ValueError(f"weights {self.weights} must not be negative, and one must be above 0")
        self.orders = {dataset.name: Order(dataset, packing.streams, seed) for dataset in datasets}
        self.mandatory = [dataset.name for dataset in datasets if dataset.is_mandatory]

    def look(self, id: SampleId) -> Candidate | Skipped:
        """A sample that may be packed, or why it may not."""
        most, reason = self.packing.longest, SkipReason.BAD
        try:
            found, what = self.measure(id), "it holds no tokens"
        except (OSError, ValueError) as error:
            found, what = Extent(0, 0), str(error)
        if found.tokens > most:
            reason, what = SkipReason.LONG, f"{found.tokens} tokens, max_num_tokens_per_sample is {most}"
        fits = 0 < found.tokens <= most
        skipped = None if fits else Skipped(id, reason, self.datasets[id.dataset].where(id.row), what)
        self.watch(id, skipped)
        return skipped or Candidate(id, found)


class Stream:
    """Packs without end, one after the other; goes on exactly from a state that `state_dict` gave."""

    def __init__(self, supply: Supply, index: int, state: dict[str, Any] | None = None) -> None:
        self.supply, self.index = supply, index
        state = state or {"draws": 0, "drawn": [0, 0], "places": {}, "waiting": []}
        self.draws: int = state["draws"]
        self.drawn = Extent(*state["drawn"])
        self.places = {name: tuple(state["places"].get(name, (0, 0))) for name in supply.datasets}
        self.waiting = [Candidate(SampleId(*item[:3]), Extent(*item[3:])) for item in state["waiting"]]

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the draws made, the sums of their mean extent, the (epoch, place) to go on at in each
        dataset, and the samples of the pool or buffer in the order of drawing.
        """
        waiting = [[*astuple(sample.id), *astuple(sample.extent)] for sample in self.waiting]
        places = {name: list(place) for name, place in self.places.items()}
        return {"draws": self.draws, "drawn": list(astuple(self.drawn)), "places": places, "waiting": waiting}

    def next_pack(self) -> tuple[list[Candidate], list[Skipped]]:
        """The samples of the next pack, at least one, and the rows that were skipped on the way to it."""
        self.skipped: list[Skipped] = []
        official = self.supply.packing.method is PackingMethod.OFFICIAL
        return (self._official() if official else self._best_fit()), self.skipped

    def _official(self) -> list[Candidate]:
        packing, buffer = self.supply.packing, self.waiting
        pack = [self._draw(name) for name in self.supply.mandatory]
        tokens = _total(pack).tokens
        while True:
            buffered = tokens < packing.prefer_buffer_before and bool(buffer)
            sample = buffer.pop(0) if buffered else self._draw()
            if tokens + sample.extent.tokens <= packing.max_num_tokens:
                pack.append(sample)
                tokens += sample.extent.tokens
                if tokens >= packing.expected:
                    return pack
            elif buffered or len(buffer) >= packing.max_buffer_size:
                return pack  # this sample is lost, as in the reference
            else:
                buffer.append(sample)

    def _best_fit(self) -> list[Candidate]:
        """The oldest candidate, so that none waits for ever; one of each mandatory dataset; then, as long as
        one fits, the largest that is no dearer per token than the tokens left may be, or else the largest.

        A pack costs at most COST_SLACK times what a full one costs in the mean of the draws, so that ranks
        have equal work; its first samples alone may cost more.
        """
        supply, most, pool = self.supply, self.supply.packing.max_num_tokens, self.waiting
        pool += [self._draw() for _ in range(supply.packing.pool - len(pool))]
        pack = [pool.pop(0)]
        for name in supply.mandatory:
            if all(sample.id.dataset != name for sample in pack):
                pack += self._mandatory(name, most - _total(pack).tokens)
        budget = COST_SLACK * self._cost(self.drawn) / self.drawn.tokens * most
        used = _total(pack)
        while True:
            pool += [self._draw() for _ in range(supply.packing.pool - len(pool))]
            room, left = most - used.tokens, budget - self._cost(used)
            fitting = [c for c in pool if c.extent.tokens <= room and self._cost(c.extent) <= left]
            if not fitting:
                return pack
            cheap = [c for c in fitting if self._cost(c.extent) * room <= left * c.extent.tokens]
            best = max(cheap or fitting, key=lambda candidate: candidate.extent.tokens)
            pack.append(best)
            pool.remove(best)
            used = Extent(used.tokens + best.extent.tokens, used.pairs + best.extent.pairs)

    def _mandatory(self, name: str, room: int) -> list[Candidate]:
        """The oldest candidate of a dataset that fits; none when neither pool nor some draws have one."""
        for _ in range(MANDATORY_TRIES):
            for sample in self.waiting:
                if sample.id.dataset == name and sample.extent.tokens <= room:
                    self.waiting.remove(sample)
                    return [sample]
            self.waiting.append(self._draw(name))
        return []

    def _cost(self, extent: Extent) -> float:
        return extent.tokens + self.supply.pair_cost * extent.pairs

    def _draw(self, only: str | None = None) -> Candidate:
        """The next sample of one dataset, or of one drawn by weight; a skipped row counts as a draw."""
        while isinstance(found := self._next(only or self._drawn_dataset()), Skipped):
            self.skipped.append(found)
        drawn, new = self.drawn, found.extent
        half = 1 + (drawn.tokens > MEAN_OF_PACKS * self.supply.packing.max_num_tokens)
        self.drawn = Extent(drawn.tokens // half + new.tokens, drawn.pairs // half + new.pairs)
        return found

    def _drawn_dataset(self) -> str:
        chance = random.Random(f"{self.supply.seed}/{self.index}/{self.draws}")
        self.draws += 1
        return chance.choices(list(self.supply.datasets), self.supply.weights)[0]

    def _next(self, name: str) -> Candidate | Skipped:
        """The stream's next row of a dataset."""
        epoch, place = self.places[name]
        while (row := self.supply.orders[name].row(self.index, epoch, place)) is None:
            epoch, place = epoch + 1, 0
        self.places[name] = (epoch, place + 1)
        return self.supply.look(SampleId(name, epoch, row))
