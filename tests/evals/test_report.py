"""Runs beside each other: values with intervals, published rows, judges apart; and the page of one."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from openbagel.cli import parser_for
from openbagel.evals import base
from openbagel.evals.base import Made, Plan, Sample, Suite, Verdict
from openbagel.evals.judges import Reply
from openbagel.evals.page import page
from openbagel.evals.report import compared
from openbagel.evals.suites import SUITES
from tests import tiny

REPLY = Reply(text="<b>8</b>", judge="wise", date="2026-01-01", question="0" * 64)


def suite(off: float) -> Suite:
    """Answers that a judge scores with their number, this much off for the last two."""

    def score(sample: Sample, made: Made, desk: base.Desk) -> Verdict:
        if sample.id == "0":
            return Verdict(id="0", group=sample.group, problem="unreadable: ?")
        value = float(sample.id) + off * (int(sample.id) > 3)
        return Verdict(id=sample.id, group="a<b", scores={"q": value}, reason="so & so", replies=(REPLY,))

    def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
        return {"q": base.mean(verdicts, "q")}

    samples = [Sample(id=str(n), parts=(f"<i>{n}</i>",), group="a<b") for n in range(6)]
    published = {"BAGEL": {"q": 3.5, "other": 1.0}}
    return Suite(
        name="answers",
        about="",
        needs="",
        samples=lambda data: samples,
        score=score,
        summary=summary,
        published=published,
    )


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    plans = [
        Plan(data=tmp_path, folder=tmp_path / name, options={"max_tokens": 3}) for name in ("first", "second")
    ]
    for plan, off in zip(plans, (0.0, 0.5), strict=True):
        list(base.run(suite(off), plan, tiny.bagel, model="tiny"))
    return [plan.folder for plan in plans]


def test_runs_stand_beside_each_other_and_the_literature(folders: list[Path]) -> None:
    lines = compared(folders, {"answers": suite(0).published}).splitlines()
    assert lines[0].split() == ["answers", "q", "scored", "of", "problems"]
    assert (
        lines[1].startswith(str(folders[0]))
        and " 3 (" in lines[1]
        and lines[1].endswith("5       6   1 unreadable")
    )
    assert " 3.2 (" in lines[2]
    assert lines[3].split() == ["BAGEL", "(published)", "3.5"]
    assert lines[4] == f"{folders[1]} against {folders[0]}: q the same in 60.0% of 5, +0.200 on average"
    with pytest.raises(ValueError, match="holds no finished run"):
        compared([folders[0].parent], {})


def test_runs_of_other_answers_are_not_compared_sample_by_sample(folders: list[Path], tmp_path: Path) -> None:
    plan = Plan(data=tmp_path, folder=tmp_path / "longer", options={"max_tokens": 6})
    list(base.run(suite(0.0), plan, tiny.bagel, model="tiny"))
    assert "against" not in compared([folders[0], plan.folder], {})


def test_pictures_are_the_same_when_their_pixels_are(tmp_path: Path) -> None:
    def folder(name: str, steps: int) -> Path:
        plan = Plan(data=tmp_path, folder=tmp_path / name, options={"num_timesteps": steps})
        list(base.run(replace(suite(0.0), reply="image"), plan, tiny.bagel, model="tiny"))
        return plan.folder

    first, same, other = folder("first", 3), folder("same", 3), folder("other", 4)
    assert f"{same} against {first}: q the same in 100.0% of 5" in compared([first, same], {})
    assert "against" not in compared([first, other], {})


def test_the_page_shows_everything_and_runs_nothing(folders: list[Path], tmp_path: Path) -> None:
    (photo := tmp_path / "photo.png").touch()
    one = suite(0.0)
    samples = [replace(sample, parts=(photo, *sample.parts)) for sample in one.samples(tmp_path)]
    told = page(replace(one, samples=lambda data: samples), Plan(data=tmp_path, folder=folders[0]))
    assert told.count("<article") == 6 and told.count('class="wrong"') == 1
    assert "&lt;i&gt;3&lt;/i&gt;" in told and "<i>" not in told and "&lt;b&gt;8&lt;/b&gt;" in told
    assert "wise, 2026-01-01" in told and "so &amp; so" in told and 'src="../photo.png"' in told
    assert "BAGEL (published)" in told and 'data-kind="a&lt;b"' in told


def test_the_documentation_has_a_command_and_a_row_for_each_suite() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text("utf-8")
    commands = re.findall(r"^openbagel eval (\S+ +--model FOLDER --data .+)$", page, re.M)
    listed = commands[-len(SUITES) :]  # after examples
    parsed = [parser_for("eval").parse_strictly(command.split()) for command in listed]
    assert [verb.suites for verb in parsed] == [[name] for name in SUITES]
    assert [bool(verb.judge) for verb in parsed] == [suite.judged for suite in SUITES.values()]
    assert re.findall(r"^\| `(.+?)` \|.*`?.+\|$", page, re.M)[-len(SUITES) :] == [*SUITES]
