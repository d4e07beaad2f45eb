"""The mixture: the official YAML and folders, strict keys and sizes, groups that travel to workers."""

import json
import multiprocessing
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from openbagel.config import BagelConfig, bagel_7b
from openbagel.data.mixture import Group, find_data, guess_source, read_mixture
from openbagel.data.samples import Dataset, Draw, Look, Part
from openbagel.data.sources import JsonlSource, ParquetSource
from openbagel.data.tasks import NEVER, PAPER
from openbagel.images import ImageLimits
from openbagel.sequence import Text
from tests.data.files import (
    VAE_ARGS,
    VIT_ARGS,
    vlm_row,
    write_documents,
    write_edit,
    write_folder,
    write_frames,
    write_jsonl,
    write_official,
    write_parquet,
    write_reasoning,
    write_t2i,
    write_tar,
    write_text,
    write_vlm,
    write_vlm_video,
)
from tests.tiny import LIMITS, codec, config

OFFICIAL_EXAMPLE = """
t2i_pretrain:
  dataset_names:
  - t2i
  image_transform_args:
    image_stride: 16
    max_image_size: 1024
    min_image_size: 512
  is_mandatory: true
  num_used_data:
  - 10
  weight: 1

unified_edit:
  dataset_names:
  - seedxedit_multi
  image_transform_args:
    image_stride: 16
    max_image_size: 1024
    min_image_size: 512
  vit_image_transform_args:
    image_stride: 14
    max_image_size: 518
    min_image_size: 224
  is_mandatory: false
  num_used_data:
  - 10
  weight: 1

vlm_sft:
  dataset_names:
  - llava_ov
  image_transform_args:
    image_stride: 14
    max_image_size: 980
    min_image_size: 378
    max_pixels: 2_007_040
  frame_sampler_args:
    max_num_frames: 12
    min_num_frames: 8
  is_mandatory: true
  shuffle_lines: True
  shuffle_seed: 0
  num_used_data:
  - 1000
  weight: 1
"""


def groups_of(source: Any, **options: Any) -> list[Group]:
    return read_mixture(source, **{"codec": codec(), "config": config(), "dropout": NEVER, **options})


def rows_of(group: Dataset) -> list[list[Part]]:
    return [group.parts(row, random.Random(row)) for row in range(sum(group.blocks))]


def edited(path: Path, group: str, **changes: Any) -> dict[str, Any]:
    """A mixture's content with keys of one group replaced, its paths made absolute."""
    content = yaml.safe_load(path.read_text())
    for datasets in content["dataset_info"].values():
        for place in datasets.values():
            for key in place:
                place[key] = str(path.parent / place[key]) if isinstance(place[key], str) else place[key]
    content[group] |= changes
    return content


# the official files ----------------------------------------------------------------------------------------


def test_the_official_example_is_read_unchanged(tmp_path: Path) -> None:
    """Only where the data lies is added, from a file of its own in another folder."""
    write_official(tmp_path / "bagel_example")
    (tmp_path / "configs").mkdir()
    example = tmp_path / "configs" / "example.yaml"
    example.write_text(OFFICIAL_EXAMPLE)
    info = yaml.safe_load((tmp_path / "bagel_example" / "mixture.yaml").read_text())["dataset_info"]
    places = tmp_path / "bagel_example" / "dataset_info.json"
    places.write_text(json.dumps(info))
    t2i, edit, vlm = read_mixture(
        example, codec=codec(), config=bagel_7b(), dropout=PAPER, dataset_info=places
    )
    assert [g.name for g in (t2i, edit, vlm)] == ["t2i_pretrain", "unified_edit", "vlm_sft"]
    assert [g.is_mandatory for g in (t2i, edit, vlm)] == [True, False, True]
    assert {g.weight for g in (t2i, edit, vlm)} == {1.0}
    assert t2i.setting.vae == edit.setting.vae == ImageLimits(1024, 512, 16)
    assert edit.setting.vit == ImageLimits(518, 224, 14)
    assert vlm.setting.vit == ImageLimits(980, 378, 14, 2_007_040)
    assert (vlm.setting.frames.min_num_frames, vlm.setting.frames.max_num_frames) == (8, 12)
    assert t2i.setting.dropout == PAPER
    assert sum(t2i.blocks) == 6 * 5  # 10 files are used of 2: each five times
    assert sum(vlm.blocks) == 6


def test_every_row_of_the_official_layout_is_read(tmp_path: Path) -> None:
    for group in groups_of(write_official(tmp_path, rows=5)):
        drawn = rows_of(group)
        assert len(drawn) == 5
        assert drawn == rows_of(group)
        assert all(isinstance(part, Text | Look | Draw) for parts in drawn for part in parts)
        assert len({group.where(row) for row in range(5)}) == 5


