"""Rows, the console line, resume, operation counts against a counter, TensorBoard, W&B and plots."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openbagel.attention import Execution, visible
from openbagel.config import BagelConfig, bagel_7b
from openbagel.data.samples import visible_pairs
from openbagel.model.bagel import BagelModel
from openbagel.sequence import PackedSequence, Packer, Text, VaeImage, VitImage
from openbagel.train.metrics import (
    METRICS_FILE,
    Metrics,
    StepRecord,
    Track,
    peak_flops,
    plot,
    read_rows,
    smoothed,
    train_flops,
)
from tests import tiny

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \(step=(\d{7})\) Train Loss mse: (\d+\.\d{4}), "
    r"Train Loss ce: (\d+\.\d{4}), Train Steps/Sec: (\d+\.\d\d), Tokens/Sec: (\d+\.\d\d)k(.*)"
)
CLOCK = {"steps_per_second", "tokens_per_second", "seconds", "mfu"}


def record(step: int, losses: dict[str, float] | None = None, **changes: Any) -> StepRecord:
    losses = {"ce": 1 / (step + 1), "mse": 0.3 + step / 7} if losses is None else losses
    sums = {"tokens": 900, "room": 1000, "samples": 4, "flops": 1e12, "seconds": 0.5}
    facts = {"lr": 1e-3, "grad_norm": 0.1 * step, "sums": sums}
    return StepRecord(step=step, losses=losses, **{**facts, **changes})


def run(folder: Path, steps: range, *, log_every: int = 4, state: Any = None, **options: Any) -> Any:
    """A life of 12 planned steps; returns the state as a checkpoint would hold it."""
    with Metrics(
        folder, track=Track(log_every=log_every), total_steps=12, start=steps.start, **options
    ) as metrics:
        if state is not None:
            metrics.load_state_dict(state)
        for step in steps:
            metrics.step(record(step))
        return json.loads(json.dumps(metrics.state_dict()))


def test_console_line_is_the_official_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Metrics(tmp_path, track=Track(log_every=1), total_steps=9, peak=4e12) as metrics:
        metrics.step(record(0, {"ce": 0.5504, "mse": 0.4063}))
        metrics.step(record(1, more={"bad_samples": 3, "bad_steps": 0}))
    first, second = capsys.readouterr().out.splitlines()
    found = LINE.fullmatch(first)
    assert found and found.groups() == ("0000000", "0.4063", "0.5504", "2.00", "1.80", ", MFU: 50.0%")
    assert second.endswith(", MFU: 50.0%, bad_samples: 3")


def test_without_a_peak_there_is_no_mfu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, range(1))
    found = LINE.fullmatch(capsys.readouterr().out.strip())
    assert found and found[6] == ""
    assert read_rows(tmp_path / METRICS_FILE)[0]["mfu"] is None


def test_rows_average_since_the_row_before(tmp_path: Path):
    run(tmp_path, range(12))
    rows = read_rows(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 4, 8, 11]  # every fourth, and the last
    assert rows[1]["ce"] == pytest.approx(sum(1 / (step + 1) for step in range(1, 5)) / 4)
    assert rows[1]["grad_norm"] == pytest.approx(0.25)
    assert (rows[3]["tokens"], rows[3]["samples"], rows[3]["seconds"]) == (12 * 900, 48, 6.0)
    assert rows[3]["fill"] == 0.9


def test_averages_leave_out_nan_and_missing_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [{"ce": 1.0}, {"ce": 2.0}, {"ce": math.nan}, {"ce": math.inf, "mse": 0.5}, {"ce": 4.0}]
    with Metrics(tmp_path, track=Track(log_every=4), total_steps=99) as metrics:
        for step, losses in enumerate(steps):
            metrics.step(record(step, losses, grad_norm=math.nan if step == 2 else 1.0))
        metrics.step(record(8, {"ce": math.nan}))
    rows = [
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
        for line in (tmp_path / METRICS_FILE).read_text().splitlines()
    ]
    assert [(row["ce"], row.get("mse")) for row in rows] == [(1.0, None), (3.0, 0.5), (None, None)]
    assert rows[1]["grad_norm"] == 1.0
    lines = capsys.readouterr().out.splitlines()
    assert LINE.match(lines[1]) and "Train Loss ce: nan" in lines[2]


@pytest.mark.parametrize("cut", [4, 5, 7])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path: Path, cut: int):
    run(tmp_path / "whole", range(12))
    state = run(tmp_path / "cut", range(cut))
    run(tmp_path / "cut", range(cut, 10), state=state)  # killed after step 9, saved before
    with (tmp_path / "cut" / METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "ce"')  # torn
    run(tmp_path / "cut", range(cut, 12), state=state)
    whole, resumed = (read_rows(tmp_path / name / METRICS_FILE) for name in ("whole", "cut"))
    assert [set(row.items()) for row in resumed] == [set(row.items()) for row in whole]
    assert all(json.loads(line) for line in (tmp_path / "cut" / METRICS_FILE).read_text().splitlines())


def test_rows_are_on_disk_at_once(tmp_path: Path):
    with Metrics(tmp_path, track=Track(log_every=1), total_steps=9) as metrics:
        metrics.step(record(0))
        assert len(read_rows(tmp_path / METRICS_FILE)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_rows_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines: list[str] = []
    metrics = Metrics(tmp_path, track=Track(log_every=1), total_steps=9)
    metrics.report = lines.append
    full = open("/dev/full", "w", buffering=1)
    metrics.sinks[0] = lambda row: full.write(json.dumps(row) + "\n")
    metrics.step(record(0))
    metrics.close()
    assert LINE.match(lines[0]) and lines[1].startswith("this row of the metrics is lost: [Errno 28]")
    assert capsys.readouterr().out == ""
    with pytest.raises(OSError):
        full.close()


def test_no_bar_away_from_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, range(3))
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal(tmp_path: Path):
    pty = pytest.importorskip("pty")
    code = (
        "import sys, termios; from pathlib import Path; from tests.train.test_metrics import run; "
        "termios.tcsetwinsize(2, (24, 200)); run(Path(sys.argv[1]), range(6, 12))"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=theirs, stdout=theirs) as child:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how a terminal says that the other end is closed
            while piece := os.read(ours, 4096):
                shown += piece
        assert child.wait(60) == 0
    os.close(ours)
    assert b"12/12" in shown and b"(step=0000011)" in shown


def test_log_every_must_be_positive():
    with pytest.raises(ValueError, match="log_every 0"):
        Track(log_every=0)


# operations -------------------------------------------------------------------------------------------------


def test_operations_equal_those_of_a_counter():
    """All splits are full here, since plain attention computes causal splits in full."""
    c = tiny.config()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 24, 24, generator=generator)
    latents = torch.randn(36, c.latent_channels, generator=generator)
    noised = VaeImage.noised(latents, (6, 6), 0.5, latents)
    texts = [Text((1,), bare=True), VitImage(pixels), VitImage(pixels)]
    pack = tiny.packer().pack([[VitImage(pixels), VaeImage.clean(latents, (6, 6)), noised], texts])
    model = tiny.randomised(BagelModel(c))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.losses(pack, execution=Execution.SPLITS)[1].sum().backward()
    found = {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts()["Global"].items()}
    # what is left out weighs much in a model of width 64: latent projections (in 2x, out 3x), time embedder
    left_out = 2 * c.latent_channels * 64 * (2 * 72 + 3 * 36) + 2 * 2 * (2 * 256 * 64 + 3 * 64 * 64)
    # and nothing needs a gradient with respect to pixels
    left_out -= 2 * len(pack.patches) * 3 * 4**2 * 32
    ours = train_flops(c, pack)
    assert found.keys() >= {"mm", "bmm", "addmm"} and found["bmm"] > 0.1 * ours
    assert sum(found.values()) - left_out == pytest.approx(ours, rel=1e-3)


def test_causal_and_hidden_splits_cost_what_is_visible():
    for seed in range(20):
        pack = tiny.packer().pack(tiny.samples(seed))
        places = torch.arange(len(pack))
        dense = int(visible(pack, places[:, None], places[None]).sum())
        assert sum(map(visible_pairs, pack.spans)) == dense


def official_flops(config: BagelConfig, pack: PackedSequence) -> float:
    """The reference's formula, 14 % high on its own mixture: embedding and head for every token, attention in
    full squares, no ViT. Source: reference/training.md §2.2."""
    llm = config.llm
    dense = llm.num_hidden_layers * llm.block_weights + 2 * llm.vocab_size * llm.hidden_size
    squares = sum(length**2 for length in pack.lengths)
    return 6.0 * dense * len(pack) + 12.0 * llm.hidden_size * llm.num_hidden_layers * squares


def test_operations_of_the_7b_on_the_reference_mixture():
    """reference/performance.md: 36,856 tokens of 4 drawings, an edit and 2 questions; 1.713 PFLOP, and 1.136
    times as many by the reference's formula."""
    c = bagel_7b()
    latents, pixels = torch.zeros(4096, 64), torch.zeros(3, 980, 980)
    noised = VaeImage.noised(latents, (64, 64), 0.5, latents)
    words = Text(tuple(range(90)))
    drawing, question = [words, noised], [VitImage(pixels), words, Text(tuple(range(98)), loss=True)]
    edit = [VaeImage.clean(latents, (64, 64)), VitImage(pixels[:, :518, :518]), words, noised]
    pack = Packer(c, tiny.codec()).pack([drawing] * 4 + [edit] + [question] * 2)
    assert len(pack) == pytest.approx(36_856, rel=0.03)
    per_token = train_flops(c, pack) / len(pack)
    assert per_token == pytest.approx(1.713e15 / 36_856, rel=0.02)
    assert official_flops(c, pack) / train_flops(c, pack) == pytest.approx(1.136, rel=0.02)


