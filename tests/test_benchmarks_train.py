"""The training benchmarks run, and compare what is equal."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import resume, train
from benchmarks.train import Bench
from openbagel.attention import visible


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(64, 2)


@pytest.mark.parametrize("mix", list(train.MIXES))
def test_reference_style_computes_the_same(bench: Bench, mix: str):
    pack = bench.pack(700, mix)
    assert len(pack.labels) and len(pack.targets) and len({*pack.lengths}) > 2
    loss, gradient = train.differences(bench, pack)
    assert 0 < gradient < train.TOLERANCE and 0 < loss < train.TOLERANCE


def test_a_wrong_mask_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "dense_mask", lambda spans: torch.ones(2 * [sum(s.length for s in spans)]) > 0)
    assert min(train.differences(bench, bench.pack(700))) > 100 * train.TOLERANCE


def test_dense_masks_are_the_rule(bench: Bench):
    pack = bench.pack(700, "paper")
    stored = torch.argsort(pack.logical)
    for spans, places in zip(pack.spans, stored.split(pack.lengths), strict=True):
        assert torch.equal(train.dense_mask(spans), visible(pack, places[:, None], places[None]))


def test_masks_grow_with_splits_not_with_pairs(bench: Bench):
    ours, theirs, _ = bench.runs
    small, large = bench.pack(700), bench.pack(2800)
    for run, most, least in ((ours, 1.3, 0.5), (theirs, 8, 2.5)):
        growth, few = (train.mask_bytes(run, large) / len(large), train.mask_bytes(run, small) / len(small))
        assert least < growth / few < most, run.name


def test_a_layer_does_less_than_reference_style():
    counted = train.layer_operations(700)
    assert counted["ours"] < 0.9 * counted["reference-style"]


def test_it_prints_its_tables(capsys: pytest.CaptureFixture[str]):
    arguments = "--tokens 500 --width 64 --layers 1 --rounds 1 --masks 500 --mix released"
    train.main(arguments.split())
    said = capsys.readouterr().out
    assert "reference-style, nothing recomputed" in said and "best_fit" in said


def test_a_killed_run_is_compared_with_one_left_alone():
    with resume.Bench.temporary("forked") as bench:
        case = resume.Case(workers=0, accumulation=1, ranks=1)
        outcome = bench.outcome(case, kills=2, seed=2)
        assert outcome.kills and not outcome.differences
        whole, cut = bench.folder / "whole-1-1-16", bench.folder / "cut-0-1-1"
        log, facts = cut / "metrics.jsonl", max((cut / "checkpoints").glob("step-*")) / "facts.json"
        rows = resume.read_rows(log)
        assert [row["step"] for row in rows] == list(range(16))
        log.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"step": 7}))
        (cut / "checkpoint" / "config.json").write_text("{}")
        assert resume.differences(whole, cut) == ["rows of the log", "step", "config.json"]


def test_what_ends_badly_is_told(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"folder": str(tmp_path / "run"), "trane": {}}))
    with resume.watched(resume.Forked.start(path, 1)) as life:
        resume.until(lambda: resume.ended(life), "end")
        with pytest.raises(RuntimeError, match=r"ended with 2[\s\S]*'trane'.*'train'"):
            resume.ended_well(life, path)


def test_kills_are_shared():
    assert resume.shares(50, 12) == [5, 5] + [4] * 10
