"""The samples of an evaluation as one HTML page: what was given, what the model made of it, and the truth."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from openbagel.evals.world import Content, Record, Turn, group_of, table

TEMPLATE = Path(__file__).parents[1] / "assets" / "eval.html"


def page(records: Sequence[Record], title: str) -> str:
    """Everything in one file: the table, and each sample with its pictures; filters by kind and verdict."""
    kinds = dict.fromkeys(record.kind for record in records)
    choices = [*dict.fromkeys(map(group_of, kinds)), *kinds]
    return filled(title=title, table=table(records), kinds=choices, samples=list(map(_sample, records)))


def filled(*, title: str, table: str, kinds: Sequence[str], samples: Sequence[str]) -> str:
    """The page; samples are its articles."""
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(title),
        table=escape(table),
        options="".join(f"<option>{escape(name)}</option>" for name in kinds),
        samples="\n".join(samples),
    )


def _sample(record: Record) -> str:
    verdict = "right" if record.right else "wrong"
    measured = "".join(f", {name} {value:.3f}" for name, value in record.measures.items())
    head = f"{record.kind} {record.index}{' held out' * record.held_out}: {verdict}{measured}"
    data = f'class="{verdict}" data-kind="{record.kind}" data-group="{group_of(record.kind)}"'
    return f"<article {data}><b>{escape(head)}</b>{''.join(map(_turn, record.turns))}</article>"


def _turn(turn: Turn) -> str:
    if turn.right is None:
        return f"<div><small>given</small>{_shown(turn.content)}</div>"
    thought = f"<small>thought: {escape(turn.thought)}</small>" if turn.thought else ""
    truth = "" if turn.content == turn.truth else f"<small>one right answer</small>{_shown(turn.truth)}"
    made = f"<small>made</small>{_shown(turn.content)}<small>{escape(turn.reason)}</small>"
    return f'<div class="{"right" if turn.right else "wrong"}">{thought}{made}{truth}</div>'


def _shown(content: Content) -> str:
    if isinstance(content, str):
        return escape(content) or "nothing"
    return "".join(f'<img src="data:image/png;base64,{b64encode(one).decode()}">' for one in content)