def test_frozen_parts_cost_less():
    pack = tiny.packer().pack([[VitImage(torch.zeros(3, 16, 16)), Text(tuple(range(9)), loss=True)]])
    c = tiny.config()
    whole, llm, both = (train_flops(c, pack, frozen) for frozen in ((), ("llm",), ("llm", "vit")))
    assert whole > llm > both > whole / 3


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", None),
        ("AMD Instinct MI300X", 1336e12),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_whole_words(name: str, peak: float | None):
    assert peak_flops(name) == peak
    assert peak_flops(name, 100.0) == 100e12


# extras -----------------------------------------------------------------------------------------------------


def test_tensorboard_can_be_read_back(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(6), range(3, 9)):  # the second life begins before the end of the first
        track = Track(log_every=1, tensorboard=True)
        with Metrics(tmp_path, track=track, total_steps=9, start=steps.start) as metrics:
            for step in steps:
                metrics.step(record(step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("mse")
    assert [scalar.step for scalar in scalars] == list(range(9))
    assert scalars[7].value == pytest.approx(0.3 + 1)
    assert "mfu" not in events.Tags()["scalars"]


def run_code(code: str, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from pathlib import Path; from tests.train.test_metrics import *; {code}"
    command = [sys.executable, "-c", code, folder]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.slow
def test_wandb_runs_offline(tmp_path: Path):
    pytest.importorskip("wandb")
    code = (
        "track = Track(log_every=1, wandb_project='bagel', wandb_offline=True)\n"
        "with Metrics(Path(sys.argv[1]), track=track, total_steps=2) as metrics:\n"
        "    metrics.step(record(0)); metrics.step(record(1))"
    )
    done = run_code(code, tmp_path)
    assert done.returncode == 0, done.stderr
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-run-run0.wandb")
    assert stored.stat().st_size > 0


@pytest.mark.slow
def test_wandb_without_a_key_is_told(tmp_path: Path):
    pytest.importorskip("wandb")
    bare = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    bare |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    code = "Metrics(Path(sys.argv[1]), track=Track(wandb_project='bagel'), total_steps=2)"
    done = run_code(code, tmp_path, bare)
    assert "ValueError: Weights & Biases does not begin" in done.stderr, done.stderr
    assert "track.wandb_offline=true" in done.stderr.splitlines()[-1]


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("torch.utils.tensorboard", "wandb", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    for track in (Track(tensorboard=True), Track(wandb_project="bagel")):
        with pytest.raises(ValueError, match=r"openbagel\[track\]"):
            Metrics(tmp_path, track=track, total_steps=1)
    with pytest.raises(ValueError, match=r"openbagel\[plot\]"):
        plot([ROOT / "recipes" / "nano_log.jsonl"], tmp_path / "out.png")


# plots ------------------------------------------------------------------------------------------------------


def test_plot_of_several_runs_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        run(tmp_path / name, range(12), log_every=1)
    old = ROOT / "recipes" / "nano_log.jsonl"
    one = plot([tmp_path / "a"], tmp_path / "plots" / "one.png")
    several = plot([tmp_path / "a", str(tmp_path / "b"), old], tmp_path / "several.png", smoothing=0.9)
    assert several.read_bytes() != one.read_bytes()
    for path in (one, several):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 50


def test_plot_reads_old_logs_and_gaps(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": 50, "loss": 2.0, "ce": 3.5, "mse": 1.8, "lr": 1e-3, "seconds": 19},
        {"step": 100, "loss": 1.0, "ce": None, "mse": math.nan, "lr": 1e-3, "seconds": 38},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot([tmp_path], tmp_path / "out.png").stat().st_size > 0


def test_plot_says_what_is_wrong(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="metrics.jsonl"):
        plot([tmp_path], tmp_path / "out.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot([], tmp_path / "out.png")
    with pytest.raises(ValueError, match="smoothing 1"):
        plot([tmp_path], tmp_path / "out.png", smoothing=1)


def test_smoothing_is_unbiased():
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    assert smoothed([1.0, 3.0], 0.0) == [1.0, 3.0]
