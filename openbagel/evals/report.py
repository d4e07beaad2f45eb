"""Runs of benchmarks side by side, beside what was published, and a page to look through one."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from openbagel.evals.base import Made, Plan, Sample, Suite, Verdict, read_lines
from openbagel.evals.page import filled
from openbagel.files import read_json


def compared(folders: Sequence[Path], published: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table for each suite: a line a run, with intervals, then the published rows; and for runs that judged
    the same pictures how far their judges are apart. published: rows by suite and name.
    """
    runs: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder in folders:
        if not (folder / "summary.json").is_file():
            raise ValueError(
                f"{folder} holds no finished run; `openbagel eval … -o {folder}` goes on with it"
            )
        told = read_json(folder / "summary.json")
        runs.setdefault(told["suite"], []).append((folder, told))
    lines: list[str] = []
    for suite, some in runs.items():
        names = list(dict.fromkeys(name for _, told in some for name in told["values"]))
        rows = [[suite, *names, "scored", "of", "problems"]]
        for folder, told in some:
            cells = [_cell(told["values"].get(name)) for name in names]
            problems = ", ".join(f"{count} {kind}" for kind, count in told["problems"].items())
            rows.append([str(folder), *cells, str(told["scored"]), str(told["samples"]), problems])
        for row, values in published.get(suite, {}).items():
            rows.append([f"{row} (published)", *(f"{values[n]:g}" if n in values else "" for n in names)])
        lines += [*_aligned(rows), *_apart([folder for folder, _ in some]), ""]
    return "\n".join(lines).rstrip()


def _cell(value: Mapping[str, float] | None) -> str:
    return "{value:.4g} ({low:.4g}-{high:.4g})".format(**value) if value else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]


def _apart(folders: Sequence[Path]) -> list[str]:
    """For each run after the first: how far its scores lie from the first's on what both had alike."""
    lines: list[str] = []
    made = [read_lines(folder.glob("made-*.jsonl"), Made) for folder in folders]
    verdicts = [read_lines(folder.glob("verdicts-*.jsonl"), Verdict) for folder in folders]
    for number in range(1, len(folders)):
        both = [
            (verdicts[0][name].scores, verdicts[number][name].scores)
            for name, one in made[number].items()
            if made[0].get(name) == one and name in verdicts[0] and name in verdicts[number]
        ]
        for score in dict.fromkeys(score for first, _ in both for score in first):
            off = [b[score] - a[score] for a, b in both if score in a and score in b]
            same, bias = sum(not d for d in off) / len(off), sum(off) / len(off)
            lines.append(
                f"{folders[number]} against {folders[0]}: {score} the same in {same:.1%} of {len(off)}, "
                f"{bias:+.3f} on average"
            )
    return lines


def run_page(suite: Suite, plan: Plan) -> str:
    """Every sample of a run: what was given, made and said of it; pictures stay where they are."""
    folder, samples = plan.folder, list(suite.samples(plan.data))
    made = read_lines(folder.glob("made-*.jsonl"), Made)
    verdicts = read_lines(folder.glob("verdicts-*.jsonl"), Verdict)
    shown = [(s, made[s.id], verdicts[s.id]) for s in samples if s.id in verdicts]
    return filled(
        title=f"{suite.name} in {folder.name}",
        table=compared([folder], {suite.name: suite.published}),
        kinds=list(dict.fromkeys(sample.group for sample in samples)),
        samples=[_article(folder, *one) for one in shown],
    )


def _article(folder: Path, sample: Sample, made: Made, verdict: Verdict) -> str:
    scores = ", ".join(f"{name} {value:g}" for name, value in verdict.scores.items())
    file = folder / "outputs" / made.file
    files = sorted(file.iterdir()) if file.is_dir() else [file]
    drawn = "".join(_shown(one, folder) for one in files) if made.file else escape(made.text)
    notes = [f"thought: {made.thought}"] if made.thought else []
    notes += [f"{reply.judge}, {reply.date}: {reply.text}" for reply in verdict.replies]
    blocks = [
        f"<small>given</small>{''.join(_shown(part, folder) for part in sample.parts)}",
        f"<small>made</small>{drawn}",
        escape(verdict.reason) + "".join(f"<small>{escape(note)}</small>" for note in notes),
    ]
    data = f'class="{"right" if verdict.scores else "wrong"} photo" data-kind="{escape(sample.group)}"'
    head = escape(f"{sample.id}: {scores or verdict.problem}")
    return f"<article {data}><b>{head}</b>{''.join(f'<div>{block}</div>' for block in blocks)}</article>"


def _shown(part: str | Path, folder: Path) -> str:
    if isinstance(part, str):
        return f"<div>{escape(part)}</div>"
    return f'<img loading="lazy" src="{escape(os.path.relpath(part, folder))}">'
