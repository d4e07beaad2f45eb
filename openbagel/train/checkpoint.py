"""Checkpoints of a run: complete or absent, verified before use, read by any number of ranks.

    step-0002000/  rank-00000.safetensors …   each rank's rows of every tensor; the header says which
                   facts.json                 step, cursors, counters, recipe, versions
                   MANIFEST.json              size and crc32 of every file, written last
    .tmp-4000/                                a save in progress, or one that was killed

A save writes everything aside, syncs it, renames the folder and syncs its parent, so that a crash at any
moment leaves the last checkpoint as it was. Shards are safetensors and not torch's own format, whose metadata
is a pickle: opening a folder never runs code, and the background writer needs no planning between ranks. All
ranks write to one shared folder.
"""

import json
import math
import os
import re
import shutil
import warnings
import zlib
from collections import ChainMap
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import openbagel
from openbagel.train.optim import EMA, Optimizer, learned
from openbagel.train.parallel import Ranks, rows_of
from openbagel.weights import save_tensors

MANIFEST, FACTS, TEMPORARY = "MANIFEST.json", "facts.json", ".tmp-"
NAME = re.compile(r"step-(\d{7,})")
READ_BYTES = 2**22
SPARE = 1.2
"""Free space asked for, as a multiple of the checkpoint."""
MAX_FAILURES = 3
FAULTS = (OSError, SafetensorError, RuntimeError, MemoryError)


def training_tensors(model: nn.Module, ema: EMA | None, optimizer: Optimizer) -> dict[str, Tensor]:
    """All live tensors that a run needs to go on: `model/…`, `ema/…`, `optimizer/…`. Weights that never
    change are left out: they are read from their source again.
    """
    trained = learned(model)
    own = {name: value for name, value in model.state_dict().items() if name in trained}
    parts = {"model": own, "ema": ema.average if ema else {}, "optimizer": optimizer.state_dict()}
    return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}


class Stored:
    """The tensors of a checkpoint folder by name, whole or by rows, whatever number of ranks wrote them."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text("utf-8"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[tuple[int, Any]]] = {}
        """Per name, first row and rows of each stored part, in order."""
        for path in sorted(folder.glob("rank-*.safetensors")):
            handle = safe_open(path, "pt")
            for name, (start, *shape) in json.loads(handle.metadata()["rows"]).items():
                self.shapes[name] = tuple(shape)
                self.parts.setdefault(name, []).append((start, handle.get_slice(name)))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; a scalar is one row."""
        pieces = []
        for first, part in self.parts[name]:
            last = first + part.get_shape()[0]
            if max(start, first) < min(stop, last):
                pieces.append(part[max(start, first) - first : min(stop, last) - first])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.rows(name, 0, (shape or (1,))[0]).reshape(shape)


