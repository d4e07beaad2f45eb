"""Runs of benchmarks side by side, beside what was published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openbagel.evals.base import Made, Verdict, read_lines
from openbagel.files import read_json

WIDE = 12
"""Values; more stand below each other."""


def compared(
    folders: Sequence[Path], published: Mapping[str, Mapping[str, Mapping[str, float]]], *, label: str = ""
) -> str:
    """A table for each suite: a line a run, with intervals, then the published rows (columns, if there are
    many values); and for runs that judged the same pictures how far their judges are apart. published: rows
    by suite and name. label: in place of a folder's name.
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
            rows.append([label or str(folder), *cells, str(told["scored"]), str(told["samples"]), problems])
        for row, values in published.get(suite, {}).items():
            told = [f"{values[n]:g}" if n in values else "" for n in names]
            rows.append([f"{row} (published)", *told, "", "", ""])
        if len(names) > WIDE:
            rows = [list(column) for column in zip(*rows, strict=True)]
        lines += [*_aligned(rows), *_apart([folder for folder, _ in some]), ""]
    return "\n".join(lines).rstrip()


def _cell(value: Mapping[str, float] | None) -> str:
    return "{value:.4g} ({low:.4g}-{high:.4g})".format(**value) if value else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
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
            if name in made[0]
            and made[0][name].parts == one.parts
            and name in verdicts[0]
            and name in verdicts[number]
        ]
        for score in dict.fromkeys(score for first, _ in both for score in first):
            off = [b[score] - a[score] for a, b in both if score in a and score in b]
            same, bias = sum(not d for d in off) / len(off), sum(off) / len(off)
            lines.append(
                f"{folders[number]} against {folders[0]}: {score} the same in {same:.1%} of {len(off)}, "
                f"{bias:+.3f} on average"
            )
    return lines
