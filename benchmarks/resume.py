"""Kills training runs again and again, and compares each with one that was left alone.

    python -m benchmarks.resume --kills 50

SIGKILL falls at random moments: while a run starts, in or between steps, during a save. The run starts again
until it has seen its kills, then it ends. The rows of its log, weights, averages, optimiser, place in the
data and exported files must be, bit for bit, those of the run left alone, which loads its data without
workers. Every kind of data is in the mixture. (The reference: 0 of 12 batches equal after a resume; 31 of 40
kills during a save left it unusable.)

Lives are forked from a process that has imported everything; `--start command` starts Python anew each time.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from benchmarks.clock import table
from benchmarks.model import random_config
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.train import __main__ as command
from openbagel.train.checkpoint import TEMPORARY, Stored
from openbagel.train.metrics import METRICS_FILE, read_rows
from openbagel.weights import Checkpoint, save_checkpoint
from openbagel.world.dataset import write_example
from openbagel.world.samples import world_codec
from openbagel.world.scene import nano_world

SAVE_EVERY = 2
STEPS_PER_KILL = 2
MOMENTS = {"start": 0.2, "step": 0.4, "save": 0.4}
"""How often a kill is aimed at each."""
CLOCK = ("steps_per_second", "tokens_per_second", "mfu", "seconds")
"""What no two runs have in common."""
POLL_S, LIMIT_S = 0.001, 300.0
KINDS = {"draw_two": 1.0, "ask_colour": 1.0, "edit_recolour": 1.0}
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["pyarrow.parquet", "benchmarks.model", "openbagel.train.__main__", "openbagel.world.dataset"]
CONTEXT.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True, slots=True)
class Case:
    """Under which circumstances a run is killed."""

    workers: int
    accumulation: int
    ranks: int


# a life of a run --------------------------------------------------------------------------------------------


class Life(Protocol):
    """The processes of a run from one start to one end."""

    @property
    def roots(self) -> list[int]:
        """Process ids; those they start are found."""
        ...

    def code(self) -> int | None:
        """The exit code; None while any of them lives."""
        ...


@dataclass(frozen=True, slots=True)
class Forked:
    """Every rank forked from the warm process; runs what the command runs."""

    processes: list[BaseProcess]

    @classmethod
    def start(cls, recipe: Path, ranks: int) -> "Forked":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        started = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            started.append(CONTEXT.Process(target=_live, args=(recipe, master | place)))
            started[-1].start()
        return cls(started)

    @property
    def roots(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def code(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)


def _live(recipe: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    multiprocessing.set_start_method(None, force=True)  # of data workers, as the command has it
    torch.set_num_threads(1)
    with _log_of(recipe).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(command.main([str(recipe)]))


@dataclass(frozen=True, slots=True)
class Commanded:
    """`python -m openbagel.train RECIPE`, for several ranks under torchrun."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, recipe: Path, ranks: int) -> "Commanded":
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        line = [sys.executable, *(launch if ranks > 1 else ()), "-m", "openbagel.train", str(recipe)]
        with _log_of(recipe).open("ab") as log:
            return cls(subprocess.Popen(line, stdout=log, stderr=log))

    @property
    def roots(self) -> list[int]:
        return [self.process.pid]

    def code(self) -> int | None:
        return self.process.poll()


STARTS: dict[str, Callable[[Path, int], Life]] = {"forked": Forked.start, "command": Commanded.start}


def _log_of(recipe: Path) -> Path:
    return recipe.with_suffix(".log")


def ended(life: Life) -> bool:
    return life.code() is not None


def kill(life: Life, rng: random.Random) -> bool:
    """SIGKILL to all its processes in random order; False when it had ended by itself."""
    if ended(life):
        return False
    pids = life.roots
    pids += [pid for root in life.roots for pid in descendants(root)]
    rng.shuffle(pids)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    until(partial(ended, life), "die")
    return True


@contextmanager
def watched(life: Life) -> Iterator[Life]:
    """Nothing of it is left behind, whatever happens."""
    try:
        yield life
    finally:
        kill(life, random.Random(0))


def descendants(pid: int) -> Iterator[int]:
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"a run did not {what} within {LIMIT_S:g} s")
        time.sleep(POLL_S)


# what a run shows -------------------------------------------------------------------------------------------


class Eye:
    """Follows one life of a run by its files alone."""

    def __init__(self, folder: Path, life: Life) -> None:
        self.log, self.checkpoints, self.life = folder / METRICS_FILE, folder / "checkpoints", life
        self.born = time.monotonic()
        self.old = self._look()[0]
        self.first: int | None = None
        self.startup: float | None = None
        """Seconds from the start to the first step's row."""

    def _look(self) -> tuple[int, int]:
        """(inode, rows) of the log: a life writes the rows that it keeps into a new file."""
        try:
            return self.log.stat().st_ino, self.log.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0, 0

    def rows(self) -> int:
        """Rows of the log as this life sees it, 0 before it has opened it."""
        inode, count = self._look()
        if inode == self.old:
            return 0
        self.first = count if self.first is None else self.first
        if self.startup is None and count > self.first:
            self.startup = time.monotonic() - self.born
        return count

    def saving(self) -> bool:
        """Whether this life is saving; what one before has left is gone when the log is opened."""
        return self._look()[0] != self.old and any(self.checkpoints.glob(f"{TEMPORARY}*"))