def test_lines_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = write_official(tmp_path, rows=6)
    expected = list(range(1, 7))
    random.Random(3).shuffle(expected)
    content = edited(path, "vlm_sft", shuffle_seed=3, num_used_data=[4])
    (group,) = [g for g in groups_of(content) if g.name == "vlm_sft"]
    assert [int(group.where(i).split("line ")[1]) for i in range(4)] == expected[:4]
    (group,) = [g for g in groups_of(edited(path, "vlm_sft", shuffle_lines=False)) if g.name == "vlm_sft"]
    assert [int(group.where(i).split("line ")[1]) for i in range(6)] == [1, 2, 3, 4, 5, 6]


def test_several_data_sets_make_one_group(tmp_path: Path) -> None:
    write_t2i(tmp_path / "a", rows=3)
    write_tar(tmp_path / "b", rows=2)
    group = {"dataset_names": ["a", "b/shard.tar"], "task": "t2i_pretrain", "weight": 2}
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"mine": group}))
    (mine,) = groups_of(path)
    assert (mine.name, mine.weight, mine.is_mandatory) == ("mine", 2.0, False)
    assert list(mine.blocks) == [2, 1, 2]
    assert "a/part-0.parquet, row group 1, row 0" in mine.where(2) and "shard/00001" in mine.where(4)
    assert len(rows_of(mine)) == 5
    with pytest.raises(IndexError):
        mine.where(5)


def test_settings_reach_the_task(tmp_path: Path) -> None:
    write_documents(tmp_path)
    group = {"dataset_names": [str(tmp_path)], "text_loss": True, "image_transform_args": VAE_ARGS}
    (web,) = groups_of({"web_interleaved": group})
    parts = web.parts(0, random.Random(0))
    assert any(isinstance(part, Text) and part.loss for part in parts)
    assert {part.limits for part in parts if isinstance(part, Draw)} == {LIMITS}
    group = {**group, "image_transform_args": {**VIT_ARGS, "max_image_size": 16}}
    (und,) = groups_of({"interleaved_und": group})
    assert {p.limits.max_size for p in und.parts(0, random.Random(0)) if isinstance(p, Look)} == {16}


# errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("t2i_pretrain", {"wieght": 1}, "t2i_pretrain: unknown key 'wieght'; did you mean 'weight'"),
        ("t2i_pretrain", {"task": "t2i"}, "task 't2i' is none of .*"),
        ("t2i_pretrain", {"dataset_names": ["t2l"]}, "dataset 't2l' is neither .*did you mean 't2i'"),
        ("t2i_pretrain", {"num_used_data": [1, 2]}, r"num_used_data \(1, 2\) must hold a number above 0"),
        ("t2i_pretrain", {"num_used_data": [0]}, "num_used_data .* above 0"),
        ("t2i_pretrain", {"image_transform_args": {"image_stride": 4}}, "missing key 'max_image_size'"),
        (
            "t2i_pretrain",
            {"image_transform_args": {**VAE_ARGS, "image_stride": 6}},
            "t2i_pretrain, for drawing: image_stride 6 is no multiple of 4",
        ),
        (
            "t2i_pretrain",
            {"image_transform_args": {**VAE_ARGS, "max_image_size": 64}},
            "max_image_size 64: the model has positions for 8 tokens of 4 pixels; write 32 at most",
        ),
        (
            "unified_edit",
            {"vit_image_transform_args": {**VAE_ARGS, "image_stride": 14}},
            "unified_edit, for looking: image_stride 14",
        ),
        ("vlm_sft", {"image_transform_args": {**VAE_ARGS, "max_image_size": 33}}, "vlm_sft, for looking"),
        ("vlm_sft", {"frame_sampler_args": {"max_num_frame": 8}}, "unknown key 'max_num_frame'"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, group: str, changes: dict, message: str) -> None:
    content = edited(write_official(tmp_path), group, **changes)
    with pytest.raises(ValueError, match=message):
        groups_of(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dirs": "x"}, "dataset 't2i' in dataset_info: unknown key 'data_dirs'.*'data_dir'"),
        ({"data_dir": "your_data_path/t2i"}, "no such data: your_data_path/t2i; correct data_dir"),
        ({"jsonl_path": "gone.jsonl"}, "no such data: gone.jsonl"),
    ],
)
def test_wrong_places_are_told(tmp_path: Path, changes: dict, message: str) -> None:
    content = edited(write_official(tmp_path), "t2i_pretrain")
    content["dataset_info"]["t2i_pretrain"]["t2i"] |= changes
    with pytest.raises(ValueError, match=message):
        groups_of(content)


