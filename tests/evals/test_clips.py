"""Questions about videos, and frames that should follow: scores worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openbagel.evals import base
from openbagel.evals.base import Desk, Made, Part, Plan, Sample
from openbagel.evals.clips import NEXT_FRAMES, SHOWN, VIDEO_QA
from openbagel.images import to_pixels
from openbagel.picture_files import clip_writer
from tests import tiny


def grey(value: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def lines(path: Path, *rows: Any) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def verdict(sample: Sample, text: str) -> dict[str, float]:
    return VIDEO_QA.score(sample, Made(id=sample.id, parts=(Part(text=text),)), Desk(Path(), Path())).scores


def test_videos_are_shown_by_eight_frames(tmp_path: Path) -> None:
    clip_writer(tmp_path / "a.mp4", 8)([grey(16 * n) for n in range(16)])
    row = {"id": "a", "video": "a.mp4", "question": "Is it dark?", "answer": "No"}
    broken = ["{", {**row, "id": "gone", "video": "gone.mp4"}, {**row, "id": "odd", "options": ["x"]}]
    lines(tmp_path / "questions.jsonl", row, *broken)
    first, *others = VIDEO_QA.samples(tmp_path)
    *frames, text = first.parts
    assert text == "Is it dark?\nAnswer with one word." and len(frames) == SHOWN
    shown = [float(to_pixels(Image.open(frame)).mean()) for frame in frames if isinstance(frame, Path)]
    expected = [(16 * (2 * n + 1)) / 127.5 - 1 for n in range(SHOWN)]  # frames 1, 3, 5 …
    assert np.abs(np.subtract(shown, expected)).max() < 0.05
    assert [one.problem.partition(":")[0] for one in others] == ["broken row"] * 3
    assert verdict(first, "no.") == {"right": 1.0, "unread": 0.0}
    assert verdict(first, "yes") == {"right": 0.0, "unread": 0.0}


def test_options_are_read_by_letter(tmp_path: Path) -> None:
    grey(3).save(tmp_path / "0.png")
    row = {"id": 1, "frames": ["0.png"], "question": "What?", "options": ["a dog", "a cat"], "answer": "B"}
    lines(tmp_path / "questions.jsonl", row, {**row, "id": 2, "group": "g"})
    one, two = VIDEO_QA.samples(tmp_path)
    assert one.parts[1].splitlines()[1:3] == ["A. a dog", "B. a cat"]  # pyright: ignore[reportAttributeAccessIssue]
    assert [verdict(one, text)["right"] for text in ("B", "B. a cat", "a cat", "A")] == [1, 1, 1, 0]
    assert verdict(one, "?") == {"right": 0.0, "unread": 1.0}
    plan = Plan(data=tmp_path, folder=tmp_path / "run", options={"max_tokens": 3})
    assert len(list(base.run(VIDEO_QA, plan, tiny.bagel, model="tiny"))) == 2


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for value in (0, 51, 102, 153):
        grey(value).save(tmp_path / f"{value}.png")
    row = {"id": "up", "frames": ["0.png", "51.png"], "next": ["102.png", "153.png"]}
    lines(
        tmp_path / "clips.jsonl",
        row,
        {**row, "id": "short", "next": ["gone.png"]},
        {**row, "id": "told", "prompt": "go"},
    )
    return tmp_path


def test_errors_of_frames(clips: Path, tmp_path: Path) -> None:
    up, short, told = NEXT_FRAMES.samples(clips)
    assert (up.frames, len(up.parts), told.parts[-1]) == (2, 2, "go")
    desk = Desk(clips, tmp_path / "outputs")
    for number, value in enumerate((102, 102)):
        path = desk.outputs / "up" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey(value, (6, 4)).save(path)
    scores = NEXT_FRAMES.score(up, Made(id="up", parts=(Part(file="up"),)), desk).scores
    assert scores["first error"] == 0 and scores["last error"] == pytest.approx(0.2)
    assert scores["error"] == pytest.approx(0.1) and scores["still"] == pytest.approx(0.3)
    assert scores["PSNR"] == pytest.approx(-10 * np.log10(0.02))


def test_a_model_films(clips: Path, tmp_path: Path) -> None:
    plan = Plan(data=clips, folder=tmp_path / "run", options={"num_timesteps": 3})
    verdicts = list(base.run(NEXT_FRAMES, plan, tiny.bagel, model="tiny"))
    assert [bool(one.problem) for one in verdicts] == [False, True, False]
    sampling = replace(tiny.bagel().config.settings.draw, num_timesteps=3)
    alone = tiny.bagel().using(sampling).continue_video([clips / "0.png", clips / "51.png"], 2)
    with Image.open(plan.folder / "outputs" / "up" / "001.png") as drawn:
        assert drawn.tobytes() == alone[1].tobytes()
