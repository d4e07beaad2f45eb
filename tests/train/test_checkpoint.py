"""Checkpoints that survive kills, full disks and flipped bits, and fit any number of ranks."""

import resource
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openbagel.train.checkpoint import Checkpoints, Stored, training_tensors
from openbagel.train.parallel import Parallel, Ranks
from openbagel.train.trainer import Training
from tests.train.processes import run_ranks
from tests.train.toy import Run, whole

ROOT = Path(__file__).parents[2]
ONE = Ranks("cpu")


def tensors_of(run: Run) -> dict[str, Tensor]:
    return training_tensors(run.model, run.ema, run.optimizer)


def load(checkpoints: Checkpoints, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The latest."""
    path = checkpoints.latest()
    assert path is not None
    return checkpoints.load(tensors, path)


def save(ranks: Ranks, folder: Path, options: dict[str, Any], resume: bool = False) -> dict[str, Tensor]:
    """Goes on from the folder's latest, or trains a step; saves; returns what was saved."""
    run, checkpoints = Run(ranks, Parallel(**options)), Checkpoints(folder, ranks)
    if resume:
        facts = load(checkpoints, tensors_of(run))
        assert facts["step"] == 1 and facts["cursors"] == {"text": [1, 0.1]}
    else:
        run.advance(1)
    state = whole(tensors_of(run))
    checkpoints.save(1 + resume, tensors_of(run), {"cursors": {"text": [1, 0.1]}})
    with torch.no_grad():  # the copy is already taken
        for parameter in run.model.parameters():
            parameter.zero_()
    checkpoints.close()
    return {name: value.numpy() for name, value in state.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[name])), name


def test_ranks_write_what_other_numbers_of_ranks_read(tmp_path: Path):
    """2 -> 4 as two replicas -> 1 -> 2 ranks, model, average and optimiser, bit for bit."""
    first = run_ranks(2, save, tmp_path, {})
    four = run_ranks(4, save, tmp_path, {"num_replicate": 2}, True)
    for found in (*first, *four):
        same(first[0], found)
    run = Run(ONE)
    checkpoints = Checkpoints(tmp_path, ONE)
    assert load(checkpoints, tensors_of(run))
    same(first[0], tensors_of(run))
    stored = Stored(tmp_path / "step-0000002")
    same(first[0], {name: stored[name] for name in stored.shapes})
    files = {path.name for path in (tmp_path / "step-0000002").iterdir()}
    assert files == {"MANIFEST.json", "facts.json", *(f"rank-0000{i}.safetensors" for i in range(4))}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path):
    straight, cut, resumed = Run(ONE), Run(ONE), Run(ONE)
    expected = straight.advance(4)[2:]
    cut.advance(2)
    checkpoints = Checkpoints(tmp_path, ONE)
    checkpoints.save(2, tensors_of(cut), {})
    checkpoints.wait()
    facts = load(Checkpoints(tmp_path, ONE), tensors_of(resumed))
    resumed.step = facts["step"]
    assert resumed.advance(2) == expected
    same(tensors_of(straight), tensors_of(resumed))


# damage -----------------------------------------------------------------------------------------------------


def numbered(step: int, size: int = 1000) -> dict[str, Tensor]:
    return {"a": torch.full((size,), float(step)), "b/step": torch.tensor(step)}


def saved(folder: Path, *steps: int, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, ONE, **options)
    for step in steps:
        checkpoints.save(step, numbered(step), {})
    checkpoints.wait()
    return checkpoints


def check_latest(checkpoints: Checkpoints, size: int = 1000) -> int:
    tensors = numbered(-1, size)
    facts = load(checkpoints, tensors)
    same(tensors, numbered(facts["step"], size))
    return facts["step"]


KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[2]]
from openbagel.train.checkpoint import Checkpoints
from openbagel.train.parallel import Ranks
from tests.train.test_checkpoint import check_latest, numbered
folder, rng, last = Path(sys.argv[1]), random.Random(0), 0
warnings.simplefilter("error")
for trial in range(12):
    child = os.fork()
    if not child:
        checkpoints = Checkpoints(folder, Ranks("cpu"))
        step = last
        while True:
            step += 1
            checkpoints.save(step, numbered(step, 300_000), {})
    time.sleep(rng.uniform(0.05, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = sorted(path.name for path in folder.glob("step-*"))
    if newest:
        found = check_latest(Checkpoints(folder, Ranks("cpu")), 300_000)
        assert found >= last and newest[-1] == f"step-{found:07d}", (found, last, newest)
        last = found
print(last)
"""


def test_killed_during_saves(tmp_path: Path):
    """SIGKILL at random moments: the newest folder is whole, and never older than before."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3


def test_a_flipped_bit_is_found(tmp_path: Path):
    checkpoints = saved(tmp_path, 1, 2)
    shard = tmp_path / "step-0000002" / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-0000002 is damaged, .*rank-00000\.safetensors has changed"):
        assert check_latest(checkpoints) == 1
    (tmp_path / "step-0000001" / "MANIFEST.json").unlink()
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        assert checkpoints.latest() is None
    checkpoints.save(2, numbered(2), {})  # the damaged folder of the same step gives way
    checkpoints.close()
    assert check_latest(checkpoints) == 2


def test_what_is_damaged_goes_before_what_is_good(tmp_path: Path):
    saved(tmp_path, 100, 200, 300, keep=3)
    for step in (200, 300):
        (tmp_path / f"step-0000{step}" / "MANIFEST.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"):
        assert check_latest(Checkpoints(tmp_path, ONE)) == 100
    assert check_latest(saved(tmp_path, 150, keep=2)) == 150
    assert {path.name for path in tmp_path.iterdir()} == {"step-0000100", "step-0000150"}


def test_other_names_are_left_alone_and_old_steps_go(tmp_path: Path):
    for name in ("best", "step-final", "step-12", ".tmp-9", "0000007"):
        (tmp_path / name).mkdir()
    checkpoints = saved(tmp_path, 4, 5, 6, 12_345_678, keep=2)
    assert check_latest(checkpoints) == 12_345_678
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best", "step-final", "step-12", "0000007", "step-0000006", "step-12345678"}
    written = (tmp_path / "step-0000006" / "MANIFEST.json").stat().st_mtime_ns
    checkpoints.save(6, numbered(6), {})
    checkpoints.close()
    assert (tmp_path / "step-0000006" / "MANIFEST.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="keep 0 must be at least 1"):
        Training(keep=0)


def small_disk(ranks: Ranks, folder: Path) -> tuple[int, int, str]:
    """The second rank may write no more than a few kilobytes from the second save on."""
    warnings.simplefilter("ignore")
    checkpoints = Checkpoints(folder, ranks)
    name = f"own@{ranks.rank}"
    checkpoints.save(1, {name: torch.ones(10_000)}, {})
    checkpoints.wait()
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    for step in (2, 3):
        checkpoints.save(step, {name: torch.ones(10_000) * step}, {})
        while checkpoints.saving:
            time.sleep(0.01)
            checkpoints.poll()
    failures = checkpoints.failures
    checkpoints.save(4, {name: torch.ones(10_000)}, {})
    with pytest.raises(RuntimeError, match="3 times in a row") as error:
        checkpoints.wait()
    own = {name: torch.zeros(10_000)}
    facts = load(checkpoints, own)
    assert facts and own[name].eq(1).all()
    return failures, facts["step"], str(error.value)


def test_a_full_disk_on_one_rank_keeps_the_last_checkpoint(tmp_path: Path):
    for failures, step, message in run_ranks(2, small_disk, tmp_path):
        assert (failures, step) == (2, 1)
        assert "File too large" in message or "FileTooLarge" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_space_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = saved(tmp_path, 1)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(4000))
    with pytest.warns(UserWarning, match="4,000 bytes are free, 4,809 are needed"):
        checkpoints.save(2, numbered(2), {})
    assert checkpoints.failures == 1 and not list(tmp_path.glob(".tmp*"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(5000))
    checkpoints.save(3, numbered(3), {})
    checkpoints.close()
    assert checkpoints.failures == 0 and check_latest(checkpoints) == 3


def no_place(ranks: Ranks, folder: Path) -> int:
    checkpoints = Checkpoints(folder / "file" / "checkpoints", ranks)
    with warnings.catch_warnings(record=True) as told:
        checkpoints.save(1, numbered(1), {})
    assert ["NotADirectoryError" in str(warning.message) for warning in told] == [True] * ranks.is_first
    return checkpoints.failures


def test_a_place_that_cannot_be_written_is_a_failed_save_on_every_rank(tmp_path: Path):
    (tmp_path / "file").touch()
    assert run_ranks(2, no_place, tmp_path) == [1, 1]


def test_what_does_not_fit_is_named(tmp_path: Path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"b/step is \(\), expected none; c is absent, expected \(1,\)"):
        load(checkpoints, {"a": torch.zeros(1000), "c": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a is \(1000,\), expected \(7,\)"):
        load(checkpoints, numbered(0, 7))
