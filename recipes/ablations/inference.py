"""Scores one model under other options: `python recipes/ablations/inference.py [MODEL]`, nano by default.

Guidance, renormalisation, the number of steps and the share of new noise on pictures, thinking on what asks
for a thought. What is scored already is not repeated; `results/inference.json` beside it has it all.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from openbagel.config import Sampling
from openbagel.evals.world import Plan, evaluate
from openbagel.flow import Renorm
from openbagel.inference.pipeline import Bagel

OUTPUT = Path(__file__).parent / "results" / "inference.json"
PICTURES = Plan(kinds=("draw_one", "draw_two", "edit_recolour"), samples=100)
THOUGHTS = Plan(kinds=("think_draw", "think_edit", "think_ask"), samples=50)
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
STEPS = (2, 4, 8, 12, 24, 48)
ETAS = (0.0, 0.5, 0.8, 1.0)
POINTS = 25
"""Of the schedule, where they are not what is varied."""


def settings(bagel: Bagel) -> Iterator[tuple[str, Bagel, Plan]]:
    """(name, the model with other options, what is scored)."""
    default = replace(bagel.config.settings.draw, num_timesteps=POINTS)
    guidances = {f"guidance {scale:g}": {"text": scale} for scale in SCALES}
    guidances |= {f"renorm {kind}": {"renorm": kind} for kind in Renorm}
    guidances |= {"renorm off": {"renorm_min": 1.0}, "interval 0.4 to 1": {"interval": (0.4, 1.0)}}
    for name, change in guidances.items():
        sampling = replace(default, guidance=replace(default.guidance, **change))
        yield name, bagel.using(sampling), PICTURES
    for eta in ETAS:
        yield f"eta {eta:g}", bagel.using(replace(default, eta=eta)), PICTURES
    for steps in STEPS:
        for eta in (1.0, 0.0):
            sampling = replace(default, num_timesteps=steps + 1, eta=eta)
            yield f"{steps} steps{'' if eta else ', eta 0'}", bagel.using(sampling), PICTURES
    for think in (False, True):
        yield f"thinking {'on' if think else 'off'}", bagel, replace(THOUGHTS, think=think)


def score(bagel: Bagel, plan: Plan) -> dict[str, list[int]]:
    right = Counter(v.group for v in evaluate(bagel, plan) if v.scores["right"])
    return {kind: [right[kind], plan.samples] for kind in plan.kinds}


def main(model: str = "nano") -> None:
    results: dict[str, Any] = json.loads(OUTPUT.read_text("utf-8")) if OUTPUT.is_file() else {}
    scored: dict[tuple[Sampling, Plan], Any] = {}
    for name, bagel, plan in settings(Bagel.load(model)):
        same = bagel.config.settings.draw, plan  # the default goes by several names
        if name not in results:
            results[name] = scored.get(same) or score(bagel, plan)
            OUTPUT.parent.mkdir(exist_ok=True)
            OUTPUT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        scored[same] = results[name]
        print(name, dict(results[name]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
