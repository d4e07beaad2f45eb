"""Draws the figures of docs/findings.md from the results beside it: `python recipes/ablations/plots.py`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openbagel.evals.world import wilson

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "findings"
COLOURS = {"mot": "tab:red", "moe": "tab:orange", "dense": "tab:blue"}
Results = dict[str, dict[str, Any]]


def read(name: str) -> Results:
    return json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))


def curves(axes: Axes, results: Results, loss: str) -> None:
    """Mean and range over seeds."""
    for module, colour in COLOURS.items():
        runs = np.array([run[loss]["curve"] for name, run in results.items() if name.startswith(module)])
        steps = (np.arange(runs.shape[1]) + 0.5) * 1500 / runs.shape[1]
        axes.plot(steps, runs.mean(0), color=colour, label=f"{module}, {len(runs)} seeds")
        axes.fill_between(steps, runs.min(0), runs.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set(
        title={"mse": "squared velocity error", "ce": "cross-entropy"}[loss], xlabel="steps", yscale="log"
    )
    axes.legend()


def ends(axes: Axes, results: Results, names: dict[str, str], title: str) -> None:
    """Last losses of single runs, as bars."""
    places = np.arange(len(names))
    for shift, loss in ((-0.2, "mse"), (0.2, "ce")):
        heights = [results[name][loss]["last"] for name in names]
        bars = axes.bar(places + shift, heights, 0.38, label=loss)
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.set_xticks(places, list(names.values()))
    axes.set(title=title)
    axes.legend()


def scores(axes: Axes, results: Results, names: dict[str, Any], title: str, kinds: Sequence[str]) -> None:
    """Shares of right ones with 95 % intervals, a line for each kind."""
    places: Iterable[Any] = names.values()
    for kind in kinds:
        counts = [results[name][kind] for name in names]
        bounds = np.array([wilson(right, total) for right, total in counts]).T
        axes.plot(list(places), [right / total for right, total in counts], marker="o", label=kind)
        axes.fill_between(list(places), bounds[0], bounds[1], alpha=0.15, linewidth=0)
    axes.set(title=title, ylim=(0, 1), ylabel="right")
    axes.legend(fontsize=8)


def main() -> None:
    trained, asked = read("training"), read("inference")
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    curves(next(panels), trained, "mse")
    curves(next(panels), trained, "ce")
    ends(
        next(panels),
        trained,
        {"generation-50": "50 %", "mot-seed0": "67 %", "generation-80": "80 %"},
        "share of samples that draw",
    )
    rates = {"lr-0.0005": "0.0005", "mot-seed0": "0.002", "lr-0.008": "0.008"}
    ends(next(panels), trained, rates, "learning rate")
    shown = {"mot-seed0": "in 70 %", "no-vit-in-edits": "never"}
    ends(next(panels), trained, shown, "ViT tokens of the source in edits")
    next(panels).set_axis_off()
    figure.savefig(FIGURES / "training.png", dpi=90)

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    pictures, thoughts = ("draw_one", "draw_two", "edit_recolour"), ("think_draw", "think_edit", "think_ask")
    for title, start, end, kinds in (
        ("text guidance", "guidance ", "", pictures),
        ("renormalisation", "renorm ", "", pictures),
        ("thinking", "thinking ", "", thoughts),
        ("share of the noise drawn anew, 24 steps", "eta ", "", pictures),
        ("steps, all noise drawn anew", "", " steps", pictures),
        ("steps, none drawn anew", "", " steps, eta 0", pictures),
    ):
        found = [name for name in asked if name.startswith(start) and name.endswith(end)]
        names = {name: name.removeprefix(start).removesuffix(end) for name in found}
        scores(next(panels), asked, names, title, kinds)
    figure.savefig(FIGURES / "inference.png", dpi=90)


if __name__ == "__main__":
    main()
