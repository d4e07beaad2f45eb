"""Data sets from one format to another, row by row: parquet, WebDataset tars, folders, JSONL with pictures.

Pictures keep their encoded bytes. Parquet and JSONL hold any row, a tar or a folder one picture a row::

    parquet   part-00000.parquet …         pictures as bytes, captions as JSON; and parquet_info.json
    tar       shard-00000.tar …            00000000.png with .txt (a lone caption) or .json, …
    folder    00000000.png with .txt or .json, …
    jsonl     rows.jsonl and images/       the layout of LLaVA's conversations
"""

import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from PIL import Image

from openbagel.checks import retold
from openbagel.data.mixture import find_data, picture_folder
from openbagel.data.samples import BadRow
from openbagel.data.sources import Source, arrow, open_source
from openbagel.data.tasks import Row, picture_in
from openbagel.picture_files import open_picture

PICTURE_FIELDS = ("image", "image_list", "images", "frames")
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
ROWS_PER_FILE, ROWS_PER_GROUP = 4096, 64
BAD_FROM_THE_START = 20
"""So many rows and all of them bad: an error."""


class Format(StrEnum):
    """What a data set is written as."""

    PARQUET = "parquet"
    TAR = "tar"
    FOLDER = "folder"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True)
class Converted:
    """How many rows were written, and the place and fault of each that was not."""

    rows: int
    skipped: tuple[str, ...]

    def lines(self) -> list[str]:
        return [f"{self.rows} rows written, {len(self.skipped)} bad ones skipped", *self.skipped]


def convert(source: str | Path, target: str | Path, format: Format) -> Converted:
    """Writes one data set into a new folder `target`, which appears when it is complete; rows are streamed.

    A row that is damaged, or that the format cannot hold, is skipped and reported. ValueError when the source
    holds several data sets, the target holds a file already, or all rows (or so many first ones) are bad.
    """
    source, target = Path(source), Path(target)
    check_vacant(target)
    if len(places := list(find_data(source))) != 1:
        found = ", ".join(map(str, places)) or "none"
        raise ValueError(f"{source} is no single data set; convert one of: {found}")
    opened, skipped = open_source(places[0]), []
    unfinished = target.with_name(f"{target.name}.part")
    check_vacant(unfinished)
    try:
        WRITERS[Format(format)](unfinished, _rows(opened, picture_folder(places[0]), format, skipped))
        written = sum(opened.blocks) - len(skipped)
        if not written:
            raise ValueError(f"no row of {source} can be written as {format}: {skipped[0]}")
        if format == Format.PARQUET:
            write_parquet_info(unfinished / "parquet_info.json", unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Converted(written, tuple(skipped))


def check_vacant(target: Path) -> None:
    """ValueError naming the first file in the way: nothing is ever overwritten."""
    files = target.rglob("*") if target.is_dir() else [target]
    if existing := sorted(path for path in files if path.is_file()):
        raise ValueError(f"{existing[0]} exists; remove it, or name a new folder")


# rows ------------------------------------------------------------------------------------------------------


def mapped(row: Row, change: Callable[[str, Any], Any]) -> Row:
    """The row with every picture replaced by change(field such as "image_list[1]", value)."""
    made = dict(row)
    for name in PICTURE_FIELDS:
        value = row.get(name)
        if isinstance(value, list):
            items = enumerate(value)
            made[name] = [None if item is None else change(f"{name}[{i}]", item) for i, item in items]
        elif value:
            made[name] = change(name, value)
    return made


def _rows(source: Source, folder: Path, format: Format, skipped: list[str]) -> Iterator[Row]:
    """The sound rows with encoded pictures; `skipped` hears of the others."""

    def encoded(field: str, value: Any) -> bytes:
        content = picture_in(folder, value, field, whole=True).content
        assert isinstance(content, bytes | Path)
        return content.read_bytes() if isinstance(content, Path) else content

    for index in range(sum(source.blocks)):
        try:
            row = {k: v for k, v in source.row(index).items() if v is not None and (v or k != "image")}
            yield _fitting(mapped(row, encoded), format)
        except BadRow as error:
            skipped.append(f"{source.where(index)}: {error}")
            if len(skipped) == index + 1 == BAD_FROM_THE_START:
                raise ValueError(f"the first {len(skipped)} rows are all bad: {skipped[0]}") from None


def _fitting(row: Row, format: Format) -> Row:
    """The row with its captions as an object; BadRow when the format cannot hold it."""
    if row.get("video"):
        raise BadRow(f"field 'video': {format} cannot hold a video; extract its frames into 'frames' first")
    if isinstance(row.get("image"), list) and len(row["image"]) == 1:
        row["image"] = row["image"][0]
    single = isinstance(row.get("image"), bytes) and not row.keys() & set(PICTURE_FIELDS[1:])
    if format in (Format.TAR, Format.FOLDER) and not single:
        raise BadRow(f"a {format} holds one picture a row, in field 'image'; choose parquet or jsonl")
    fields = {name: value for name, value in row.items() if name not in PICTURE_FIELDS}
    message = f"one of the fields {', '.join(map(repr, fields))} is no JSON ({{error}})"
    with retold(message, TypeError, ValueError, RecursionError, kind=BadRow):
        if isinstance(row.get("captions"), str):
            row["captions"] = json.loads(row["captions"])
        json.dumps(fields)
    return row


# writers ---------------------------------------------------------------------------------------------------


def write_parquet(
    folder: Path, rows: Iterable[Row], *, file_rows: int = ROWS_PER_FILE, group_rows: int = ROWS_PER_GROUP
) -> None:
    """part-00000.parquet …, with page checksums; objects become JSON, conversations have a list of pictures.

    A file ends after file_rows, and where a group of rows brings fields that it lacks.
    """
    pyarrow = arrow()
    folder.mkdir(parents=True, exist_ok=True)
    columns, files = map(_as_columns, rows), itertools.count()
    left, writer = 0, None
    with ExitStack() as stack:
        while group := list(itertools.islice(columns, min(group_rows, file_rows))):
            if writer is None or left < len(group) or set().union(*group) - set(writer.schema.names):
                stack.close()
                schema = pyarrow.Table.from_pylist([_prototype(group)]).schema
                path = folder / f"part-{next(files):05d}.parquet"
                writer = arrow(".parquet").ParquetWriter(path, schema, write_page_checksum=True)
                stack.enter_context(writer)
                left = file_rows
            with retold("rows differ in a field's type ({error}); choose jsonl", TypeError, ValueError):
                writer.write_table(pyarrow.Table.from_pylist(group, writer.schema))
            left -= len(group)


def _as_columns(row: Row) -> Row:
    row = dict(row)
    if "conversations" in row and isinstance(row.get("image"), bytes):
        row["image"] = [row["image"]]
    named = [name for name in ("caption", "text") if name in row and "image" in row]
    if named and "captions" not in row:
        said = row.pop(named[0])
        row["captions"] = dict(enumerate(said)) if isinstance(said, list) else {"caption": said}
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()}


