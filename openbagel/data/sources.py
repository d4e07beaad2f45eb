"""Rows at random from files: parquet, JSONL, WebDataset tars, folders of pictures with captions.

A source only reads: what a row means is the task's business (tasks.py). Files are opened when a row is
wanted, so a source travels to a worker as a few paths and offsets.
"""

import json
import random
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openbagel.checks import extra, nearest, retold
from openbagel.data.samples import BadRow

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTIONS_FILES = ("metadata.jsonl", "captions.json")
CACHE_BYTES = 512 * 2**20
ARROW_ERRORS = (OSError, ValueError, RuntimeError)
"""All that pyarrow raises for a damaged file."""


class Source(Protocol):
    """Rows of one data set, numbered through its files."""

    blocks: Sequence[int]
    """Rows of each block that is read as a whole (a row group, a file)."""

    def row(self, index: int) -> dict[str, Any]:
        """The fields of a row. BadRow when it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """The place of a row in words, such as "part-0.parquet, row group 2, row 17"."""
        ...


def located(starts: Sequence[int], index: int) -> tuple[int, int]:
    """The block of a row and its place inside; starts are the blocks' first rows, and the end of all."""
    if not 0 <= index < starts[-1]:
        raise IndexError(f"row {index} of {starts[-1]}")
    block = bisect_right(starts, index) - 1
    return block, index - starts[block]


def open_source(
    path: Path, *, num_used: int | None = None, info: Path | None = None, shuffle_seed: int | None = None
) -> Source:
    """Reads a file, or the files of one kind in a folder: *.parquet, *.tar, *.jsonl, else pictures.

    num_used counts files of parquet and tars (their list repeats when it is larger, as in the reference),
    lines of JSONL (taken after shuffling) and pictures. Raises ValueError naming a file that is damaged,
    missing, or that `info`, the official `parquet_info` of edits, does not know.
    """
    if not path.exists():
        raise ValueError(f"no such data: {path}; correct data_dir or jsonl_path in dataset_info")
    files: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        files.setdefault("" if file.name == "metadata.jsonl" else file.suffix, []).append(file)
    if found := files.get(".parquet"):
        if info is not None:
            _check_info(info, found)
        return ParquetSource(_used(found, num_used))
    if found := files.get(".tar"):
        return TarSource(_used(found, num_used))
    if found := files.get(".jsonl"):
        return JsonlSource(found, num_used, shuffle_seed)
    return FolderSource(path, num_used)


def _used(files: list[Path], num_used: int | None) -> list[Path]:
    return list(islice(cycle(files), len(files) if num_used is None else num_used))


def _read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    with retold("it cannot be read: {error}", OSError, kind=BadRow), path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _object(content: bytes, what: str) -> dict[str, Any]:
    message = f"{what} is no valid JSON ({{error}}): {content[:60]!r}"
    with retold(message, ValueError, RecursionError, kind=BadRow):
        value = json.loads(content)
    if not isinstance(value, dict):
        raise BadRow(f"{what} is no JSON object but {content[:60]!r}; write {{field: value, …}}")
    return value


# parquet ---------------------------------------------------------------------------------------------------


