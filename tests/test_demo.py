"""The demonstration sheet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFont

from openbagel import cli
from openbagel.config import Sampling
from openbagel.demo import CELL, MARGIN, compose, sheet, wrapped
from openbagel.inference.pipeline import Bagel


def test_rows_of_tiles_are_laid_out():
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    canvas = compose([("Row", [(picture, "a caption"), (None, "words only")])])
    assert canvas.width == MARGIN + 2 * (CELL + MARGIN)
    assert canvas.getpixel((MARGIN + CELL // 2, MARGIN + 36 + CELL // 2)) == (255, 0, 0)


def test_captions_break_between_words():
    font = ImageFont.load_default(size=16)
    lines = wrapped("a rather long caption of several words\nand a second paragraph", font, 120)
    assert " ".join(lines) == "a rather long caption of several words and a second paragraph"
    assert len(lines) > 3 and all(font.getlength(line) <= 120 for line in lines)


@pytest.mark.parametrize("knows", [{}, {"world": "nano"}, {"world": "full", "draws_by_itself": True}])
def test_a_model_shows_what_it_learned(knows: dict[str, Any]):
    bagel = Bagel.load("nano", device="cpu")
    known = {"world": None, "draws_by_itself": False} | knows
    bagel.config = replace(bagel.config, settings=replace(bagel.config.settings, **known))
    quick = bagel.using(Sampling(num_timesteps=2, max_tokens=4, max_think_tokens=4))
    said: list[str] = []
    picture, clip = sheet(quick, said.append)
    assert len(clip) == (13 if knows else 0) and all(frame.size == (CELL, CELL) for frame in clip)
    rows = 4 + 4 * ("world" in knows) + ("draws_by_itself" in knows)
    one_row = compose([("Row", [(None, "words")])]).height - MARGIN
    assert picture.height == MARGIN + rows * one_row
    assert ("filming 10 frames" in said) == bool(knows)


@pytest.mark.slow
def test_the_demo_writes_its_sheet(tmp_path: Path):
    assert cli.main(["demo", "-o", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000
