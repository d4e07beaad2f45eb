"""The base of all benchmarks on a made-up one: problems are counted, a cut run goes on, ranks share, and the
same run gives the same table.
"""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openbagel import Bagel
from openbagel.evals import base
from openbagel.evals.base import Desk, Made, Plan, Sample, Suite, Verdict
from openbagel.evals.judges import Endpoint, Judge
from openbagel.images import ImageLimits
from tests import tiny
from tests.evals.judge_server import judge_server

SAMPLES = 12


def samples(data: Path) -> Iterator[Sample]:
    for number in range(SAMPLES):
        path = data / f"{number}.png"
        problem = "" if path.is_file() else f"missing picture: {path.name}"
        parts = (path, f"question {number}")
        group = "even" if number % 2 == 0 else "odd"
        yield Sample(
            id=str(number), parts=parts, group=group, seed=number, problem=problem, truth={"n": number}
        )


def score(sample: Sample, made: Made, desk: Desk) -> Verdict:
    known = {"id": sample.id, "group": sample.group}
    if sample.truth["n"] == 7:
        return Verdict(problem="unreadable reply: ?", **known)
    return Verdict(
        scores={"length": float(len(made.text)), "right": float(sample.truth["n"] % 3 == 0)}, **known
    )


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    shares = {group: base.mean(verdicts, "right", group) for group in ("even", "odd")}
    return {**shares, "all": sum(shares.values()) / 2, "length": base.mean(verdicts, "length")}


ANSWERS = Suite(
    name="answers", about="made up", needs="numbered PNG files", samples=samples, score=score, summary=summary
)
OPTIONS = {"max_tokens": 5}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (folder := tmp_path / "data").mkdir()
    for number in range(SAMPLES):
        Image.new("RGB", (20, 12), (number * 20, 90, 30)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "5.png").unlink()
    return folder


