"""The samples of a run as an HTML page: what was given, what the model made of it, and what that is worth."""

import os
from base64 import b64encode
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from openbagel.evals.base import Desk, Made, Plan, Sample, Suite, Turn, Verdict, read_lines
from openbagel.evals.report import compared
from openbagel.picture_files import png

TEMPLATE = Path(__file__).parents[1] / "assets" / "eval.html"


def page(suite: Suite, plan: Plan) -> str:
    """Every sample of a run, with filters by group and verdict; pictures of files stay where they are."""
    folder, samples = plan.folder, list(suite.samples(plan.data))
    made = read_lines(folder.glob("made-*.jsonl"), Made)
    verdicts = read_lines(folder.glob("verdicts-*.jsonl"), Verdict)
    desk = Desk(plan.data, folder / "outputs")
    articles: list[str] = []
    for sample in samples:
        if (verdict := verdicts.get(sample.id)) is not None:
            turns = suite.turns or _turns
            shown = "".join(_turn(turn, folder) for turn in turns(sample, made[sample.id], verdict, desk))
            notes = [] if suite.turns else [verdict.reason]  # else each turn has its own
            articles.append(_article(sample, verdict, shown, notes))
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(f"{suite.name} in {folder.name}"),
        table=escape(compared([folder], {suite.name: suite.published})),
        options="".join(
            f"<option>{escape(name)}</option>" for name in dict.fromkeys(s.group for s in samples)
        ),
        samples="\n".join(articles),
    )


def _turns(sample: Sample, made: Made, verdict: Verdict, desk: Desk) -> list[Turn]:
    """The sample's parts and what was made of them."""
    turns = [Turn(part) for part in sample.parts]
    for part in made.parts:
        file = desk.outputs / part.file
        frames = sorted(file.iterdir()) if file.is_dir() and part.file else [file]
        turns.append(Turn(frames if part.file else part.text, right=True, thought=part.thought))
    return turns


def _article(sample: Sample, verdict: Verdict, turns: str, notes: list[str]) -> str:
    scores = ", ".join(f"{name} {value:g}" for name, value in verdict.scores.items())
    right = bool(verdict.scores) and verdict.scores.get("right") != 0
    notes += [f"{reply.judge}, {reply.date}: {reply.text}" for reply in verdict.replies]
    said = "".join(f"<small>{escape(note)}</small>" for note in notes)
    data = f'class="{"right" if right else "wrong"}" data-kind="{escape(sample.group)}"'
    head = escape(f"{sample.id}: {scores or verdict.problem}")
    return f"<article {data}><b>{head}</b>{turns}<div>{said}</div></article>"


def _turn(turn: Turn, folder: Path) -> str:
    if turn.right is None:
        return f"<div><small>given</small>{_shown(turn.content, folder)}</div>"
    thought = f"<small>thought: {escape(turn.thought)}</small>" if turn.thought else ""
    beside = turn.truth is not None and turn.truth != turn.content
    truth = f"<small>one right answer</small>{_shown(turn.truth, folder)}" if beside else ""
    made = f"<small>made</small>{_shown(turn.content, folder)}<small>{escape(turn.reason)}</small>"
    return f'<div class="{"right" if turn.right else "wrong"}">{thought}{made}{truth}</div>'


def _shown(content: Any, folder: Path) -> str:
    match content:
        case str():
            return escape(content) or "nothing"
        case Path():
            return f'<img class="photo" loading="lazy" src="{escape(os.path.relpath(content, folder))}">'
        case Image.Image():  # in few colours: enough to look at
            return f'<img src="data:image/png;base64,{b64encode(png(content.quantize(32))).decode()}">'
    return "".join(_shown(one, folder) for one in content)