class Checkpoints:
    """The checkpoints of one run folder; all ranks call each method together.

    Saves run in the background, one at a time. A fault there (a full disk on any rank) leaves the last good
    checkpoint and the training alone, shows in `failures` and as a warning at the next `poll`, and ends the
    run when it comes MAX_FAILURES times in a row. Nothing is changed in the folder before the first save.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int = 2) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self.failures = 0
        """Saves that failed in a row."""
        self.saving: Future[str | None] | None = None
        self.group = ranks.new_group()  # of the writing thread alone: training uses the others meanwhile
        self.writer = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Waits for the save before, copies the tensors and starts to write them with the first rank's facts.

        The tensors may change as soon as this returns. A step that is stored already is not stored again.
        """
        self.wait()
        known = {"step": step, "world_size": self.ranks.size, "version": openbagel.__version__}
        parts, rows = {}, {}
        for name, tensor in tensors.items():
            part, start, stores = rows_of(tensor)
            if (stores or "@" in name) and part.numel():
                parts[name], rows[name] = part, [start, *tensor.shape]
        size = self.ranks.size * sum(part.nbytes for part in parts.values())
        found = _attempt(lambda: self.ranks.is_first and self._is_stored(step, size))
        stored, fault = self.ranks.gather_objects(found)[0]
        if fault:
            self._finish(fault)
        elif not stored:
            copies = {name: part.to("cpu", copy=True).contiguous() for name, part in parts.items()}
            texts = json.dumps(rows), json.dumps({**known, **facts}, indent=2) + "\n"
            self.saving = self.writer.submit(self._write, step, copies, *texts)

    def poll(self) -> None:
        """Once per step: notices that a save has ended. RuntimeError after too many faults in a row."""
        if self.saving and self.saving.done():
            self.wait()

    def wait(self) -> None:
        """Until no save is in progress; raises as `poll` does."""
        saving, self.saving = self.saving, None
        if saving:
            self._finish(saving.result())

    def close(self) -> None:
        self.wait()
        self.writer.shutdown()

    def _finish(self, fault: str | None) -> None:
        self.failures = self.failures + 1 if fault else 0
        message = f"checkpoint not written to {self.folder}, {self.failures} times in a row: {fault}"
        if self.failures >= MAX_FAILURES:
            raise RuntimeError(message)
        if fault and self.ranks.is_first:
            warnings.warn(f"{message}; the one before stays", stacklevel=2)

    def _is_stored(self, step: int, size: int) -> bool:
        """Whether the step is stored already; OSError if it cannot be now. Removes what a kill left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(TEMPORARY + "*"):
            shutil.rmtree(path, ignore_errors=True)
        path, free = self._path(step), shutil.disk_usage(self.folder).free
        if path.is_dir() and not _damage(path):
            return True
        if free < (wanted := int(SPARE * size)):
            raise OSError(f"{free:,} bytes are free, {wanted:,} are needed")
        return False

    def _write(self, step: int, tensors: dict[str, Tensor], rows: str, facts: str) -> str | None:
        """Writes, agrees with the other ranks, commits. Returns the fault, the same on all ranks."""
        aside, shard = self.folder / f"{TEMPORARY}{step}", f"rank-{self.ranks.rank:05d}.safetensors"

        def write() -> dict[str, tuple[int, int]]:
            aside.mkdir(exist_ok=True)
            save_tensors(aside / shard, tensors, {"rows": rows})
            if self.ranks.is_first:
                (aside / FACTS).write_text(facts, "utf-8")
            names = [shard, FACTS] if self.ranks.is_first else [shard]
            return {name: _sync(aside / name) for name in names}

        written, faults = zip(*self.ranks.gather_objects(_attempt(write), self.group), strict=True)
        fault = next(filter(None, faults), None)
        if self.ranks.is_first:
            fault = fault or _attempt(lambda: self._commit(step, aside, dict(ChainMap(*written))))[1]
            if fault:
                shutil.rmtree(aside, ignore_errors=True)
            _attempt(lambda: [_remove(path) for path in self._newest(step)[self.keep :]])
        return self.ranks.gather_objects(fault, self.group)[0]

    def _commit(self, step: int, aside: Path, files: dict[str, tuple[int, int]]) -> None:
        (aside / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n", "utf-8")
        for path in (aside / MANIFEST, aside):
            _sync(path)
        _remove(self._path(step))  # damaged, if it is there at all
        aside.rename(self._path(step))
        _sync(self.folder)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _newest(self, now: float = math.inf) -> list[Path]:
        """What is above the step of now comes last: a run that has fallen behind it found it damaged."""
        steps = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
        return sorted(steps, key=lambda path: ((step := int(path.name[5:])) > now, -step))

    def latest(self) -> Path | None:
        """The newest folder whose every byte is as written; a warning for each newer one that is not."""
        for path in self.ranks.gather_objects(self._newest())[0]:
            damage = _damage(path, slice(self.ranks.rank, None, self.ranks.size))  # each rank reads its share
            damage = next(filter(None, self.ranks.gather_objects(damage)), None)
            if not damage:
                return path
            if self.ranks.is_first:
                warnings.warn(f"{path} is damaged, trying the one before it: {damage}", stacklevel=2)
        return None

    def load(self, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
        """Copies a checkpoint into live tensors, sharded in any way, and returns its facts. ValueError where
        names or shapes differ.
        """
        stored = Stored(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted, known = dict(ChainMap(*self.ranks.gather_objects(shapes))), stored.shapes
        names = [name for name in sorted({*wanted, *known}) if wanted.get(name) != known.get(name)]
        if names:
            told = (f"{n} is {known.get(n, 'absent')}, expected {wanted.get(n, 'none')}" for n in names[:3])
            hint = "name another folder, or its recipe.json (8-bit states fit so many ranks as wrote them)"
            raise ValueError(f"{path} is of another run; {hint}; {len(names)} faults: {'; '.join(told)}")
        for name, tensor in tensors.items():
            part, start, _ = rows_of(tensor)
            if part.numel():
                part.copy_(stored.rows(name, start, start + len(part)))
        return stored.facts


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or ({}, what the machine refused)."""
    try:
        return action(), None
    except FAULTS as error:
        return {}, f"{type(error).__name__}: {error}"


def _remove(path: Path) -> None:
    """Out of sight first, so that no half of it is ever found."""
    if path.is_dir():
        hidden = path.rename(path.with_name(f"{TEMPORARY}old-{path.name}"))
        shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> tuple[int, int]:
    """Brings a file or folder to the disk; size and checksum of a file."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return _contents(path) if path.is_file() else (0, 0)


def _contents(path: Path) -> tuple[int, int]:
    """(bytes, crc32) of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _damage(folder: Path, share: slice = slice(None)) -> str | None:
    """What is wrong with this share of a checkpoint's files; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        changed = [name for name in sorted(files)[share] if _contents(folder / name) != tuple(files[name])]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{changed[0]} has changed" if changed else None
