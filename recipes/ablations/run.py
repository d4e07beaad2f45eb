"""Trains and scores the ablations of docs/findings.md: `python recipes/ablations/run.py [NAME…]`.

Each run is `openbagel train recipes/ablations/base.yaml` with the changes below; a complete one is not
repeated, so the script may be stopped and started again. `results/training.json` beside it then has their
loss curves, their losses (means over the last tenth; no example is seen more than three times) and scores.
"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from openbagel.evals.world import Plan, evaluate
from openbagel.inference.pipeline import Bagel
from openbagel.train.recipe import read_recipe
from openbagel.train.stages import train

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "training.json"
FOLDER = Path("runs/ablations")
LOSSES = ("ce", "mse")
BINS = 25
"""Points of a loss curve, each the mean of as many steps."""
DRAWING = {"draw_one": 2, "draw_two": 1, "edit_recolour": 1}
ASKING = {"ask_shape": 1, "ask_exists": 1}


def shares(generation: float) -> str:
    """The kinds with this share of samples that draw."""
    drawn = {kind: weight * generation / sum(DRAWING.values()) for kind, weight in DRAWING.items()}
    asked = {kind: weight * (1 - generation) / sum(ASKING.values()) for kind, weight in ASKING.items()}
    return f"data.world.kinds={json.dumps(drawn | asked)}"


RUNS: dict[str, list[str]] = {
    f"{module}-seed{seed}": [
        f"start.settings.layer_module={layer}",
        f"train.seed={seed}",
        f"data.seed={seed}",
    ]
    for seed in range(3)
    for module, layer in {
        "mot": "Qwen2MoTDecoderLayer",
        "moe": "Qwen2MoEDecoderLayer",
        "dense": "Qwen2DecoderLayer",
    }.items()
}
RUNS |= {f"generation-{round(100 * share)}": [shares(share)] for share in (0.5, 0.8)}
RUNS |= {f"lr-{lr:g}": [f"train.schedule.lr={lr}"] for lr in (5e-4, 8e-3)}
RUNS["no-vit-in-edits"] = ["data.world.vit_dropout=1"]
"""mot-seed0, the base, has the middle learning rate and share, and keeps the ViT in 70 % of edits."""


def losses(run: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = max(row["step"] for row in rows) + 1
    found: dict[str, dict[str, Any]] = {}
    for name in LOSSES:
        bins: list[list[float]] = [[] for _ in range(BINS)]
        for row in rows:
            if row.get(name) is not None:
                bins[row["step"] * BINS // steps].append(row[name])
        last = [row[name] for row in rows if row["step"] >= 0.9 * steps and row.get(name) is not None]
        found[name] = {
            "last": round(statistics.fmean(last), 4),
            "curve": [round(statistics.fmean(values), 4) for values in bins],
        }
    return found


def main(names: list[str]) -> None:
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    for name in names or RUNS:
        folder = FOLDER / name
        if not (folder / "checkpoint").is_dir():
            train(read_recipe(HERE / "base.yaml", [f"folder={folder}", *RUNS[name]]))
        if name not in results:
            plan = Plan(kinds=(*DRAWING, *ASKING), samples=100)
            verdicts = evaluate(Bagel.load(folder / "checkpoint"), plan)
            right = Counter(verdict.group for verdict in verdicts if verdict.scores["right"])
            results[name] = losses(folder) | {"right of 100": {kind: right[kind] for kind in plan.kinds}}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        told = [f"{loss} {results[name][loss]['last']:.3f}" for loss in LOSSES]
        print(name, *told, results[name]["right of 100"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