def _prototype(rows: list[Row]) -> Row:
    """One row whose values have the types of all: no empty list or null hides the type of an entry."""
    found = {name: value for row in reversed(rows) for name, value in row.items()}
    texts = {"captions": [""]} if isinstance(found.get("captions"), list) else {}
    return {name: (_PROTOTYPES | texts).get(name, value) for name, value in found.items()}


_PROTOTYPES: Row = {
    **dict.fromkeys(("image_list", "images", "frames"), [b""]),
    "texts": [""],
    "instruction_list": [[""]],
    "conversations": [{"from": "", "value": "", "thought": ""}],
}


def write_parquet_info(path: Path, folder: Path) -> None:
    """The official description of the parquet files in a folder; its keys are their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {file.name: arrow(".parquet").read_metadata(file) for file in sorted(folder.glob("*.parquet"))}
    info = {name: {"num_row_groups": f.num_row_groups, "num_rows": f.num_rows} for name, f in files.items()}
    path.write_text(json.dumps(info, indent=1) + "\n")


def write_tar(folder: Path, rows: Iterable[Row]) -> None:
    """shard-00000.tar …, plain and uncompressed."""
    folder.mkdir(parents=True, exist_ok=True)
    members = itertools.groupby(_members(rows), lambda member: member[0] // ROWS_PER_FILE)
    for shard, inside in members:
        with tarfile.open(folder / f"shard-{shard:05d}.tar", "w") as tar:
            for _, name, content in inside:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_folder(folder: Path, rows: Iterable[Row]) -> None:
    """Pictures with their captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for _, name, content in _members(rows):
        (folder / name).write_bytes(content)


def _members(rows: Iterable[Row]) -> Iterator[tuple[int, str, bytes]]:
    """(row, name, content) of the two files of each row."""
    for index, row in enumerate(rows):
        ending, content = _file(row["image"])
        yield index, f"{index:08d}{ending}", content
        fields = {name: value for name, value in row.items() if name != "image"}
        if fields.keys() == {"caption"} and isinstance(fields["caption"], str):
            yield index, f"{index:08d}.txt", fields["caption"].encode()
        else:
            yield index, f"{index:08d}.json", json.dumps(fields).encode()


def _file(picture: bytes) -> tuple[str, bytes]:
    """Ending and content of a picture's file; rarer formats become PNG."""
    with Image.open(io.BytesIO(picture)) as opened:
        kind = opened.format or ""
    if kind in ENDINGS:
        return ENDINGS[kind], picture
    buffer = io.BytesIO()
    open_picture(picture).save(buffer, "PNG")
    return ".png", buffer.getvalue()


def write_jsonl(folder: Path, rows: Iterable[Row], name: str = "rows.jsonl") -> None:
    """The rows in `folder`/name, their pictures in `folder`/images."""
    images, numbers = folder / "images", itertools.count()
    images.mkdir(parents=True, exist_ok=True)

    def stored(_field: str, picture: bytes) -> str:
        ending, content = _file(picture)
        path = images / f"{next(numbers):08d}{ending}"
        path.write_bytes(content)
        return path.name

    with (folder / name).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(mapped(row, stored), ensure_ascii=False) + "\n" for row in rows)


WRITERS = dict(zip(Format, (write_parquet, write_tar, write_folder, write_jsonl), strict=True))