@dataclass(slots=True)
class Pace:
    """Seconds that things take, as the run left alone showed."""

    start: float
    step: float
    save: float


@dataclass(slots=True)
class Outcome:
    """What became of the runs of one case."""

    kills: int = 0
    in_saves: int = 0
    restarts: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


def left_alone(recipe: Path, folder: Path, life: Life) -> Pace:
    """Watches a run to its end."""
    eye, saves, since = Eye(folder, life), [], None
    deadline = time.monotonic() + LIMIT_S
    while not ended(life) and time.monotonic() < deadline:
        eye.rows()
        saving = eye.saving()
        if since is None and saving:
            since = time.monotonic()
        elif since is not None and not saving:
            saves.append(time.monotonic() - since)
            since = None
        time.sleep(POLL_S)
    ended_well(life, recipe)
    rows = read_rows(folder / METRICS_FILE)
    return Pace(eye.startup or 1.0, rows[-1]["seconds"] / len(rows), median(saves or [0.05]))


def ended_well(life: Life, recipe: Path) -> None:
    code = life.code()
    if code != 0:
        tail = _log_of(recipe).read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{recipe} ended with {code}, not with 0:\n{tail}")


def killed(
    recipe: Path, folder: Path, start: Callable[[], Life], kills: int, pace: Pace, rng: random.Random
) -> Outcome:
    """A run killed so many times, each time further on, and its last life to the end."""
    outcome, born = Outcome(), time.monotonic()
    for index in range(kills):
        with watched(start()) as life:
            eye = Eye(folder, life)
            aim(eye, index * STEPS_PER_KILL, pace, rng)
            if not kill(life, rng):
                ended_well(life, recipe)
                break
            outcome.kills += 1
            outcome.in_saves += eye.saving()
            outcome.restarts += [eye.startup] if eye.startup is not None else []
    with watched(start()) as life:
        until(partial(ended, life), "end")
        ended_well(life, recipe)
    outcome.seconds = time.monotonic() - born
    return outcome


def aim(eye: Eye, goal: int, pace: Pace, rng: random.Random) -> None:
    """Waits for a random moment: of the start, or after the run has passed `goal` steps.

    Never for long after that: runs may be faster than their pace was, and saves shorter than a glance.
    """
    most = goal + 2 * SAVE_EVERY
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    if moment == "start":
        return pause(eye, rng.uniform(0, pace.start), goal)
    until(lambda: eye.rows() > goal or ended(eye.life), f"reach step {goal}")
    if moment == "step":
        return pause(eye, rng.uniform(0, 2 * pace.step), most)
    until(lambda: eye.saving() or eye.rows() > most or ended(eye.life), "save")
    return pause(eye, rng.uniform(0, pace.save / 2), most)


def pause(eye: Eye, seconds: float, most: int) -> None:
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end or eye.rows() > most or ended(eye.life), "go on")


# comparing --------------------------------------------------------------------------------------------------


def differences(ours: Path, theirs: Path) -> list[str]:
    """In what two runs differ; nothing, if the second repeats the first bit for bit."""
    found = []
    rows = [[_timeless(row) for row in read_rows(folder / METRICS_FILE)] for folder in (ours, theirs)]
    if rows[0] != rows[1]:
        found.append("rows of the log")
    newest = [max((folder / "checkpoints").glob("step-*")) for folder in (ours, theirs)]
    a, b = map(Stored, newest)
    if a.shapes != b.shapes:
        return [*found, "names or shapes of tensors"]
    found += [name for name in a.shapes if not torch.equal(a[name], b[name])]
    facts = [stored.facts for stored in (a, b)]
    found += [name for name in ("step", "cursor", "watch") if facts[0][name] != facts[1][name]]
    files = [sorted((folder / "checkpoint").rglob("*.*")) for folder in (ours, theirs)]
    if [path.name for path in files[0]] != [path.name for path in files[1]]:
        found.append("names of exported files")
    pairs = zip(*files, strict=False)
    return found + [x.name for x, y in pairs if x.is_file() and x.read_bytes() != y.read_bytes()]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in CLOCK}


# the runs ---------------------------------------------------------------------------------------------------


