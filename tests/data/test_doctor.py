"""The doctor: sound data is told sound, and each fault that is planted in a real file is named."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from openbagel.config import nano
from openbagel.data.doctor import DryRun, Examination, Report, examine
from openbagel.data.mixture import Group
from openbagel.data.packing import Packing
from openbagel.data.samples import Sample
from openbagel.hub import NANO
from openbagel.sequence import Packer
from openbagel.tokens import TextCodec
from openbagel.train.latents import LatentEncoder
from openbagel.weights import load_checkpoint
from openbagel.world.dataset import write_example
from tests import tiny
from tests.data import files

PACKING = Packing(
    expected_num_tokens=900, max_num_tokens=1024, max_num_tokens_per_sample=512, prefer_buffer_before=512
)


def examined(*paths: Path, dry_run: DryRun | None = None, **options: Any) -> Report:
    chosen = Examination(**{"packing": PACKING, **options})
    return examine(paths, config=tiny.config(), codec=tiny.codec(), options=chosen, dry_run=dry_run)


# faults ----------------------------------------------------------------------------------------------------


def rewritten(path: Path, index: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes one row of a parquet or JSONL file."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows[index])
        files.write_jsonl(path, rows)
        return
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    change(rows[index])
    files.write_parquet(path, rows)


def edited_yaml(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "mixture.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def halved(picture: bytes) -> bytes:
    return picture[: len(picture) // 2]


def truncate_last(row: dict[str, Any]) -> None:
    row["image_list"][-1] = halved(row["image_list"][-1])


@dataclass(frozen=True)
class Fault:
    """How a sound data set is spoiled, and what must be said: words of the place, words of the fault."""

    spoil: Callable[[Path], Any]
    where: str
    what: tuple[str, ...]
    rows: int = 1


T2I, EDIT, VLM = "t2i/part-1.parquet", "editing/seedxedit_multi/chunk_0.parquet", "vlm/llava_ov_si.jsonl"
FAULTS = {
    "truncated picture": Fault(
        lambda d: rewritten(d / T2I, 1, lambda row: row.update(image=halved(row["image"]))),
        f"{T2I}, row group 0, row 1",
        ("'image'", "truncated", "complete copy"),
    ),
    "no picture": Fault(
        lambda d: rewritten(d / T2I, 0, lambda row: row.update(image=b"GIF?")),
        f"{T2I}, row group 0, row 0",
        ("'image'", "not a picture", "PNG"),
    ),
    "a picture that a row may not use": Fault(
        lambda d: rewritten(d / EDIT, 3, truncate_last),
        f"{EDIT}, row group 1, row 1",
        ("'image_list[2]'", "truncated"),
    ),
    "captions that are no JSON": Fault(
        lambda d: rewritten(d / T2I, 2, lambda row: row.update(captions="a red circle")),
        f"{T2I}, row group 1, row 0",
        ("'captions'", "JSON", "write"),
    ),
    "a caption that is no text": Fault(
        lambda d: rewritten(d / T2I, 2, lambda row: row.update(captions='{"short": 3, "long": 4}')),
        f"{T2I}, row group 1, row 0",
        ("'captions'", "3", "write"),
    ),
    "missing file": Fault(
        lambda d: (d / "vlm/images/1.png").unlink(), f"{VLM}, line 2", ("'image'", "no such picture", "1.png")
    ),
    "instructions of another length": Fault(
        lambda d: rewritten(d / EDIT, 1, lambda row: row["instruction_list"].pop()),
        f"{EDIT}, row group 0, row 1",
        ("'instruction_list'", "1", "write 2"),
    ),
    "marks of another number": Fault(
        lambda d: rewritten(d / VLM, 2, lambda row: row["image"].pop()),
        f"{VLM}, line 3",
        ("'conversations'", "<image>", "1"),
    ),
    "no conversation": Fault(
        lambda d: rewritten(d / VLM, 0, lambda row: row.update(conversations=[], image=None)),
        f"{VLM}, line 1",
        ("'conversations'", "write"),
    ),
    "a line that is no JSON": Fault(
        lambda d: (d / VLM).write_text((d / VLM).read_text().replace('"image": "1.png"', '"image" "1.png"')),
        f"{VLM}, line 2",
        ("JSON",),
    ),
    "too long": Fault(
        lambda d: rewritten(d / T2I, 0, lambda row: row.update(captions=json.dumps({"a": "circle " * 600}))),
        f"{T2I}, row group 0, row 0",
        ("tokens", "max_num_tokens_per_sample is 512", "raise it"),
    ),
    "a flipped bit": Fault(
        lambda d: files.flip_byte(d / T2I, files.encoded(1, (16, 8))),
        f"{T2I}, row group 0, row 0",
        ("damaged", "complete copy"),
        rows=2,
    ),
    "a cut file": Fault(
        lambda d: (d / T2I).write_bytes((d / T2I).read_bytes()[:-40]), "mixture.yaml", (T2I, "damaged")
    ),
    "a key of parquet_info": Fault(
        lambda d: (d / "editing/parquet_info/seedxedit_multi.json").write_text(
            json.dumps({"/elsewhere/chunk_0.parquet": {"num_row_groups": 3}})
        ),
        "mixture.yaml",
        ("/elsewhere/chunk_0.parquet", "seedxedit_multi.json", "write"),
    ),
    "an unknown key": Fault(
        lambda d: edited_yaml(d, lambda y: y["vlm_sft"].update(is_mandatry=True)),
        "mixture.yaml",
        ("vlm_sft", "'is_mandatry'", "did you mean 'is_mandatory'"),
    ),
    "pictures larger than the table": Fault(
        lambda d: edited_yaml(
            d, lambda y: y["t2i_pretrain"]["image_transform_args"].update(max_image_size=64)
        ),
        "mixture.yaml",
        ("t2i_pretrain", "max_image_size 64", "8", "write 32"),
    ),
    "no such folder": Fault(
        lambda d: edited_yaml(d, lambda y: y["dataset_info"]["t2i_pretrain"]["t2i"].update(data_dir="t3i")),
        "mixture.yaml",
        ("t3i", "data_dir"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(tmp_path: Path, name: str) -> None:
    path = files.write_official(tmp_path, rows=6)
    assert examined(path).problems == []
    fault = FAULTS[name]
    fault.spoil(tmp_path)
    report = examined(path)
    problem = report.problems[0]
    assert len(report.problems) == fault.rows
    assert problem.where.endswith(fault.where)
    assert [words for words in fault.what if words not in problem.what] == []
    assert f"{problem.where}: {problem.what}" in report.lines()
    if report.datasets:
        assert sum(dataset.bad for dataset in report.datasets) == fault.rows
        assert sum(len(dataset.good) for dataset in report.datasets) == 18 - fault.rows


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    path = files.write_official(tmp_path, rows=6)
    spoiled = [
        FAULTS[name] for name in ("truncated picture", "missing file", "instructions of another length")
    ]
    for fault in spoiled:
        fault.spoil(tmp_path)
    report = examined(path)
    assert report.lines()[-1] == "3 problems"
    for fault in spoiled:
        assert any(problem.where.endswith(fault.where) for problem in report.problems)
    assert len(examined(path, tmp_path / "nothing.yaml").problems) == 4


@pytest.mark.parametrize("task", ["folder", "tar", "text", "frames", "documents", "reasoning", "vlm_video"])
def test_plain_data_of_every_kind_is_sound(tmp_path: Path, task: str) -> None:
    report = examined(getattr(files, f"write_{task}")(tmp_path / "data"))
    assert report.problems == []
    (dataset,) = report.datasets
    assert len(dataset.good) == sum(dataset.group.blocks) > 0


def test_every_caption_is_tried_not_only_the_first(tmp_path: Path) -> None:
    """A fault in one of two captions is found, whichever is drawn first."""
    rows = [{"image": files.encoded(i), "captions": json.dumps({"a": "x", "b": 3})} for i in range(20)]
    path = files.write_parquet(tmp_path / "x.parquet", rows)
    assert len(examined(path).problems) >= 17  # each escapes with a chance of 1/16


# what the report says --------------------------------------------------------------------------------------


def test_rows_are_sampled_evenly(tmp_path: Path) -> None:
    path = files.write_parquet(tmp_path / "x.parquet", [files.t2i_row(i) for i in range(10)])
    (dataset,) = examined(path, rows=4).datasets
    assert dataset.good == [0, 2, 5, 7]
    assert len(examined(path, rows=99).datasets[0].good) == 10


def test_a_disk_that_fails_on_a_row_is_a_problem_of_that_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training, where the row counts as damaged and the others go on."""
    own = Group.fields

    def failing(group: Group, row: int) -> dict[str, Any]:
        if row == 2:
            raise OSError(5, "Input/output error")
        return own(group, row)

    monkeypatch.setattr(Group, "fields", failing)
    report = examined(files.write_parquet(tmp_path / "x.parquet", [files.t2i_row(i) for i in range(4)]))
    (dataset,), (problem,) = report.datasets, report.problems
    assert (problem.where, problem.what) == (dataset.group.where(2), "[Errno 5] Input/output error")
    assert dataset.good == [0, 1, 3] and dataset.bad == 1


