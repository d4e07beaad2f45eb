"""Data sets through every format and back, what cannot be converted, and the example of the toy world."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from openbagel.config import nano
from openbagel.data.convert import Format, convert, write_parquet, write_tar
from openbagel.data.mixture import find_data, read_mixture
from openbagel.data.packing import Packing, Stream, Supply, pair_cost
from openbagel.data.samples import SampleId, extent
from openbagel.data.sources import open_source
from openbagel.data.tasks import NEVER
from openbagel.hub import NANO
from openbagel.tokens import TextCodec
from openbagel.world.dataset import write_example
from openbagel.world.language import caption
from openbagel.world.scene import nano_world
from tests.data import files


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of a data set, pictures as arrays, captions as objects, what is null left out."""
    source = open_source(path)
    found = []
    for index in range(sum(source.blocks)):
        row = {name: value for name, value in source.row(index).items() if value is not None}
        if isinstance(row.get("captions"), str):
            row["captions"] = json.loads(row["captions"])
        folder = path.parent / "images" if path.suffix == ".jsonl" else Path()
        for name in ("image", "image_list", "images", "frames"):
            if name in row:
                listed = row[name] if isinstance(row[name], list) else [row[name]]
                row[name] = [None if one is None else pixels(one, folder).tolist() for one in listed]
        for turn in row.get("conversations", []):
            turn.pop("thought", None) if turn.get("thought") is None else None
        found.append(row)
    return found


def pixels(content: bytes | str | Path, folder: Path) -> np.ndarray:
    opened = Image.open(io.BytesIO(content) if isinstance(content, bytes) else folder / content)
    return np.asarray(opened.convert("RGB"))


def only(folder: Path) -> Path:
    """The one data set in a folder."""
    (path,) = find_data(folder)
    return path


@pytest.mark.parametrize(
    "way",
    [("tar", "folder", "parquet"), ("folder", "jsonl", "tar", "parquet"), ("jsonl", "parquet")],
    ids="-".join,
)
def test_drawings_survive_every_way_around(tmp_path: Path, way: tuple[str, ...]) -> None:
    source = files.write_t2i(tmp_path / "source", rows=5, files=2)
    want, place = rows_of(source), source
    for step, name in enumerate(way):
        done = convert(place, tmp_path / f"{step}", Format(name))
        assert (done.rows, done.skipped) == (5, ())
        place = tmp_path / f"{step}"
        assert rows_of(only(place)) == want
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("task", ["edit", "vlm", "documents", "frames", "reasoning"])
def test_rows_with_several_pictures_survive_parquet_and_jsonl(tmp_path: Path, task: str) -> None:
    getattr(files, f"write_{task}")(tmp_path / "source")
    source = only(tmp_path / "source")
    want = rows_of(source)
    for row in want:  # parquet holds a plain caption of a drawing as the official captions
        if "image" in row and "caption" in row:
            row["captions"] = {"caption": row.pop("caption")}
    assert convert(source, tmp_path / "p", Format.PARQUET).skipped == ()
    assert rows_of(tmp_path / "p") == want
    assert convert(tmp_path / "p", tmp_path / "j", Format.JSONL).skipped == ()
    assert rows_of(tmp_path / "j" / "rows.jsonl") == want


def test_a_folder_with_text_files_keeps_them(tmp_path: Path) -> None:
    source = files.write_folder(tmp_path / "source", rows=3)
    convert(source, tmp_path / "tar", Format.TAR)
    convert(tmp_path / "tar", tmp_path / "folder", Format.FOLDER)
    assert [path.read_text() for path in sorted((tmp_path / "folder").glob("*.txt"))] == [
        files.caption(index) for index in range(3)
    ]


