"""Readers: every format, damage that is named, choices of the reference, pickling."""

import copy
import json
import random
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from openbagel.data import sources
from openbagel.data.samples import BadRow
from openbagel.data.sources import JsonlSource, ParquetSource, Source, open_source
from tests.data.files import (
    caption,
    edit_row,
    encoded,
    flip_byte,
    picture,
    t2i_row,
    write_edit,
    write_folder,
    write_jsonl,
    write_parquet,
    write_t2i,
    write_tar,
    write_text,
    write_vlm,
)


def rows(source: Source) -> list[dict]:
    return [source.row(index) for index in range(sum(source.blocks))]


# parquet ---------------------------------------------------------------------------------------------------


def test_parquet_rows_are_grouped_and_named(tmp_path: Path) -> None:
    source = open_source(write_t2i(tmp_path, rows=7, files=2))
    assert list(source.blocks) == [2, 2, 2, 1]
    assert rows(source) == [t2i_row(i) for i in (0, 2, 4, 6, 1, 3, 5)]
    assert source.where(5) == f"{tmp_path / 'part-1.parquet'}, row group 0, row 1"
    with pytest.raises(IndexError):
        source.row(7)


def test_parquet_reads_structs_and_lists(tmp_path: Path) -> None:
    written = [{"image": {"bytes": encoded(i), "path": f"{i}.png"}, "text": caption(i)} for i in range(3)]
    assert rows(open_source(write_parquet(tmp_path / "a.parquet", written))) == written
    lists = [edit_row(i) for i in range(3)]
    assert rows(open_source(write_parquet(tmp_path / "b.parquet", lists))) == lists


@pytest.mark.parametrize(("used", "files"), [(1, "0"), (2, "01"), (3, "010"), (5, "01010")])
def test_num_used_data_repeats_the_files(tmp_path: Path, used: int, files: str) -> None:
    source = open_source(write_t2i(tmp_path, rows=4, files=2), num_used=used)
    assert [source.where(2 * i)[-len("0.parquet, row group 0, row 0")] for i in range(used)] == list(files)
    assert sum(source.blocks) == 2 * used


def test_a_row_group_is_read_once_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_t2i(tmp_path, rows=8))
    assert isinstance(source, ParquetSource)
    opened = []
    whole = sources._parquet_file
    monkeypatch.setattr(sources, "_parquet_file", lambda path: opened.append(path) or whole(path))
    rows(source)
    rows(source)
    assert len(opened) == 4
    copied = copy.deepcopy(source)
    assert not copied.cache
    monkeypatch.setattr(sources, "CACHE_BYTES", 1)
    assert rows(copied) == rows(source)
    assert len(copied.cache) == 1


def test_a_flipped_byte_is_detected_where_checksums_were_written(tmp_path: Path) -> None:
    data = [t2i_row(i) for i in range(6)]
    path = write_parquet(tmp_path / "sure.parquet", data)
    flip_byte(path, data[3]["image"])
    source = open_source(path)
    assert source.row(0) == data[0] and source.row(5) == data[5]
    for index in (2, 3):
        with pytest.raises(BadRow, match="damaged.*complete copy"):
            source.row(index)
    path = write_parquet(tmp_path / "unsure.parquet", data, checksums=False)
    flip_byte(path, data[3]["image"])
    assert open_source(path).row(3) != data[3]


@pytest.mark.parametrize("write", [write_t2i, write_tar, write_text])
def test_whatever_is_damaged_no_other_error_comes_out(tmp_path: Path, write: Callable[..., Path]) -> None:
    """Flipped bytes and truncations, anywhere in a file: a row, BadRow, or ValueError when it is opened."""
    path = write(tmp_path, rows=3)
    path = next(path.iterdir()) if path.is_dir() else path
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)
        for _ in range(rng.randint(1, 3) if damaged else 0):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            source = open_source(path)
        except ValueError as error:
            assert path.name in str(error)
            continue
        for index in range(sum(source.blocks)):
            with suppress(BadRow):
                assert isinstance(source.row(index), dict)


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [t2i_row(0)])
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no parquet at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet is damaged or no parquet file"):
            open_source(tmp_path)
    path.write_bytes(content)
    source = open_source(tmp_path)
    path.unlink()
    with pytest.raises(BadRow, match="damaged"):
        source.row(0)


# parquet_info ----------------------------------------------------------------------------------------------


def test_parquet_info_may_name_files_in_three_ways(tmp_path: Path) -> None:
    data = write_edit(tmp_path, rows=4)
    info = tmp_path / "parquet_info" / "seedxedit_multi.json"
    for key in (data / "chunk_0.parquet", "chunk_0.parquet", "../seedxedit_multi/chunk_0.parquet"):
        info.write_text(json.dumps({str(key): {"num_row_groups": 2, "num_rows": 4}}))
        assert list(open_source(data, info=info).blocks) == [2, 2]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"chunk_0.parquet": 2, "elsewhere/chunk_1.parquet": 2},
            "key 'elsewhere/chunk_1.parquet' names no file",
        ),
        ({"chunk_0.parquet": 2}, r"chunk_1.parquet matches no key .*did you mean 'chunk_0.parquet'.*leave"),
        ({}, "matches no key"),
    ],
)
def test_what_parquet_info_misses_is_an_error(tmp_path: Path, entries: dict, message: str) -> None:
    """The reference leaves such files out without a word."""
    data = write_edit(tmp_path)
    write_parquet(data / "chunk_1.parquet", [edit_row(i) for i in range(4)])
    info = tmp_path / "info.json"
    info.write_text(json.dumps({key: {"num_row_groups": count} for key, count in entries.items()}))
    with pytest.raises(ValueError, match=message):
        open_source(data, info=info)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_wrong_parquet_info_is_named(tmp_path: Path, content: str) -> None:
    info = tmp_path / "info.json"
    info.write_text(content)
    with pytest.raises(ValueError, match=r"info\.json is no "):
        open_source(write_edit(tmp_path), info=info)