def test_the_table_counts_tokens_and_packs(tmp_path: Path) -> None:
    """Rows of 8x8 pictures and captions of known lengths: 4 + 2 latent tokens, ids + 2 text tokens."""
    captions = ["red", "red circle above a blue square"]
    rows = [
        {"image": files.encoded(i, (8, 8)), "captions": json.dumps({"a": captions[i % 2]})} for i in range(40)
    ]
    path = files.write_parquet(tmp_path / "x.parquet", rows)
    room = {"expected_num_tokens": 230, "max_num_tokens": 256, "max_num_tokens_per_sample": 128}
    report = examined(path, packing=Packing(**room, prefer_buffer_before=128))
    short, long = (len(tiny.codec().encode(words)) + 2 for words in captions)
    mean = (short + long) / 2
    cells = report.datasets[0].cells()
    assert cells[1:4] == ["40", "40", "0"]
    assert cells[4] == f"{short + 6}/{mean + 6:.0f}/{mean + 6:.0f}/{long + 6}"
    assert cells[5:8] == [f"{short}/{mean:.0f}/{mean:.0f}/{long}", "0/0/0/0", "6/6/6/6"]
    assert set(report.fill) == {"best_fit", "official"}
    assert 0.9 < report.fill["best_fit"] <= 1 and 0.8 < report.fill["official"] <= 1
    epoch = 40 * (mean + 6) / (256 * report.fill["best_fit"])
    assert report.datasets[0].packs == pytest.approx(epoch, rel=0.1)
    assert report.lines()[-1] == "no problems"


