"""What the figures are painted with: shapes and text in points, anti-aliased, in one palette.

Cool colours belong to the understanding expert, warm ones to the generation expert.
"""

from collections.abc import Sequence
from math import atan2, ceil, cos, hypot, sin
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

WIDTH = 900
"""Points across: what GitHub shows."""
SHARP = 2
"""Pixels a point in the file."""
FINE = 2
"""Sub-pixels a pixel while painting."""

PAPER, INK, GREY, FAINT, PALE = "#ffffff", "#1f2933", "#66727f", "#c5ccd3", "#f1f3f5"
MARKER, TEXT, VIT = "#8fa3b8", "#4a82bd", "#3f9e83"
CLEAN, NOISED, FRAME = "#e5a83b", "#d9604c", "#a868a8"
UND, GEN = "#e6eff7", "#fcefdc"
UND_INK, GEN_INK = "#2f6296", "#a86a10"


class Canvas:
    """A white sheet, WIDTH points wide; y grows downwards."""

    def __init__(self, height: float) -> None:
        self.scale = SHARP * FINE
        self.image = Image.new("RGB", (WIDTH * self.scale, round(height * self.scale)), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def save(self, path: Path) -> None:
        self.image.reduce(FINE).save(path, optimize=True)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def text(
        self,
        at: Point,
        words: str,
        *,
        size: float = 13,
        fill: str = INK,
        anchor: str = "mm",
        bold: bool = False,
    ) -> None:
        """anchor: l, m or r for the side that `at` names, then a, m or s for top, middle or baseline."""
        (place,) = self._scaled([at])
        font = ImageFont.load_default(size=size * self.scale)
        stroke = size * self.scale * 0.022 if bold else 0
        self.draw.text(place, words, font=font, fill=fill, anchor=anchor, stroke_width=stroke)

    def box(
        self,
        at: Point,
        size: Point,
        *,
        fill: str | None = None,
        line: str | None = None,
        radius: float = 4,
        width: float = 1,
    ) -> None:
        corners = self._scaled([at, (at[0] + size[0], at[1] + size[1])])
        width = max(1, round(width * self.scale)) if line else 0
        self.draw.rounded_rectangle(corners, radius * self.scale, fill, line, width)

    def labelled(self, at: Point, size: Point, words: Sequence[str], *, fill: str, ink: str = PAPER) -> None:
        """A filled box with a first line, and smaller ones below it."""
        self.box(at, size, fill=fill)
        x, y = at[0] + size[0] / 2, at[1] + size[1] / 2 - 7 * (len(words) - 1)
        for row, word in enumerate(words):
            self.text((x, y + 14 * row), word, size=10.5 if row else 12, fill=ink, bold=not row)

    def line(self, points: Sequence[Point], *, fill: str = GREY, width: float = 1, dash: float = 0) -> None:
        """dash: points of a stroke and of the gap after it; 0 draws through."""
        thick = max(1, round(width * self.scale))
        if not dash:
            self.draw.line(self._scaled(points), fill, thick, joint="curve")
            return
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            strokes = max(1, ceil(hypot(x1 - x0, y1 - y0) / (2 * dash)))
            for i in range(strokes):
                ends = [i / strokes, (i + 0.5) / strokes]
                part = [(x0 + (x1 - x0) * end, y0 + (y1 - y0) * end) for end in ends]
                self.draw.line(self._scaled(part), fill, thick)

    def arrow(
        self,
        start: Point,
        end: Point,
        *,
        fill: str = GREY,
        width: float = 1.4,
        head: float = 8,
        dash: float = 0,
    ) -> None:
        angle = atan2(end[1] - start[1], end[0] - start[0])
        back = (end[0] - 0.8 * head * cos(angle), end[1] - 0.8 * head * sin(angle))
        self.line([start, back], fill=fill, width=width, dash=dash)
        wings = [(end[0] - head * cos(angle + a), end[1] - head * sin(angle + a)) for a in (0.42, -0.42)]
        self.draw.polygon(self._scaled([end, *wings]), fill)

    def circle(
        self,
        centre: Point,
        radius: float,
        *,
        fill: str | None = None,
        line: str | None = None,
        width: float = 1,
    ) -> None:
        (place,) = self._scaled([centre])
        width = max(1, round(width * self.scale)) if line else 0
        self.draw.circle(place, radius * self.scale, fill, line, width)

    def bracket(self, start: Point, end: float, *, fill: str = GREY, depth: float = 5) -> None:
        """A bracket from start to (end, same height); open downwards for a positive depth."""
        x, y = start
        self.line([(x, y + depth), (x, y), (end, y), (end, y + depth)], fill=fill, width=1.2)

    def picture(self, at: Point, side: float, picture: Image.Image) -> None:
        """A square picture with a thin frame, its pixels kept square."""
        edge = round(side * self.scale)
        (place,) = self._scaled([at])
        self.image.paste(
            picture.resize((edge, edge), Image.Resampling.NEAREST), (round(place[0]), round(place[1]))
        )
        self.box(at, (side, side), line=FAINT, radius=0)

    def legend(self, at: Point, entries: Sequence[tuple[str, str]], gap: float = 18) -> None:
        """Coloured squares with their names, in one row."""
        x, y = at
        font = ImageFont.load_default(size=12 * self.scale)
        for colour, name in entries:
            self.box((x, y - 6), (12, 12), fill=colour, radius=2)
            self.text((x + 18, y), name, size=12, anchor="lm", fill=GREY)
            x += 18 + font.getlength(name) / self.scale + gap