# JSONL -----------------------------------------------------------------------------------------------------


def test_jsonl_lines_are_found_by_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é\\n"}\n\n{"text": "two"}\r\n{"text": "three"}'.encode())
    source = open_source(path)
    assert [row["text"] for row in rows(source)] == ["é\n", "two", "three"]
    assert [source.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert rows(copy.deepcopy(source)) == rows(source)


def test_lines_are_shuffled_then_cut_as_in_the_reference(tmp_path: Path) -> None:
    written = [{"text": str(i)} for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", written)
    expected = list(written)
    random.Random(7).shuffle(expected)
    assert rows(open_source(path, num_used=5, shuffle_seed=7)) == expected[:5]
    assert rows(open_source(path, num_used=5)) == written[:5]
    assert rows(open_source(path, num_used=50)) == written


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "no valid JSON"), ("[" * 5000, "no valid JSON"), ("[1]", "no JSON object"), ('"a"', "no JSON")],
)
def test_a_bad_line_is_a_bad_row(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n")
    source = open_source(path)
    assert source.row(0) == {"text": "one"}
    with pytest.raises(BadRow, match=message):
        source.row(1)
    path.unlink()
    with pytest.raises(BadRow, match="cannot be read"):
        source.row(0)


def test_an_empty_jsonl_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match=r"a\.jsonl holds no line"):
        open_source(path)


def test_the_official_vlm_file_is_read(tmp_path: Path) -> None:
    source = open_source(write_vlm(tmp_path, rows=5))
    assert isinstance(source, JsonlSource)
    assert [row["image"] for row in rows(source)][:3] == ["0.png", "1.png", ["2.png", "3.png"]]


# tars and folders ------------------------------------------------------------------------------------------


def test_tar_members_are_grouped(tmp_path: Path) -> None:
    path = write_tar(tmp_path, rows=4)
    source = open_source(tmp_path)
    assert rows(source) == [{"image": encoded(i, kind="JPEG"), "caption": caption(i)} for i in range(4)]
    assert source.where(3) == f"{path}, member shard/00003"
    assert rows(copy.deepcopy(source)) == rows(source)


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path, rows=4)
    content = path.read_bytes()
    for damaged in (b"", b"x" * 2000, content[: 512 * 7 + 100], content[:600]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard\.tar is"):
            open_source(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "a.txt")
    with pytest.raises(ValueError, match="no plain tar"):
        open_source(path)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, rows=3))
    assert rows(source) == [{"image": tmp_path / f"{i}.png", "caption": caption(i)} for i in range(3)]
    (tmp_path / "1.txt").write_bytes("\ufeffa cross\r\n".encode())  # as Windows' editor saves it
    assert source.row(1)["caption"] == "a cross"
    (tmp_path / "1.txt").write_bytes(b"\xff\xfea\x00")
    with pytest.raises(BadRow, match="no UTF-8"):
        source.row(1)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(BadRow, match=r"1\.png has no caption; write it to 1\.txt"):
        source.row(1)
    (tmp_path / "1.json").write_text('{"text": "one", "thought": "hm"}')
    assert source.row(1) == {"image": tmp_path / "1.png", "text": "one", "thought": "hm"}


@pytest.mark.parametrize("ending", [".bmp", ".gif", ".tif", ".TIFF", ".webp", ".jpeg"])
def test_every_format_that_is_opened_is_found(tmp_path: Path, ending: str) -> None:
    picture(0).save(tmp_path / f"a{ending}")
    (tmp_path / "a.txt").write_text("one")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for path in (tmp_path / f"a{ending}", tmp_path / "a.txt"):
            tar.add(path, path.name)
    packed = open_source(tmp_path / "b.tar").row(0)
    assert packed == {"image": (tmp_path / f"a{ending}").read_bytes(), "caption": "one"}
    (tmp_path / "b.tar").unlink()
    assert rows(open_source(tmp_path)) == [{"image": tmp_path / f"a{ending}", "caption": "one"}]


def test_a_folder_with_one_file_of_captions(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "captions.json").write_text('{"a.png": "one", "b.png": {"text": "two"}}')
    a, b = ({"image": tmp_path / name} for name in ("a.png", "b.png"))
    assert rows(open_source(tmp_path)) == [{**a, "caption": "one"}, {**b, "text": "two"}]
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "b.png", "text": "only"}])
    assert rows(open_source(tmp_path)) == [{**b, "file_name": "b.png", "text": "only"}]
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "b.png"}, {"text": "nameless"}])
    assert open_source(tmp_path).row(1)["image"] == tmp_path / "(no file_name)"


@pytest.mark.parametrize("name", ["nothing", "empty", "a.csv", r"a.json holds no .*one object a line"])
def test_what_is_no_data_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=name):
        open_source(tmp_path / name.partition(" ")[0])


def test_reading_needs_nothing_but_the_row(tmp_path: Path) -> None:
    """Rows come at random, again and again, from every source the same."""
    rng = np.random.default_rng(0)
    for source in (
        open_source(write_t2i(tmp_path / "a", rows=9, files=2)),
        open_source(write_text(tmp_path / "b", rows=9)),
        open_source(write_tar(tmp_path / "c", rows=9)),
    ):
        in_order = rows(source)
        for index in rng.integers(0, 9, 30):
            assert source.row(int(index)) == in_order[index]