def test_a_data_set_of_bad_rows_alone_is_reported(tmp_path: Path) -> None:
    rows = [files.t2i_row(i) | {"captions": "?"} for i in range(30)]
    report = examined(files.write_parquet(tmp_path / "x.parquet", rows), previews=tmp_path / "p")
    assert len(report.problems) == 30 and report.fill == {} and report.previews == ()
    assert report.lines()[-2].endswith("10 more") and report.lines()[-1] == "30 problems"


def test_previews_are_pictures_of_samples_and_mask(tmp_path: Path) -> None:
    """The mask's first token sees itself alone, the last sees its sample; colours tell kinds apart."""
    rows = [{"image": files.encoded(i, (8, 8)), "captions": json.dumps({"a": "red"})} for i in range(2)]
    report = examined(files.write_parquet(tmp_path / "x.parquet", rows), previews=tmp_path / "deep" / "p")
    samples, pack = report.previews
    assert samples.name == "samples.png" and pack.name == "pack.png"
    for path in report.previews:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            picture.load()
    with Image.open(pack) as picture:
        tokens = 2 * (len(tiny.codec().encode("red")) + 2 + 6)
        cell = 640 / tokens
        text, target, pale = (0x4A, 0x82, 0xBD), (0xD9, 0x60, 0x4C), (0xF1, 0xF3, 0xF5)

        def at(query: int, key: int) -> tuple[int, ...]:
            x, y = 16 + (key + 0.5) * cell, 32 + (query + 0.5) * cell
            found = picture.getpixel((int(x), int(y)))
            assert isinstance(found, tuple)
            return found

        half = tokens // 2
        assert [at(0, 0), at(0, 1), at(1, 0)] == [text, pale, text]
        assert [at(half - 1, 0), at(half - 6, half - 1), at(half, 0)] == [text, target, pale]


# one step --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("example"), rows=4)


def test_the_example_is_sound_and_one_step_runs_on_it(example: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(NANO)
    config, codec, model = checkpoint.config, checkpoint.codec, checkpoint.model
    kinds: set[str] = set()

    def step(samples: list[Sample]) -> dict[str, float]:
        kinds.update(sample.id.dataset for sample in samples)
        encoder = LatentEncoder(checkpoint.autoencoder, config, seed=0)
        ce, mse = model.losses(Packer(config, codec).pack(encoder.segments(samples)))
        (ce.mean() + mse.mean()).backward()
        return {"ce": ce.mean().item(), "mse": mse.mean().item()}

    packing = replace(PACKING, max_num_tokens_per_sample=1024)
    options = Examination(packing=packing, previews=tmp_path)
    report = examine([example], config=config, codec=codec, options=options, dry_run=step)
    assert report.problems == []
    assert len(report.datasets) == len(kinds) == 8
    assert all(len(dataset.good) == 4 for dataset in report.datasets)
    assert set(report.dry_run) == {"ce", "mse", "seconds"}
    assert all(math.isfinite(value) for value in report.dry_run.values())
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert any(line.startswith("one step: ce ") for line in report.lines())


def test_the_folder_of_the_example_is_examined_without_its_mixture(example: Path) -> None:
    codec = TextCodec.load(NANO)
    report = examine([example.parent], config=nano(len(codec)), codec=codec)
    assert report.problems == []
    assert sorted(dataset.group.task for dataset in report.datasets) == sorted(
        ["t2i_pretrain", "t2i_pretrain", "unified_edit", "vlm_sft", "text", "interleaved_und"]
        + ["web_interleaved", "video_interleaved", "reasoning"]
    )


def test_a_step_that_fails_is_a_problem(tmp_path: Path) -> None:
    path = files.write_folder(tmp_path / "f")

    def fails(samples: list[Sample]) -> dict[str, float]:
        raise RuntimeError(f"no room for {len(samples)} samples")

    (problem,) = examined(path, dry_run=fails).problems
    assert "no room for 2 samples" in problem.what
    (problem,) = examined(path, dry_run=lambda _: {"ce": 1.0, "mse": math.nan}).problems
    assert problem.where == "mse" and "nan" in problem.what
