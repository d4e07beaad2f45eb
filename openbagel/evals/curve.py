"""Scores of a run's checkpoints against the tokens they have seen: when each ability emerges."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from openbagel.checks import extra
from openbagel.config import from_json, to_json
from openbagel.evals.world import Plan, evaluate
from openbagel.inference.pipeline import Bagel

ABILITIES = {
    "understanding": "ask_",
    "drawing": "draw_",
    "editing": "edit_",
    "intelligent editing": "think_edit",
}
"""The paper's four (§6, emerging properties), by how their kinds begin. think_… kinds are scored thinking."""
MOST = 0.85
"""The share of its peak at which an ability counts as there."""


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint's scores: per kind, how many were right of how many."""

    step: int
    tokens: float
    scores: dict[str, tuple[int, int]]

    def share(self, start: str) -> float:
        """Of all kinds that begin so; NaN if there are none."""
        found = [score for kind, score in self.scores.items() if kind.startswith(start)]
        right, total = (sum(score[i] for score in found) for i in (0, 1))
        return right / total if total else math.nan


def checkpoints(run: Path) -> list[tuple[int, float, Path]]:
    """(step, tokens seen, folder) of every checkpoint of a run, from the first. ValueError when there are
    none.
    """
    recipe, log = run / "recipe.json", run / "metrics.jsonl"
    if not (recipe.is_file() and log.is_file()):
        raise ValueError(f"{run} holds no recipe.json and metrics.jsonl; name a folder of `openbagel train`")
    stored = json.loads(recipe.read_text("utf-8")).get("checkpoints")
    folders = sorted(Path(stored or run / "checkpoints").glob("step-*/MANIFEST.json"))
    if not folders:
        raise ValueError(f"{run} has no checkpoint yet; train it first")
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.endswith("}")]
    done = [(0, 0), *((row["step"] + 1, row["tokens"]) for row in rows)]  # a row's step is its last
    steps = [int(path.parent.name.partition("-")[2]) for path in folders]
    tokens = np.interp(steps, *np.array(done).T)
    return [(s, float(t), path.parent) for s, t, path in zip(steps, tokens, folders, strict=True)]


def score(
    run: Path, plan: Plan, open: Callable[[Path], Bagel], output: Path, progress: Callable[[str], object]
) -> list[Point]:
    """Scores what `output`, a JSON file, lacks, and keeps it after each checkpoint, so that it can go on.

    ValueError when the file was made with another plan.
    """
    asked = to_json(plan)
    known = json.loads(output.read_text("utf-8")) if output.is_file() else {"plan": asked, "points": []}
    if known["plan"] != asked:
        raise ValueError(f"{output} was made with another plan, {known['plan']}; name another file")
    points = {one["step"]: from_json(Point, one, str(output)) for one in known["points"]}
    for step, tokens, folder in checkpoints(run):
        if step in points:
            continue
        points[step] = Point(step, tokens, _scores(open(folder), plan))
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_suffix(".tmp")
        listed = [to_json(point) for _, point in sorted(points.items())]
        fresh.write_text(json.dumps({"plan": asked, "points": listed}, indent=1) + "\n", "utf-8")
        fresh.replace(output)
        progress(f"step {step}, {tokens:,.0f} tokens: {_told(points[step])}")
    return [point for _, point in sorted(points.items())]


def _scores(bagel: Bagel, plan: Plan) -> dict[str, tuple[int, int]]:
    kinds = plan.for_model(bagel).kinds
    found: dict[str, tuple[int, int]] = {}
    for thinks in (False, True):
        some = tuple(kind for kind in kinds if kind.startswith("think_") == thinks)
        for verdict in evaluate(bagel, replace(plan, kinds=some, think=thinks)) if some else ():
            right, total = found.get(verdict.group, (0, 0))
            found[verdict.group] = right + int(verdict.scores["right"]), total + 1
    return found


def _told(point: Point) -> str:
    shares = {name: point.share(start) for name, start in ABILITIES.items()}
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share == share)


def emergence(points: Sequence[Point]) -> Iterator[tuple[str, float, float]]:
    """(ability, its peak, tokens at which it first had MOST of that, between checkpoints by a line)."""
    for name, start in ABILITIES.items():
        shares = [point.share(start) for point in points]
        if not shares or any(map(math.isnan, shares)):
            continue
        goal = MOST * max(shares)
        place = next(i for i, share in enumerate(shares) if share >= goal)
        near = slice(max(place - 1, 0), place + 1)
        tokens = np.interp(goal, shares[near], [point.tokens for point in points[near]])
        yield name, max(shares), float(tokens)


def table(points: Sequence[Point]) -> str:
    """The order in which abilities come."""
    rows = [f"{'ability':<22}{'peak':>8}   tokens to {MOST:.0%} of it"]
    rows += [f"{name:<22}{peak:>8.1%}   {tokens:,.0f}" for name, peak, tokens in emergence(points)]
    return "\n".join(rows)


def draw(points: Sequence[Point], output: Path) -> Path:
    """A PNG: the four abilities, with the tokens to 85 % of their peaks, and every kind."""
    figure = extra("matplotlib.figure", "plot", "a curve").Figure(figsize=(12, 5), layout="constrained")
    tokens = [point.tokens for point in points]
    found = {name: (peak, at) for name, peak, at in emergence(points)}
    kinds = dict.fromkeys(kind for point in points for kind in point.scores)
    for place, starts in enumerate(({name: ABILITIES[name] for name in found}, {k: k for k in kinds}), 1):
        axes = figure.add_subplot(1, 2, place, xlabel="tokens seen", ylabel="right", ylim=(0, 1))
        axes.grid(alpha=0.3)
        for number, (name, start) in enumerate(starts.items()):
            shares = [point.share(start) for point in points]
            line = "-" if number < 10 else "--" if number < 20 else ":"
            axes.plot(tokens, shares, line, color=f"C{number % 10}", marker=".", label=name)
            if name in found:
                peak, at = found[name]
                axes.plot([at], [MOST * peak], "D", color=f"C{number}")
        axes.legend(fontsize=11 - 2 * place, ncols=place)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    return output
