"""The demonstration sheet."""

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from openbagel import cli
from openbagel.demo import CELL, MARGIN, compose, wrapped


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


@pytest.mark.slow
def test_the_demo_writes_its_sheet(tmp_path: Path):
    assert cli.main(["demo", "-o", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000
