"""Loading: the same packs for any ranks and workers, exact resume, and bad rows that are told and bounded."""

import io
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openbagel.data.loader import Batch, Cursor, Loader, Reading, merge_cursors
from openbagel.data.packing import Packing, PackingMethod, SkipReason
from openbagel.data.samples import BadRow, Draw, Look, Part, Picture, Pixels, Role
from openbagel.sequence import Text, VitImage
from tests import tiny

PACKING = Packing(
    expected_num_tokens=120,
    max_num_tokens=150,
    max_num_tokens_per_sample=80,
    prefer_buffer_before=60,
    max_buffer_size=4,
    pool=6,
    streams=4,
)


@dataclass
class Rows:
    """Rows with a picture to look at, a text of random length, and a picture to draw."""

    name: str
    weight: float = 1.0
    is_mandatory: bool = False
    blocks: Sequence[int] = (9, 20, 12)
    bad: frozenset[int] = frozenset()
    damaged: frozenset[int] = frozenset()
    """Their header is fine."""
    long: bool = False
    hangs: bool = False

    content: dict[int, bytes] = field(default_factory=dict, init=False)

    def parts(self, row: int, rng: random.Random) -> list[Part]:
        if row in self.bad:
            kind = BadRow if row % 2 else OSError  # its file's name is too long, or the disk is gone
            raise kind(f"field 'image' of row {row} is empty; fill it in")
        if self.hangs and torch.utils.data.get_worker_info() is not None:
            time.sleep(60)
        picture = Picture.of(self._png(row))
        words = Text(tuple(rng.randrange(200) for _ in range(90 if self.long else rng.randint(1, 20))), True)
        limits = tiny.LIMITS
        return [Look(picture, limits), words, Draw((picture,), limits, Role.TARGET)]

    def _png(self, row: int) -> bytes:
        if row not in self.content:
            rng = np.random.default_rng([row, len(self.name)])
            pixels = rng.integers(0, 256, (*rng.integers(2, 5, 2) * 4, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            content = buffer.getvalue()
            self.content[row] = content[: len(content) // 2] if row in self.damaged else content
        return self.content[row]

    def where(self, row: int) -> str:
        return f"{self.name}.parquet, row group 0, row {row}"


NONE: frozenset[int] = frozenset()


def rows(*, bad: frozenset[int] = NONE, damaged: frozenset[int] = NONE, blocks=(9, 20, 12)) -> list[Rows]:
    edit = Rows("edit", blocks=blocks, bad=bad, damaged=damaged)
    return [Rows("draw", 2.0), Rows("must", is_mandatory=True, blocks=(7,)), edit]


def loader(
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    *,
    datasets: list[Rows] | None = None,
    packing: Packing = PACKING,
    quarantine: Path | None = None,
    **more: Any,
) -> Loader:
    reading = Reading(packing=packing, seed=3, workers=workers, **more)
    share = (rank, ranks)
    return Loader(datasets or rows(), tiny.config(), reading, share=share, quarantine=quarantine)


def taken(loader: Loader, count: int) -> list[tuple[Batch, Cursor]]:
    batches: Iterator[tuple[Batch, Cursor]] = iter(loader)
    return list(islice(batches, count))


def content(batch: Batch) -> tuple:
    """All that is in a batch, so that == compares bits."""
    samples = []
    for sample in batch.samples:
        parts = []
        for part in sample.parts:
            match part:
                case Text():
                    parts.append(part)
                case VitImage():
                    assert part.pixels is not None
                    parts.append(part.pixels.numpy().tobytes())
                case Pixels():
                    parts.append((part.role, *(frame.numpy().tobytes() for frame in part.frames)))
        samples.append((sample.id, *parts))
    return batch.number, samples, batch.skipped


def straight(count: int, packing: Packing = PACKING) -> list[tuple]:
    return [content(batch) for batch, _ in taken(loader(packing=packing), count)]


@pytest.mark.parametrize("method", list(PackingMethod))
def test_packs_do_not_depend_on_ranks_or_workers(method: PackingMethod):
    packing = replace(PACKING, method=method)
    expected = straight(16, packing)
    assert [number for number, *_ in expected] == list(range(16))
    for ranks, workers in ((1, 1), (1, 2), (2, 0), (2, 2), (4, 1)):
        got = {}
        for rank in range(ranks):
            for batch, _ in taken(loader(rank, ranks, workers, packing=packing), 16 // ranks):
                got[batch.number] = content(batch)
        assert [got[number] for number in range(16)] == expected, (ranks, workers)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_cut_at_random_places_equals_the_whole_one(seed: int):
    rng = random.Random(seed)
    cuts = [(1, 0), (2, 1), (4, 0), (1, 2), (2, 0), (1, 0)]  # ranks and workers
    got: dict[int, tuple] = {}
    cursor, consumed = None, 0
    for (ranks, workers), (later, _) in zip(cuts, [*cuts[1:], (1, 0)], strict=True):
        end = consumed + rng.randint(1, 6)
        while end % ranks or end % later:
            end += 1
        cursors, steps = [], (end - consumed) // ranks
        for rank in range(ranks):
            part = loader(rank, ranks, workers)
            if cursor:
                part.load_state_dict(cursor)
            ahead = taken(part, steps + 1)  # one more is taken, and thrown away by the cut
            for batch, _ in ahead[:steps]:
                got[batch.number] = content(batch)
            cursors.append(json.loads(json.dumps(ahead[steps - 1][1])))
        cursor, consumed = merge_cursors(cursors), end
    assert [got[number] for number in range(consumed)] == straight(consumed)


def test_iterating_anew_goes_on_after_the_last_batch():
    one = loader(workers=2)
    got = [content(batch) for _ in range(3) for batch, _ in taken(one, 3)]
    assert got == straight(9)


def test_no_global_generator_is_touched():
    before = random.getstate(), torch.get_rng_state(), repr(np.random.get_state())
    taken(loader(workers=1), 3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert repr(np.random.get_state()) == before[2]


def test_cursors_that_do_not_fit_are_refused():
    cursor = taken(loader(0, 2), 3)[-1][1]
    loader(0, 2).load_state_dict(cursor)
    with pytest.raises(ValueError, match=r"lacks streams .*merge"):
        loader(1, 2).load_state_dict(cursor)
    with pytest.raises(ValueError, match="6 packs were consumed, no whole step of 4 ranks; use 2"):
        loader(0, 4).load_state_dict(cursor)
    with pytest.raises(ValueError, match="^rows of edit was 41 for the cursor, is 3; restore it"):
        loader(0, 2, datasets=rows(blocks=(3,))).load_state_dict(cursor)
    with pytest.raises(ValueError, match="streams was 4 for the cursor, is 8"):
        loader(0, 2, packing=replace(PACKING, streams=8)).load_state_dict(cursor)
    with pytest.raises(ValueError, match=r"after steps \[3\]"):
        merge_cursors([cursor])
    with pytest.raises(ValueError, match=r"after steps \[3, 2\]"):
        merge_cursors([cursor, taken(loader(1, 2), 2)[-1][1]])


def test_wrong_options_name_the_remedy():
    with pytest.raises(ValueError, match="4 streams cannot be shared by 3 ranks; set streams to 6"):
        loader(0, 3)
    with pytest.raises(ValueError, match="rank 2 must lie in"):
        loader(2, 2)
    with pytest.raises(ValueError, match="max_bad 1"):
        Reading(max_bad=1)


# bad rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_left_out_told_and_written_down(workers: int, tmp_path: Path):
    bad, damaged = frozenset({3, 30}), frozenset({5, 17})
    listed = tmp_path / "bad.jsonl"
    one = loader(
        workers=workers, datasets=rows(bad=bad, damaged=damaged), max_bad=0.2, quarantine=listed, timeout=60
    )
    batches = [batch for batch, _ in taken(one, 60)]
    skipped = [row for batch in batches for row in batch.skipped]
    assert {(row.id.row, row.reason) for row in skipped} == {
        *((row, SkipReason.BAD) for row in bad),
        *((row, SkipReason.DAMAGED) for row in damaged),
    }
    assert all(row.where.startswith("edit.parquet, row group 0, row ") and row.what for row in skipped)
    used = {sample.id for batch in batches for sample in batch.samples}
    assert not used & {row.id for row in skipped}
    assert {id.row for id in used if id.dataset == "edit"} == set(range(41)) - bad - damaged
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["id"]["row"] for line in lines] == [row.id.row for row in skipped]
    assert lines[0]["reason"] in ("cannot be used", "cannot be decoded")
    if not workers:  # ahead of the batches nothing is planned, so the counts are theirs
        assert one.bad_rows.counts.total() == one.bad_rows.bad == len(skipped)


def test_a_pack_that_loses_all_is_replaced_the_same_way_for_any_workers_and_on_resume():
    few = Rows("few", blocks=(40,), damaged=frozenset(range(0, 40, 2)))
    packing = replace(PACKING, max_num_tokens=80, expected_num_tokens=80, pool=2)  # packs of 1 to 3 samples

    def run(workers: int, count: int, cursor: Cursor | None = None) -> list[tuple[tuple, Cursor]]:
        one = loader(workers=workers, datasets=[few], packing=packing, max_bad=0.5)
        if cursor:
            one.load_state_dict(cursor)
        return [(content(batch), json.loads(json.dumps(cursor))) for batch, cursor in taken(one, count)]

    whole = run(0, 24)
    assert [number for (number, *_), _ in whole] == list(range(24))
    numbers_of_lost = [len(skipped) for (_, _, skipped), _ in whole]
    assert max(numbers_of_lost) > 3  # more than one pack can hold: a whole pack was lost
    assert run(2, 12) == whole[:12]
    for place in (4, 11):
        assert run(0, 8, whole[place][1]) == whole[place + 1 : place + 9]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["bad", "damaged"])
@pytest.mark.parametrize("max_bad", [0.01, 0.05])
def test_all_bad_is_an_error_within_seconds(kind: str, max_bad: float, workers: int):
    every = frozenset(range(41))
    is_bad = kind == "bad"
    datasets = [Rows("rotten", bad=every if is_bad else NONE, damaged=NONE if is_bad else every)]
    started = time.monotonic()
    with pytest.raises(ValueError) as error:
        taken(loader(workers=workers, datasets=datasets, max_bad=max_bad), 1)
    assert time.monotonic() - started < 10
    assert "max_bad is" in str(error.value) and "in rotten.parquet; such as" in str(error.value)
    assert ("cannot be used" if is_bad else "cannot be decoded") in str(error.value)


def test_the_share_of_bad_rows_is_bounded():
    some = rows(bad=frozenset({1}))  # about 1 row of 100
    taken(loader(datasets=some, max_bad=0.05), 150)
    got = []
    for workers in (0, 2):
        batches = []
        with pytest.raises(ValueError, match=r"(?s)rows are bad, max_bad is 0.01.* edit: cannot be used"):
            for batch, _ in loader(workers=workers, datasets=rows(bad=frozenset(range(4)))):
                batches.append(content(batch))
        got.append(batches)
    assert got[0] and got[0] == got[1]  # what was planned before the error still comes


def test_rows_that_are_all_too_long_are_an_error():
    datasets = [*rows(), Rows("tall", is_mandatory=True, long=True)]
    with pytest.raises(ValueError, match=r"(?s)raise max_num_tokens_per_sample.*tall: too long"):
        taken(loader(datasets=datasets), 1)


def test_a_worker_that_hangs_is_an_error():
    datasets = [Rows("hung", hangs=True)]
    with pytest.raises(RuntimeError, match="timed out after 1"):
        taken(loader(workers=1, datasets=datasets, timeout=1), 1)