def small(folder: Path) -> None:
    """Writes a nano of two thin layers with random weights."""
    codec = world_codec(nano_world())
    config = random_config(len(codec), 64, 2)
    assert config.vit and config.vae
    vit = replace(config.vit, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = replace(config, vit=vit, vae=replace(config.vae, ch=8), max_latent_size=8)
    model = BagelModel(config)
    model.initialise(torch.Generator().manual_seed(1))
    assert config.vae
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoEncoder(config.vae)
    save_checkpoint(folder, Checkpoint(config, model, autoencoder, codec))


def example_data(folder: Path) -> str | None:
    """The mixture of the example data; None where what it needs is not installed."""
    try:
        return str(write_example(folder, rows=24))
    except ValueError as error:
        print(f"the toy world alone, for there is no example data: {error}")
        return None


@dataclass(frozen=True, slots=True)
class Bench:
    """A folder with a model and data, in which runs take place."""

    folder: Path
    mixture: str | None
    start: Callable[[Path, int], Life]
    paces: dict[Path, Pace] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def temporary(cls, start: str) -> Iterator["Bench"]:
        folder = Path(tempfile.mkdtemp(prefix="resume-"))
        try:
            small(folder / "small")
            yield cls(folder, example_data(folder / "data"), STARTS[start])
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def recipe(self, name: str, case: Case, steps: int) -> tuple[Path, Path]:
        """Writes a recipe; (its path, its run's folder)."""
        folder, path = self.folder / name, self.folder / f"{name}.yaml"
        tokens = dict.fromkeys(("max_num_tokens", "expected_num_tokens", "max_num_tokens_per_sample"), 384)
        tree = {
            "folder": str(folder),
            "start": {"checkpoint": str(self.folder / "small")},
            "data": {
                "mixture": self.mixture,
                "world": {"kinds": KINDS, "think": 0.2, "copies": 2, "examples_per_kind": 40},
                "packing": tokens | {"streams": 4, "pool": 8},  # few: runs come back to each stream
                "workers": case.workers,
            },
            "train": {
                "steps": steps,
                "schedule": {"kind": "constant", "lr": 1e-3, "warmup": 2},
                "save_every": SAVE_EVERY,
                "accumulation": case.accumulation,
                "ema": 0.9,
            },
            "track": {"log_every": 1},
            "guard": {"check_first_losses": False},
        }
        path.write_text(json.dumps(tree))
        return path, folder

    def outcome(self, case: Case, kills: int, seed: int) -> Outcome:
        """Runs one case; whole runs without workers are shared by the cases that can."""
        steps = (kills + 6) * STEPS_PER_KILL
        alone = replace(case, workers=0)
        recipe, whole = self.recipe(f"whole-{alone.ranks}-{alone.accumulation}-{steps}", alone, steps)
        if not whole.is_dir():
            with watched(self.start(recipe, case.ranks)) as life:
                self.paces[whole] = left_alone(recipe, whole, life)
        pace = self.paces[whole]
        recipe, cut = self.recipe(f"cut-{case.workers}-{case.accumulation}-{case.ranks}", case, steps)
        start, rng = partial(self.start, recipe, case.ranks), random.Random(f"{seed}/{case}")
        outcome = killed(recipe, cut, start, kills, pace, rng)
        outcome.differences = differences(whole, cut)
        return outcome


def shares(kills: int, number: int) -> list[int]:
    """Whole numbers that add up to `kills`, as equal as can be."""
    return [kills // number + (index < kills % number) for index in range(number)]


def row(case: Case, outcome: Outcome) -> list[object]:
    exact = "yes" if not outcome.differences else f"no: {', '.join(outcome.differences[:3])} …"
    restart = median(outcome.restarts) if outcome.restarts else "-"
    own = [case.workers, case.accumulation, case.ranks]
    return [*own, outcome.kills, outcome.in_saves, exact, restart, outcome.seconds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in all, shared by the cases")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--start", choices=STARTS, default="forked")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # who is killed leaves semaphores to it
    torch.set_num_threads(1)
    cases = [Case(*c) for c in itertools.product(options.workers, options.accumulation, options.ranks)]
    rows = []
    with Bench.temporary(options.start) as bench:
        for case, kills in zip(cases, shares(options.kills, len(cases)), strict=True):
            rows.append((case, bench.outcome(case, kills, options.seed)))
            print(case, rows[-1][1], file=sys.stderr, flush=True)
    headers = ["workers", "accumulation", "ranks", "kills", "in a save", "exact", "s a restart", "s in all"]
    print(table("Killed runs against runs left alone", headers, [row(*pair) for pair in rows]))
    outcomes = [outcome for _, outcome in rows]
    exact = sum(not outcome.differences for outcome in outcomes)
    survived, in_saves = sum(o.kills for o in outcomes), sum(o.in_saves for o in outcomes)
    print(f"\n{survived} kills survived, {in_saves} of them in a save; {exact} of {len(rows)} runs exact")
    return exact < len(rows)


if __name__ == "__main__":
    sys.exit(main())