def test_what_is_written_is_official(tmp_path: Path) -> None:
    """Parquet: bytes, JSON captions, page checksums, row groups that parquet_info counts."""
    import pyarrow.parquet

    convert(files.write_folder(tmp_path / "source", rows=3), tmp_path / "t2i", Format.PARQUET)
    (path,) = (tmp_path / "t2i").glob("*.parquet")
    (first, *_) = pyarrow.parquet.read_table(path).to_pylist()
    assert first["image"] == (tmp_path / "source" / "0.png").read_bytes()
    assert json.loads(first["captions"]) == {"caption": files.caption(0)}
    assert set(first) == {"image", "captions"}
    convert(files.write_edit(tmp_path / "edit", rows=4), tmp_path / "converted", Format.PARQUET)
    info = tmp_path / "converted" / "parquet_info.json"
    assert json.loads(info.read_text()) == {"part-00000.parquet": {"num_row_groups": 1, "num_rows": 4}}
    assert sum(open_source(tmp_path / "converted", info=info).blocks) == 4
    flipped = tmp_path / "flipped"
    files.write_parquet(flipped / "x.parquet", [])
    value = b"a caption that is long enough to be found"
    write_parquet(flipped, [{"text": value.decode()}])
    (flipped / "x.parquet").unlink()
    files.flip_byte(flipped / "part-00000.parquet", value)
    with pytest.raises(ValueError, match="damaged"):
        open_source(flipped).row(0)


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"text": "t", "caption": "c"}, {"captions": {"caption": "c"}, "text": "t"}),
        ({"text": ["one", "two"]}, {"captions": {"0": "one", "1": "two"}}),
        ({"captions": {"a": "b"}, "caption": "c"}, {"captions": {"a": "b"}, "caption": "c"}),
    ],
)
def test_no_caption_is_lost(tmp_path: Path, fields: dict[str, Any], want: dict[str, Any]) -> None:
    files.picture(0).save(tmp_path / "0.png")
    convert(
        files.write_jsonl(tmp_path / "a.jsonl", [{"image": "0.png", **fields}]),
        tmp_path / "out",
        Format.PARQUET,
    )
    (row,) = rows_of(tmp_path / "out")
    assert {name: value for name, value in row.items() if name != "image"} == want


def test_files_and_groups_end_where_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are streamed: no writer asks for more than a group ahead; a new field begins a new file."""
    import pyarrow.parquet

    asked: list[int] = []

    def rows(count: int) -> Any:
        for index in range(count):
            asked.append(index)
            yield {"text": str(index)} | ({"more": index} if index >= 6 else {})

    stream = rows(9)
    write_parquet(tmp_path / "p", stream, file_rows=4, group_rows=2)
    found = [pyarrow.parquet.read_metadata(path) for path in sorted((tmp_path / "p").glob("*.parquet"))]
    assert [(f.num_rows, f.num_row_groups) for f in found] == [(4, 2), (2, 1), (3, 2)]
    monkeypatch.setattr("openbagel.data.convert.ROWS_PER_FILE", 2)
    write_tar(tmp_path / "t", ({"image": files.encoded(i), "caption": "x"} for i in range(5)))
    names = [path.name for path in sorted((tmp_path / "t").iterdir())]
    assert names == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    with tarfile.open(tmp_path / "t" / names[1]) as tar:
        assert tar.getnames() == ["00000002.png", "00000002.txt", "00000003.png", "00000003.txt"]


def test_bad_rows_are_reported_and_skipped(tmp_path: Path) -> None:
    rows = [files.t2i_row(index) for index in range(5)]
    rows[0]["captions"] = "{no json"
    rows[3]["image"] = rows[3]["image"][:-30]
    files.write_parquet(tmp_path / "source" / "x.parquet", rows)
    done = convert(tmp_path / "source", tmp_path / "out", Format.TAR)
    assert done.rows == 3 == len(rows_of(tmp_path / "out"))
    first, second = done.skipped
    assert "x.parquet, row group 0, row 0" in first and "'captions'" in first
    assert "x.parquet, row group 1, row 1" in second and "'image'" in second and "truncated" in second
    assert done.lines()[0] == "3 rows written, 2 bad ones skipped"


def test_what_a_format_cannot_hold_is_said(tmp_path: Path) -> None:
    edits = files.write_edit(tmp_path / "edits")
    with pytest.raises(ValueError, match=r"tar holds one picture a row.*parquet or jsonl"):
        convert(edits, tmp_path / "out", Format.TAR)
    videos = files.write_jsonl(tmp_path / "v" / "v.jsonl", [{"video": "clip.mp4", "conversations": []}] * 30)
    with pytest.raises(ValueError, match=r"first 20 rows are all bad.*'video'.*frames"):
        convert(videos, tmp_path / "out", Format.PARQUET)
    with pytest.raises(ValueError, match="convert one of: .*edits.*, .*v.jsonl"):
        convert(tmp_path, tmp_path / "out", Format.PARQUET)
    bare = files.write_parquet(tmp_path / "bare" / "x.parquet", [files.t2i_row(0) | {"extra": b"123"}])
    with pytest.raises(ValueError, match="'extra'"):
        convert(bare, tmp_path / "out", Format.JSONL)
    files.picture(0).save(tmp_path / "0.png")
    mixed = [{"image": "0.png", "note": "one"}, {"image": "0.png", "note": ["one", "two"]}]
    with pytest.raises(ValueError, match="rows differ in a field's type"):
        convert(files.write_jsonl(tmp_path / "mixed.jsonl", mixed), tmp_path / "out", Format.PARQUET)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = files.write_folder(tmp_path / "source")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", Format.TAR)
    before = (tmp_path / "out" / "shard-00000.tar").read_bytes()
    with pytest.raises(ValueError, match=r"shard-00000\.tar exists"):
        convert(source, tmp_path / "out", Format.TAR)
    with pytest.raises(ValueError, match=r"0\.png exists"):
        write_example(source)
    assert (tmp_path / "out" / "shard-00000.tar").read_bytes() == before


# the example -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("example"), rows=6)


def contents(folder: Path) -> dict[str, bytes]:
    """Recipes name the folder that they lie in: it reads DATA here."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes().replace(bytes(folder), b"DATA") for p in files}