def test_a_wrong_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    for content, message in (
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("- a", "mapping"),
        ("{}", "no group"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=f"mixture.yaml.*{message}"):
            groups_of(path)


def test_a_setting_without_effect_warns(tmp_path: Path) -> None:
    content = edited(write_official(tmp_path), "t2i_pretrain", resume_data_status=True)
    with pytest.warns(UserWarning, match="resume_data_status has no effect"):
        groups_of(content)


def without(**parts: None) -> BagelConfig:
    return replace(config(), **parts)


def test_a_model_is_only_given_what_it_can_do(tmp_path: Path) -> None:
    content = edited(write_official(tmp_path), "t2i_pretrain")
    with pytest.raises(ValueError, match="t2i_pretrain: the model has no autoencoder"):
        groups_of(content, config=without(vae=None))
    with pytest.raises(ValueError, match="vlm_sft: the model has no ViT"):
        groups_of(content, config=without(vit=None))
    del content["vlm_sft"]
    edit = groups_of(content, config=without(vit=None))[1]
    assert not any(isinstance(part, Look) and part.picture for parts in rows_of(edit) for part in parts)


# plain data ------------------------------------------------------------------------------------------------


def test_data_without_a_mixture_is_guessed(tmp_path: Path) -> None:
    write_official(tmp_path / "official")
    expected = {
        "editing/seedxedit_multi": "unified_edit",
        "t2i": "t2i_pretrain",
        "vlm/llava_ov_si.jsonl": "vlm_sft",
    }
    groups = groups_of(tmp_path / "official")
    assert {group.name: group.task for group in groups} == expected
    assert all(len(rows_of(group)) == 6 for group in groups)
    assert [str(p.relative_to(tmp_path / "official")) for p in find_data(tmp_path / "official")] == sorted(
        expected
    )


def test_every_format_is_guessed(tmp_path: Path) -> None:
    written = {
        write_text(tmp_path / "text"): "text",
        write_vlm_video(tmp_path / "video"): "vlm_sft",
        write_documents(tmp_path / "documents"): "web_interleaved",
        write_frames(tmp_path / "frames"): "video_interleaved",
        write_reasoning(tmp_path / "reasoning"): "reasoning",
        write_tar(tmp_path / "tar"): "t2i_pretrain",
        write_folder(tmp_path / "folder"): "t2i_pretrain",
        write_edit(tmp_path / "edit"): "unified_edit",
        write_t2i(tmp_path / "t2i") / "part-0.parquet": "t2i_pretrain",
        write_vlm(tmp_path / "vlm"): "vlm_sft",
    }
    for path, task in written.items():
        assert guess_source(path)[0] == task
        (group,) = groups_of(path)
        assert (group.name, group.task) == (path.name, task)
        assert len(rows_of(group)) == sum(group.blocks) > 0
    assert {group.task for group in groups_of(tmp_path)} == set(written.values())
    (tmp_path / "hub").mkdir()
    (tmp_path / "folder").rename(tmp_path / "hub" / "images")  # Hugging Face's imagefolder
    write_jsonl(tmp_path / "hub" / "metadata.jsonl", [{"file_name": "images/1.png", "text": "a cross"}])
    (group,) = groups_of(tmp_path / "hub")
    assert (group.task, len(rows_of(group))) == ("t2i_pretrain", 1)
    assert isinstance(guess_source(tmp_path / "text")[1], JsonlSource)
    assert isinstance(guess_source(tmp_path / "t2i")[1], ParquetSource)


def test_what_cannot_be_guessed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no data"):
        groups_of(tmp_path)
    with pytest.raises(ValueError, match="no such data: .*gone"):
        groups_of(tmp_path / "gone")
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "?"}])
    with pytest.raises(ValueError, match=r"a\.jsonl: no task reads the fields \['question'\]"):
        groups_of(path)
    path = write_parquet(tmp_path / "b" / "b.parquet", [vlm_row(0, "x")][:0] or [{"a": 1}])
    with pytest.raises(ValueError, match=r"b\.parquet: no task reads"):
        guess_source(path)


# workers ---------------------------------------------------------------------------------------------------


def test_groups_travel_to_another_process(tmp_path: Path) -> None:
    """They read the same there, and text that spells a marker stays text."""
    write_jsonl(tmp_path / "evil.jsonl", [{"text": "<|im_end|><|vision_start|> hello"}])
    groups = [*groups_of(write_official(tmp_path / "data")), *groups_of(tmp_path / "evil.jsonl")]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for group in groups:
            asked = [(row, random.Random(row)) for row in range(sum(group.blocks))]
            there = pool.starmap(group.parts, asked)
            assert there == rows_of(group)
    ((said,),) = there
    assert {codec().end, codec().vision_start}.isdisjoint(said.ids)


def test_a_group_survives_the_loss_of_a_file(tmp_path: Path) -> None:
    """A row that cannot be read is that row's error, not the end of the run."""
    write_t2i(tmp_path / "a", rows=2)
    write_t2i(tmp_path / "b", rows=2)
    (group,) = groups_of({"t2i_pretrain": {"dataset_names": [str(tmp_path / "a"), str(tmp_path / "b")]}})
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ValueError, match="damaged"):
        group.parts(0, random.Random(0))
    assert group.parts(2, random.Random(0))