class ParquetSource:
    """Rows of parquet files, a row group at a time; the groups read last stay in memory up to CACHE_BYTES.

    Page checksums are verified where the writer made them: without them a flipped bit passes unnoticed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        footers = {file: _parquet_file(file).metadata for file in dict.fromkeys(files)}
        self.groups = [(file, group) for file in files for group in range(footers[file].num_row_groups)]
        self.blocks: Sequence[int] = [footers[file].row_group(group).num_rows for file, group in self.groups]
        self.starts = list(accumulate(self.blocks, initial=0))
        self.cache: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": OrderedDict()}

    def row(self, index: int) -> dict[str, Any]:
        block, offset = located(self.starts, index)
        with retold("the row group is damaged ({error}); get a complete copy", *ARROW_ERRORS, kind=BadRow):
            table = self._table(*self.groups[block])
            return {name: table.column(name)[offset].as_py() for name in table.column_names}

    def where(self, index: int) -> str:
        block, offset = located(self.starts, index)
        return "{}, row group {}, row {}".format(*self.groups[block], offset)

    def _table(self, path: Path, group: int) -> Any:
        if (path, group) not in self.cache:
            self.cache[path, group] = _parquet_file(path).read_row_group(group, use_threads=False)
            while len(self.cache) > 1 and sum(t.nbytes for t in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache.move_to_end((path, group))
        return self.cache[path, group]


def arrow(part: str = "") -> Any:
    """pyarrow, or a part of it such as ".parquet"; ValueError when it is not installed."""
    return extra(f"pyarrow{part}", "data", "parquet")


def _parquet_file(path: Path) -> Any:
    parquet = arrow(".parquet")
    with retold(f"{path} is damaged or no parquet file ({{error}}); get a complete copy", *ARROW_ERRORS):
        return parquet.ParquetFile(path, page_checksum_verification=True)


def _check_info(info: Path, files: Sequence[Path]) -> None:
    """Every file must have a key and every key a file: the reference silently drops what does not match.

    A key may be absolute, or relative to the data, to the JSON file or to the current folder.
    """
    remedy = "write the JSON file anew, or leave parquet_info_path out: the files know their row groups"
    keys = list(_object(_read(info), str(info)))
    known = set()
    for key in keys:
        places = [place / key for place in (files[0].parent, info.parent, Path()) if (place / key).is_file()]
        if not places:
            hint = nearest(key, map(str, files), cutoff=0)
            raise ValueError(f"{info}: key {key!r} names no file{hint}; {remedy}")
        known.add(places[0].resolve())
    for file in files:
        if file.resolve() not in known:
            hint = nearest(str(file), keys, cutoff=0)
            raise ValueError(f"{file} matches no key of {info}{hint}; {remedy}")


# JSONL -----------------------------------------------------------------------------------------------------


class JsonlSource:
    """One JSON object a line; only the lines' offsets are kept."""

    def __init__(self, files: Sequence[Path], num_used: int | None = None, seed: int | None = None) -> None:
        self.files = list(files)
        lines = [(place, *line) for place, file in enumerate(files) for line in _lines(file)]
        if not lines:
            raise ValueError(f"{files[0]} holds no line; write one JSON object a line")
        if seed is not None:
            random.Random(seed).shuffle(lines)
        self.lines = np.array(lines[:num_used], dtype=np.int64)
        self.blocks: Sequence[int] = [len(self.lines)]

    def row(self, index: int) -> dict[str, Any]:
        place, _, offset, size = self.lines[index].tolist()
        return _object(_read(self.files[place], offset, size), "the line")

    def where(self, index: int) -> str:
        return f"{self.files[self.lines[index, 0]]}, line {self.lines[index, 1]}"


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """(number, offset, bytes) of each line that is not blank, numbers from 1."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, len(line)
            offset += len(line)


# WebDataset tars and folders -------------------------------------------------------------------------------


class TarSource:
    """WebDataset: members that share a name up to its first dot are one row.

    A picture becomes `image`, .txt `caption`, and .json gives its own fields.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        known = {file: _tar_rows(file) for file in dict.fromkeys(files)}
        self.rows = [(file, key, members) for file in files for key, members in known[file].items()]
        self.blocks: Sequence[int] = [len(known[file]) for file in files]

    def row(self, index: int) -> dict[str, Any]:
        path, _, members = self.rows[index]
        read = (_fields_of(ending, _read(path, *place)) for ending, place in members.items())
        return {name: value for fields in read for name, value in fields.items()}

    def where(self, index: int) -> str:
        path, key, _ = self.rows[index]
        return f"{path}, member {key}"


def _tar_rows(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """{name: {ending: (offset, bytes)}} of a tar's members."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    message = f"{path} is damaged or no plain tar ({{error}}); get a complete copy"
    with retold(message, tarfile.TarError), tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if member.isfile() and stem and dot:
                place = (member.offset_data, member.size)
                rows.setdefault(f"{folder}/{stem}", {})[f".{ending.lower()}"] = place
        end = tar.offset
    if not rows or end > path.stat().st_size:
        raise ValueError(f"{path} is cut short or holds no files; get a complete copy of it")
    return rows


def _fields_of(ending: str, content: bytes) -> dict[str, Any]:
    if ending in PICTURE_ENDINGS:
        return {"image": content}
    if ending == ".txt":
        with retold("the .txt file is no UTF-8 ({error}); save it as UTF-8", UnicodeDecodeError, kind=BadRow):
            return {"caption": content.decode("utf-8-sig").strip()}
    return _object(content, f"the {ending} file") if ending == ".json" else {}


class FolderSource:
    """Pictures with captions: `name.jpg` beside `name.txt` or `name.json`, or one file for all of them.

    That file is Hugging Face's `metadata.jsonl` ({"file_name": …, "text": …} a line) or `captions.json`
    ({"name.jpg": caption or fields, …}); it then decides which pictures are rows.
    """

    def __init__(self, folder: Path, num_used: int | None = None) -> None:
        folder = folder.absolute()  # what reads a row joins its paths to the folder
        listed = [(folder / name, fields) for name, fields in _listed(folder)]
        pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS)
        self.entries = (listed or [(picture, None) for picture in pictures])[:num_used]
        if not self.entries:
            remedy = "write a list in a .json file as one object a line of a .jsonl file"
            raise ValueError(f"{folder} holds no .parquet, .tar or .jsonl files and no pictures; {remedy}")
        self.blocks: Sequence[int] = [len(self.entries)]

    def row(self, index: int) -> dict[str, Any]:
        picture, fields = self.entries[index]
        if fields is None:
            beside = [file for ending in (".txt", ".json") if (file := picture.with_suffix(ending)).is_file()]
            if not beside:
                raise BadRow(f"{picture.name} has no caption; write it to {picture.stem}.txt beside it")
            fields = _fields_of(beside[-1].suffix, _read(beside[-1]))
        return {**fields, "image": picture}

    def where(self, index: int) -> str:
        return str(self.entries[index][0])


def _listed(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, fields) of the pictures that a file of captions lists."""
    metadata, captions = (folder / name for name in CAPTIONS_FILES)
    if metadata.is_file():
        source = JsonlSource([metadata])
        rows = [source.row(index) for index in range(source.blocks[0])]
        return [(str(row.get("file_name", "(no file_name)")), row) for row in rows]
    named = _object(_read(captions), str(captions)) if captions.is_file() else {}
    return [(name, value if isinstance(value, dict) else {"caption": value}) for name, value in named.items()]
