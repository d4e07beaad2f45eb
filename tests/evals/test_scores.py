"""What docs/nano.md says of the weights that ship, counted again on other examples."""

import re
from pathlib import Path

import pytest

from openbagel.evals.world import Plan, evaluate, wilson
from openbagel.inference.pipeline import Bagel

PAGE = Path(__file__).parents[2] / "docs" / "nano.md"
SAMPLES = 20
SEED = 2_000_003
WIDE = 3.5
"""Deviations of so few examples, whose interval must meet the page's."""


@pytest.mark.slow
def test_the_page_tells_the_truth() -> None:
    row = r"^\| (\w+)(, thinking|, held out|) \| [\d.]+ % \| \d+ \| ([\d.]+) % to ([\d.]+) % \|"
    rows = re.findall(row, PAGE.read_text("utf-8"), re.M)
    assert len(rows) > 40
    bagel = Bagel.load("nano", device="cpu")
    wrong = []
    for kind, how, least, most in rows:
        options = {"think": how == ", thinking", "held_out": how == ", held out"}
        plan = Plan(kinds=(kind,), samples=SAMPLES, seed=SEED, **options)
        right = round(sum(verdict.scores["right"] for verdict in evaluate(bagel, plan)))
        low, high = wilson(right, SAMPLES, WIDE)
        if high < float(least) / 100 or low > float(most) / 100:
            wrong.append(f"{kind}{how}: {least} to {most} % on the page, {right} of {SAMPLES} here")
    assert not wrong, "\n".join(wrong)
