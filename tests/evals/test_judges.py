"""Judges behind a real socket: what is asked once, tried again, paid for, voted on, and kept."""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openbagel.evals.judges import Endpoint, Judge
from tests.evals.judge_server import judge_server

RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


def score(text: str) -> int | None:
    match = re.search(r"score: (\d)", text)
    return int(match[1]) if match else None


def judge(url: str, folder: Path, **options: Any) -> tuple[Judge, list[float]]:
    waits: list[float] = []
    return Judge(Endpoint(url=url, model="wise", **options), folder / "cache", wait=waits.append), waits


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield "secret"


def test_what_is_sent_and_kept(tmp_path: Path, key: str) -> None:
    with judge_server(lambda body, number: (200, f"score: {number}")) as (url, asked):
        first, _ = judge(url, tmp_path, price=(2.0, 10.0))
        reply = first.ask("how good?", [RED])
        assert (reply.text, reply.judge, reply.tokens) == ("score: 0", "wise", (1000, 10))
        assert first.cost == pytest.approx(0.0021) and first.calls == 1
        (body,) = asked
        assert (body["path"], body["key"], body["model"]) == ("/v1/chat/completions", f"Bearer {key}", "wise")
        text, image = body["messages"][0]["content"]
        assert text == {"type": "text", "text": "how good?"}
        sent = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(sent)).tobytes() == RED.tobytes()
        second, _ = judge(url, tmp_path)
        assert second.ask("how good?", [RED]) == reply and second.calls == 0
        others = [second.ask("how bad?", [RED]), second.ask("how good?", [BLUE]), second.ask("how good?")]
        assert len({reply.text for reply in others}) == 3 == second.calls
        told = second.ask("how good?", [RED], system="be strict")
        assert asked[-1]["messages"][0] == {"role": "system", "content": "be strict"}
        assert asked[-1]["messages"][1] == body["messages"][0]
        assert told.question != reply.question and len(asked) == 5
        labelled = second.ask("how good?", ["before:", RED, "after:", BLUE])
        content = asked[-1]["messages"][0]["content"]
        assert [part.get("text") for part in content] == ["how good?", "before:", None, "after:", None]
        assert labelled.question not in (told.question, reply.question)
        assert second.ask("how good?", [RED], system="be strict") == told and len(asked) == 6
        other = Judge(replace(second.endpoint, model="wiser"), tmp_path / "cache")
        assert other.ask("how good?", [RED]).judge == "wiser"


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    script = [(500, "oops"), (429, "slow down"), (200, {"error": "strange"}), (200, "score: 7")]
    with judge_server(lambda body, number: script[number]) as (url, asked):
        one, waits = judge(url, tmp_path)
        with pytest.raises(ValueError, match="another shape"):
            one.ask("q")
        assert one.ask("q").text == "score: 7"
        assert len(asked) == 4 and [round(wait) for wait in waits if wait > 0.5] == [1, 2]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusals_are_not_tried_again(tmp_path: Path, status: int) -> None:
    with judge_server(lambda body, number: (status, "no")) as (url, asked):
        with pytest.raises(ValueError, match=f"does not answer: {status}"):
            judge(url, tmp_path)[0].ask("q")
        assert len(asked) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_an_endpoint_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    one, waits = judge("http://127.0.0.1:9/v1", tmp_path, attempts=3)
    with pytest.raises(ValueError, match="run again to go on"):
        one.ask("q")
    assert one.calls == 3 and len([wait for wait in waits if wait > 0.5]) == 2


def test_the_budget_holds(tmp_path: Path) -> None:
    with judge_server(lambda body, number: (200, "fine")) as (url, asked):
        one, _ = judge(url, tmp_path, price=(1.0, 0.0), most_cost=0.0025)
        for number in range(3):
            one.ask(str(number))
        with pytest.raises(ValueError, match="budget is spent"):
            one.ask("3")
        assert len(asked) == 3 and one.ask("0").text == "fine"


def test_calls_keep_their_distance(tmp_path: Path) -> None:
    with judge_server(lambda body, number: (200, "fine")) as (url, _):
        one, waits = judge(url, tmp_path, per_minute=6)
        for number in range(3):
            one.ask(str(number))
    assert [round(wait) for wait in waits] == [10, 20]


def test_most_votes_decide(tmp_path: Path) -> None:
    said = ["score: 3", "I will not say", "score: 5", "score: 5", "score: 3"]
    with judge_server(lambda body, number: (200, said[number])) as (url, asked):
        value, replies = judge(url, tmp_path, votes=5)[0].decide("q", [RED], score)
        assert value == 3 and [reply.text for reply in replies] == said
        assert len({body["seed"] for body in asked}) == 5
    with judge_server(lambda body, number: (200, "nothing to read")) as (url, _):
        value, replies = judge(url, tmp_path, votes=3)[0].decide("r", [RED], score)
        assert value is None and len(replies) == 3


def test_urls_are_checked() -> None:
    with pytest.raises(ValueError, match="is no URL"):
        Endpoint(url="localhost:8000", model="m")
