"""When abilities emerge: checkpoints scored once, tokens from the log, the order of the curves."""

import json
import math
from pathlib import Path

import pytest

from openbagel import cli
from openbagel.evals import curve
from openbagel.evals.curve import Point, emergence
from openbagel.evals.world import Plan
from openbagel.inference.pipeline import Bagel
from openbagel.train.stages import train
from openbagel.weights import save_checkpoint
from tests.train.test_trainer import quiet, recipe, small

PLAN = Plan(kinds=("ask_colour", "think_ask"), samples=1)


def a_run(folder: Path, steps: tuple[int, ...] = (2, 4)) -> Path:
    """What a run leaves that the curve reads, but for the weights."""
    (folder / "recipe.json").write_text(json.dumps({"checkpoints": None}))
    rows = [{"step": 0, "tokens": 100}, {"step": 2, "tokens": 300}, {"step": 3, "tokens": 500}]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tok'
    )
    for step in steps:
        path = folder / "checkpoints" / f"step-{step:07d}" / "MANIFEST.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return folder


def test_checkpoints_have_seen_the_tokens_of_the_log(tmp_path: Path) -> None:
    found = curve.checkpoints(a_run(tmp_path))
    assert [(step, tokens, path.name) for step, tokens, path in found] == [
        (2, 200.0, "step-0000002"),
        (4, 500.0, "step-0000004"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        curve.checkpoints(a_run(tmp_path / "empty", ()))
    with pytest.raises(ValueError, match=r"holds no recipe\.json"):
        curve.checkpoints(tmp_path / "checkpoints")


def test_what_is_scored_is_not_scored_again(tmp_path: Path) -> None:
    run, output, opened = a_run(tmp_path), tmp_path / "out" / "curve.json", []
    nano = Bagel.load("nano", device="cpu")

    def open(folder: Path) -> Bagel:
        opened.append(folder.name)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return nano

    with pytest.raises(KeyboardInterrupt):
        curve.score(run, PLAN, open, output, print)
    said: list[str] = []
    points = curve.score(run, PLAN, open, output, said.append)
    assert opened == ["step-0000002", "step-0000004", "step-0000004"]
    assert [(point.step, point.tokens) for point in points] == [(2, 200.0), (4, 500.0)]
    assert points[0].scores.keys() == {"ask_colour", "think_ask"} and points[0].scores == points[1].scores
    assert len(said) == 1 and said[0].startswith("step 4, 500 tokens: understanding")
    assert curve.score(run, PLAN, open, output, print) == points and len(opened) == 3
    with pytest.raises(ValueError, match="another plan"):
        curve.score(run, Plan(kinds=("ask_colour",), samples=2), open, output, print)


def points() -> list[Point]:
    def scores(asked: int, drawn: int) -> dict[str, tuple[int, int]]:
        return {"ask_colour": (asked, 10), "draw_one": (drawn, 10), "draw_two": (drawn, 10)}

    return [
        Point(1, 100.0, scores(9, 0)),
        Point(2, 200.0, scores(10, 0)),
        Point(3, 300.0, scores(10, 10)),
        Point(4, 400.0, scores(9, 8)),
    ]


def test_an_ability_is_there_at_85_percent_of_its_peak(tmp_path: Path) -> None:
    found = {name: (peak, tokens) for name, peak, tokens in emergence(points())}
    assert found == {"understanding": (1.0, 100.0), "drawing": (1.0, pytest.approx(285.0))}
    assert [*emergence([])] == [] and math.isnan(points()[0].share("edit_"))
    lines = curve.table(points()).splitlines()
    assert lines[1].split() == ["understanding", "100.0%", "100"] and lines[2].split()[-1] == "285"
    path = curve.draw(points(), tmp_path / "new" / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_verb_scores_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "start", small())
    train(recipe(tmp_path / "start", tmp_path / "run", train__steps=4), quiet)
    verb = ["eval", "curve", str(tmp_path / "run"), "--kinds", "ask_exists", "--samples", "2"]
    assert cli.main(verb) == 0
    told = capsys.readouterr().out
    assert "tokens to 85%" in told and "understanding" in told
    stored = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert [point["step"] for point in stored["points"]] == [2, 4]
    assert 0 < stored["points"][0]["tokens"] < stored["points"][1]["tokens"]
    assert (tmp_path / "run" / "curve.png").is_file()
    assert cli.main(["eval", "curve", str(tmp_path / "start")]) == 2