def test_the_example_has_the_official_hierarchy(example: Path) -> None:
    names = set(contents(example.parent))
    assert {f"t2i/part-0000{i}.parquet" for i in range(2)} <= names
    assert {f"editing/seedxedit_multi/part-0000{i}.parquet" for i in range(2)} <= names
    assert {"editing/parquet_info/seedxedit_multi.json", "vlm/llava_ov_si.jsonl"} <= names
    assert "vlm/images/00000005.png" in names
    official = yaml.safe_load(example.read_text())
    assert list(official)[:3] == ["t2i_pretrain", "unified_edit", "vlm_sft"]


def test_the_example_is_a_function_of_its_seed(example: Path, tmp_path: Path) -> None:
    write_example(tmp_path / "again", rows=6)
    assert contents(tmp_path / "again") == contents(example.parent)
    write_example(tmp_path / "other", rows=6, seed=1)
    ours, others = contents(example.parent), contents(tmp_path / "other")
    same = {name for name in ours if ours[name] == others.get(name)}
    recipes = {"example.yaml", "finetune.yaml", "lora.yaml"}
    concept = {"concept/00000000.png", "concept/00000000.txt"}
    assert same <= recipes | concept | {"editing/parquet_info/seedxedit_multi.json"}
    with pytest.raises(ValueError, match="at least 2"):
        write_example(tmp_path / "one", rows=1)


def test_the_example_shows_no_held_out_pair(example: Path) -> None:
    texts = []
    for path in find_data(example.parent):
        for row in rows_of(path):
            texts.append(json.dumps({k: v for k, v in row.items() if not k.startswith(("image", "frame"))}))
    held_out = [f"{colour} {shape}" for shape, colour in nano_world().held_out]
    assert texts and not [text for text in texts for pair in held_out if pair in text]
    looks = caption(nano_world().sample_scene(random.Random(0), 2, held_out=True))
    assert any(pair in looks for pair in held_out)  # the words are those that captions use


def test_the_example_is_packed_for_nano(example: Path) -> None:
    """Every group reads, fits nano's tables, and packs of all kinds are made."""
    codec = TextCodec.load(NANO)
    config = nano(len(codec))
    groups = read_mixture(example, codec=codec, config=config, dropout=NEVER)
    by_name = {group.name: group for group in groups}

    def measure(id: SampleId) -> Any:
        parts = by_name[id.dataset].parts(id.row, id.random(0, "parts"))
        return extent(parts, config)

    packing = Packing(
        expected_num_tokens=1800, max_num_tokens=2048, max_num_tokens_per_sample=1024, streams=1
    )
    stream = Stream(Supply(groups, packing, seed=0, measure=measure, pair_cost=pair_cost(config)), 0)
    packs = [stream.next_pack() for _ in range(8)]
    assert not [skipped for _, skips in packs for skipped in skips]
    assert {sample.id.dataset for pack, _ in packs for sample in pack} == set(by_name)
