"""Trains and scores the ablations of docs/findings.md: `python recipes/ablations/run.py [NAME…]`.

Each run is `openbagel train recipes/ablations/base.yaml` with the changes below; a complete one is not
repeated, so the script may be stopped and started again. Afterwards `results.json` in the folder of all runs
has their scores and losses: means over the last tenth, where every example is new to the model, so that no
other data is needed.
"""

import json
import statistics
import sys
from pathlib import Path

from openbagel.evals.world import Plan, evaluate
from openbagel.inference.pipeline import Bagel
from openbagel.train.recipe import read_recipe
from openbagel.train.stages import train

HERE = Path(__file__).parent
FOLDER = Path("runs/ablations")
LOSSES = ("ce", "mse")
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
RUNS |= {f"lr-{lr:g}": [f"train.schedule.lr={lr}"] for lr in (5e-4, 2e-3, 8e-3)}
RUNS |= {
    f"vit-in-edits-{word}": [f"data.world.vit_dropout={drop}"]
    for word, drop in {"kept": 0.3, "never": 1.0}.items()
}


def last_losses(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    tail = rows[-len(rows) // 10 :]
    return {
        name: statistics.fmean(row[name] for row in tail if row.get(name) is not None)
        for name in ("ce", "mse")
    }


def main(names: list[str]) -> None:
    results = {}
    for name in names or RUNS:
        folder = FOLDER / name
        if not (folder / "checkpoint").is_dir():
            train(read_recipe(HERE / "base.yaml", [f"folder={folder}", *RUNS[name]]))
        scored = folder / "scores.json"
        if not scored.is_file():
            plan = Plan(kinds=(*DRAWING, *ASKING), samples=100)
            records = list(evaluate(Bagel.load(folder / "checkpoint"), plan))
            right = {kind: sum(r.right for r in records if r.kind == kind) for kind in plan.kinds}
            scored.write_text(json.dumps(right), "utf-8")
        results[name] = last_losses(folder) | {"right of 100": json.loads(scored.read_text("utf-8"))}
        print(name, results[name], flush=True)
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
