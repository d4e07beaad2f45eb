"""The figures of the documentation can be drawn, and those in the repository are all of them."""

from pathlib import Path

from PIL import Image

from docs.canvas import SHARP, WIDTH
from docs.figures import draw_all

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
BYTES = 1_500_000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_figures_are_drawn(tmp_path: Path) -> None:
    draw_all(tmp_path)
    assert names(tmp_path) == names(FIGURES)
    for name in names(tmp_path):
        with Image.open(tmp_path / name) as new, Image.open(FIGURES / name) as old:
            assert new.size == old.size
            assert new.width == WIDTH * SHARP


def test_figures_are_shown_and_light() -> None:
    page = (FIGURES.parent / "how-it-works.md").read_text()
    assert [name for name in names(FIGURES) if f"(figures/{name})" not in page] == []
    assert sum(path.stat().st_size for path in FIGURES.iterdir()) < BYTES