def everything(folder: Path) -> dict[str, Any]:
    """What stands in a run's folder, but for versions."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def run(suite: Suite, plan: Plan, **options: Any) -> list[Verdict]:
    return list(base.run(suite, plan, tiny.bagel, model="tiny", **options))


def test_every_sample_has_a_line_and_problems_are_counted(data: Path, tmp_path: Path) -> None:
    plan = Plan(data=data, folder=tmp_path / "run", options=OPTIONS)
    verdicts = run(ANSWERS, plan)
    assert [verdict.id for verdict in verdicts] == [str(number) for number in range(SAMPLES)]
    told = json.loads((plan.folder / "summary.json").read_text())
    assert (told["samples"], told["scored"]) == (12, 9)
    assert sum(told["problems"].values()) == 3 and told["problems"]["missing picture"] == 1
    even, odd = 2 / 6, 1 / 3  # 0 and 6 of 0 2 4 6 8 10; 9 of 1 9 11
    values = {name: value["value"] for name, value in told["values"].items()}
    assert (values["even"], values["odd"], values["all"]) == (even, odd, (even + odd) / 2)
    for value in told["values"].values():
        assert value["low"] <= value["value"] <= value["high"]
    assert told["values"]["all"]["low"] < told["values"]["all"]["high"]
    answers = tiny.bagel().using(replace(tiny.SAMPLING, max_tokens=5))
    made = base.read_lines(plan.folder.glob("made-*"), Made)
    assert told["made by"] == {"cpu, float32": 12}
    assert made["4"].text == answers.ask(data / "4.png", "question 4", seed=4)
    assert len({one.asked for one in made.values() if not one.problem}) == 10
    assert len(told["values"]) == 4


def test_the_same_run_gives_the_same_folder(data: Path, tmp_path: Path) -> None:
    plans = [
        Plan(data=data, folder=tmp_path / name, options=OPTIONS, batch=batch)
        for name, batch in (("a", 8), ("b", 1))
    ]
    for plan in plans:
        run(ANSWERS, plan)
    assert everything(plans[0].folder) == everything(plans[1].folder)


def test_a_run_is_of_these_weights(data: Path, tmp_path: Path) -> None:
    (model := tmp_path / "model").mkdir()
    (weights := model / "ema.safetensors").write_bytes(b"a" * 10)
    plan, load = Plan(data=data, folder=tmp_path / "run", options=OPTIONS), tiny.bagel
    first = list(base.run(ANSWERS, plan, load, model=str(model)))
    assert list(base.run(ANSWERS, plan, load, model=str(model))) == first
    weights.write_bytes(b"b" * 10)
    with pytest.raises(ValueError, match="holds a run with weights .*; name another folder"):
        list(base.run(ANSWERS, plan, load, model=str(model)))


def test_a_cut_run_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (
        Plan(data=data, folder=tmp_path / name, options=OPTIONS, batch=2) for name in ("whole", "cut")
    )
    run(ANSWERS, whole)
    for lines in range(0, SAMPLES, 3):
        shutil.rmtree(cut.folder, ignore_errors=True)
        shutil.copytree(whole.folder, cut.folder)
        (cut.folder / "summary.json").unlink()
        for name, kept in (("made-0", lines), ("verdicts-0", lines // 2)):
            path = cut.folder / f"{name}.jsonl"
            ready = path.read_text().splitlines(keepends=True)
            path.write_text("".join(ready[:kept]) + ready[kept][:17])  # killed amid a line
        run(ANSWERS, cut)
        assert everything(cut.folder) == everything(whole.folder)

    def no_model() -> Bagel:
        raise AssertionError("a complete run loads no model")

    assert len(list(base.run(ANSWERS, whole, no_model, model="tiny"))) == SAMPLES


def test_ranks_share_the_samples(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = (Plan(data=data, folder=tmp_path / name, options=OPTIONS) for name in ("alone", "shared"))
    run(ANSWERS, alone)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        assert not (shared.folder / "summary.json").is_file()
        monkeypatch.setenv("RANK", str(rank))
        assert [one.id for one in run(ANSWERS, shared)] == [str(n) for n in range(rank, SAMPLES, 3)]
    summaries = [(plan.folder / "summary.json").read_text() for plan in (alone, shared)]
    assert summaries[0] == summaries[1]


def test_another_run_in_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    plan = Plan(data=data, folder=tmp_path / "run", options=OPTIONS, limit=2)
    run(ANSWERS, plan)
    with pytest.raises(ValueError, match="holds a run with think False, not True; name another folder"):
        run(ANSWERS, replace(plan, think=True))
    with pytest.raises(ValueError, match="holds no sample of answers; it needs numbered PNG files"):
        run(replace(ANSWERS, samples=lambda data: ()), replace(plan, folder=tmp_path / "other"))
    with pytest.raises(ValueError, match="none of"):
        run(ANSWERS, replace(plan, folder=tmp_path / "other", options={"steps": 3}))


def test_published_settings_rule_unless_asked_otherwise(data: Path, tmp_path: Path) -> None:
    suite = replace(
        ANSWERS,
        options={"max_tokens": 7, "temperature": 0.5},
        think_options={"max_think_tokens": 9},
        looks=ImageLimits(max_size=16, min_size=8, stride=4),
    )
    plan = Plan(data=data, folder=tmp_path, options={"temperature": 0.0}, think=True)
    bagel = base.preset(tiny.bagel(), suite, plan)
    ask = bagel.config.settings.ask
    assert (ask.max_tokens, ask.temperature, ask.max_think_tokens) == (7, 0.0, 9)
    picture = Image.new("RGB", (100, 50))
    (opened,) = bagel._opened([picture])
    looked = bagel.pictures.look(opened)
    assert opened.size == picture.size and looked.pixels is not None and looked.pixels.shape == (3, 8, 16)


def test_pictures_are_drawn_into_the_layout_and_judged(data: Path, tmp_path: Path) -> None:
    def prompts(data: Path) -> Iterator[Sample]:
        for number in range(4):
            yield Sample(
                id=str(number), parts=(f"p{number}",), seed=number, size=(8, 8), file=f"{number:05}/0.png"
            )

    def judged(sample: Sample, made: Made, desk: Desk) -> Verdict:
        assert desk.judge is not None
        read = lambda text: float(text) if text.isdecimal() else None  # noqa: E731
        value, replies = desk.judge.decide(sample.id, [desk.picture(made)], read)
        known: dict[str, Any] = {"id": sample.id, "replies": tuple(replies)}
        return (
            Verdict(scores={"q": value}, **known)
            if value is not None
            else Verdict(problem="unreadable", **known)
        )

    def written(pairs: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
        (path := folder / "submission.txt").write_text(" ".join(made.file for _, made in pairs))
        return path

    suite = replace(
        ANSWERS,
        name="drawings",
        samples=prompts,
        score=judged,
        reply="image",
        judged=True,
        summary=lambda verdicts: {"q": base.mean(verdicts, "q")},
        submission=written,
    )
    plan = Plan(data=data, folder=tmp_path / "run", options={"num_timesteps": 3})
    with pytest.raises(ValueError, match="drawings needs a judge"):
        run(suite, plan)
    with judge_server(
        lambda body, number: (200, "hm" if "2" in str(body["messages"][0]["content"][0]) else "8")
    ) as (url, asked):
        judge = Judge(Endpoint(url=url, model="wise"), tmp_path / "replies")
        run(suite, plan, judge=judge)
        assert len(asked) == 4
        for path in plan.folder.glob("verdicts*"):
            path.unlink()
        verdicts = run(suite, plan, judge=judge)
        assert len(asked) == 4  # the replies were kept
    told = json.loads((plan.folder / "summary.json").read_text())
    assert told["values"]["q"]["value"] == 8.0 and told["problems"] == {"unreadable": 1}
    assert verdicts[0].replies[0].judge == "wise" and verdicts[2].replies[0].text == "hm"
    drawn = Image.open(plan.folder / "outputs" / "00001" / "0.png")
    alone = tiny.bagel().using(replace(tiny.bagel().config.settings.draw, num_timesteps=3))
    assert drawn.tobytes() == alone.generate("p1", size=(8, 8), seed=1).tobytes()
    assert (plan.folder / "submission.txt").read_text() == " ".join(f"{n:05}/0.png" for n in range(4))


def test_means() -> None:
    verdicts = [
        Verdict(id=str(n), group=g, scores={"s": s})
        for n, (g, s) in enumerate([("a", 1.0), ("a", 0.0), ("b", 4.0)])
    ]
    assert (base.mean(verdicts, "s"), base.mean(verdicts, "s", "a")) == (5 / 3, 0.5)
    assert math.isnan(base.mean(verdicts, "t"))
