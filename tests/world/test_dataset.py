"""The example data set holds what training sees: the same rows, in files."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from openbagel.config import nano
from openbagel.data.mixture import Group, read_mixture
from openbagel.data.samples import Draw, Look, Part
from openbagel.data.tasks import NEVER, Row, guess_task
from openbagel.sequence import Text
from openbagel.tokens import TextCodec
from openbagel.world.dataset import write_example
from openbagel.world.rows import row
from openbagel.world.scene import nano_world
from openbagel.world.tasks import example

ROWS = 16


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Group]:
    codec = TextCodec.load(Path(__file__).parents[2] / "openbagel" / "assets" / "nano")
    path = write_example(tmp_path_factory.mktemp("example"), rows=ROWS)
    found = read_mixture(path, codec=codec, config=nano(len(codec)), dropout=NEVER)
    return {group.name: group for group in found}


def fields(group: Group) -> list[Row]:
    return [{k: v for k, v in group.fields(i)[0].items() if v is not None} for i in range(ROWS)]


def looks(parts: list[Part]) -> list[object]:
    """Everything of a sample but how its pictures are stored."""
    found: list[object] = []
    for part in parts:
        if isinstance(part, Draw):
            found.append((part.role, [picture.open().tobytes() for picture in part.pictures]))
        elif isinstance(part, Look):
            found.append(part.picture and part.picture.open().tobytes())
        else:
            assert isinstance(part, Text)
            found.append(part)
    return found


def test_a_file_gives_the_parts_that_training_gets(groups: dict[str, Group]) -> None:
    cases = {
        "video_interleaved": [("film_move", 0), ("film_turn", 1), ("film_text", 2)],
        "vlm_sft": [("ask_count", 0), ("ask_colour", 2)],
        "text": [("tell_text", 0), ("tell_text", 5)],
        "web_interleaved": [("tell_story", 1), ("walk_map", 2), ("walk_solid", 5)],
        "reasoning": [("think_draw", 0), ("think_edit", 1), ("draw_one", 2)],
    }
    for name, some in cases.items():
        group = groups[name]
        for kind, index in some:
            seed = index if name != "web_interleaved" else index - index // 3 - 1
            task, made = row(example(nano_world(), 0, seed, kind), 64, thinks=name == "reasoning")
            assert task == name
            setting = group.setting
            ours = Group(name, task, [(_One(made), Path())], setting)
            fresh = looks(ours.parts(0, random.Random(3)))
            places = range(ROWS) if name == "vlm_sft" else [index]  # whose lines are shuffled
            assert fresh in [looks(group.parts(i, random.Random(3))) for i in places], (name, kind)


class _One:
    """A source of one row."""

    def __init__(self, row: Row) -> None:
        self.only = row
        self.blocks: Sequence[int] = [1]

    def row(self, index: int) -> Row:
        return self.only

    def where(self, index: int) -> str:
        return "here"


def test_rows_say_what_they_are(groups: dict[str, Group]) -> None:
    assert {name: {guess_task(row) for row in fields(group)} for name, group in groups.items()} == {
        name: {name} for name in groups
    }


def test_every_task_shows_what_it_has(groups: dict[str, Group]) -> None:
    edits = fields(groups["unified_edit"])
    assert 2 == min(len(row["image_list"]) for row in edits) < max(len(row["image_list"]) for row in edits)
    assert all(len(row["instruction_list"]) == len(row["image_list"]) - 1 for row in edits)
    assert all(said[1] == f"please {said[0]}" for row in edits for said in row["instruction_list"])
    assert all({"prompt", "caption", "layout"} <= {*_captions(row)} for row in fields(groups["t2i_pretrain"]))
    talks = fields(groups["vlm_sft"])
    assert any(turn.get("thought") for row in talks for turn in row["conversations"])
    assert any(isinstance(row["image"], list) and len(row["image"]) == 2 for row in talks)
    clips = fields(groups["video_interleaved"])
    assert {row["given"] for row in clips} == {0, 3} and any(row.get("caption") for row in clips)
    pages = fields(groups["web_interleaved"])
    assert any(row.get("captions") for row in pages) and all(row["learned"] for row in pages)
    assert all(len(row["texts"]) == 4 for row in fields(groups["interleaved_und"]))


def _captions(row: Row) -> dict[str, str]:
    return json.loads(row["captions"])
