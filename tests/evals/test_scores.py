"""What docs/nano.md says of the weights that ship, counted again on other examples."""

import re
from pathlib import Path

import pytest
import torch

from openbagel.evals.world import Plan, evaluate, wilson
from openbagel.images import to_pixels
from openbagel.inference.pipeline import Bagel
from openbagel.world.exercise import Draws, Films, Spec
from openbagel.world.judge import judge
from openbagel.world.render import render_picture
from openbagel.world.samples import world_named
from openbagel.world.tasks import example

PAGE = Path(__file__).parents[2] / "docs" / "nano.md"
SAMPLES = 20
SEED = 2_000_003
WIDE = 3.5
"""Deviations of so few examples, whose interval must meet the page's."""


@pytest.mark.parametrize(
    ("kind", "least"),
    [("draw_three", 1), ("walk_map", 0.9), ("walk_solid", 0.97), ("film_move", 1), ("film_turn", 0.9)],
)
def test_the_autoencoder_spoils_no_kind(kind: str, least: float) -> None:
    """What it encodes and decodes, with no transformer in between, is still right to the judge."""
    world, codec = world_named("nano"), Bagel.load("nano", device="cpu", dtype=torch.float32).pictures
    right = list[bool]()
    for index in range(12):
        for step in example(world, SEED, index, kind).steps:
            wanted = [step] if isinstance(step, Draws) else []
            if isinstance(step, Films):
                wanted = [Draws(view, Spec(view=view)) for view in step.views[::5]]
            for one in wanted:
                pixels = to_pixels(render_picture(one.view, world.side))
                image = codec.encode(pixels, torch.Generator().manual_seed(index))
                made = codec.decode(image.frames[0].tokens, image.frames[0].grid)
                right.append(judge(one.spec, made, world).ok)
    assert sum(right) >= least * len(right), (sum(right), len(right))


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
