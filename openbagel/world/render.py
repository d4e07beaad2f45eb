"""Views to pictures: signed distance fields on a pixel grid, for many views at once, at any size.

Shape suffixes: B views, N objects of all scenes, K sides of a solid, H and W pixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from openbagel.world.scene import Colour, Ground, Scene, Shape, Solid, Thing, View

Distance = Callable[[Tensor, Tensor], Tensor]
"""Signed distance (negative inside) at points x (right) and y (down), all in units of the object's radius."""
SOLID_SIDE = 0.44
"""Width and height of a solid's side that faces the viewer, as fractions of the picture's side."""
SOLID_HEIGHT = 0.6
_AT_ONCE = 32
"""Views drawn at once on a CPU: so many that their objects stay in its cache."""


def render(views: Sequence[View], side: int, device: torch.device | str = "cpu") -> Tensor:
    """Pictures float[B, 3, side, side] in [0, 1] of `views`, with edges about one pixel wide.

    Objects may lie partly or wholly outside.
    """
    step = _AT_ONCE if torch.device(device).type == "cpu" else 4096
    chunks = [_render(views[start : start + step], side, device) for start in range(0, len(views), step)]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, side, side, device=device)


def _render(views: Sequence[View], side: int, device: torch.device | str) -> Tensor:
    canvas_B3HW = _rgb([view.ground for view in views], device).repeat(1, 1, side, side)
    scenes = [(row, view) for row, view in enumerate(views) if isinstance(view, Scene)]
    things = [thing for _, scene in scenes for thing in scene.things]
    alpha_N1HW = coverage(things, side, device)[:, None]
    colours_N311 = _rgb([thing.colour for thing in things], device)
    rows_N = torch.tensor([row for row, scene in scenes for _ in scene.things], device=device)
    layers_N = torch.tensor([layer for _, scene in scenes for layer in range(len(scene.things))])
    for layer in layers_N.unique():
        some = (layers_N == layer).nonzero()[:, 0].to(device)
        rows = rows_N[some]
        below = canvas_B3HW[rows]
        canvas_B3HW[rows] = torch.lerp(below, colours_N311[some].expand_as(below), alpha_N1HW[some])
    for row, view in enumerate(views):
        if isinstance(view, Solid):
            canvas_B3HW[row] = _over(canvas_B3HW[row], view)
    return canvas_B3HW


def _rgb(paints: Sequence[Colour | Ground], device: torch.device | str) -> Tensor:
    return torch.tensor([paint.rgb for paint in paints], device=device).reshape(-1, 3, 1, 1) / 255


def _over(canvas_3HW: Tensor, solid: Solid) -> Tensor:
    """Draw a solid on a picture: the sides that face the viewer, as rectangles side by side."""
    side, device = canvas_3HW.shape[-1], canvas_3HW.device
    turn = torch.tensor([[solid.turn]], dtype=torch.float64)
    angle_K1 = (turn + torch.arange(4)[:, None] * (math.pi / 2)).to(device)
    middle, half = 0.5 + SOLID_SIDE / 2 * angle_K1.sin(), SOLID_SIDE / 2 * angle_K1.cos().clamp(min=0)
    across_KW = _share_between(middle - half, middle + half, side)
    half_height = torch.full((1, 1), SOLID_HEIGHT / 2, device=device)
    down_H = _share_between(0.5 - half_height, 0.5 + half_height, side)[0]
    colours_3K = _rgb(solid.sides, device)[:, :, 0, 0].T
    sides_3W = colours_3K @ across_KW + canvas_3HW[:, 0] * (1 - across_KW.sum(dim=0))
    return torch.lerp(canvas_3HW, sides_3W[:, None].expand_as(canvas_3HW), down_H[:, None])


def _share_between(low_X1: Tensor, high_X1: Tensor, side: int) -> Tensor:
    """How much of each pixel of a row lies between two places: float[X, side]."""
    left = torch.arange(side, device=low_X1.device) / side
    return ((high_X1.minimum(left + 1 / side) - low_X1.maximum(left)).clamp(min=0) * side).float()


def render_picture(view: View, side: int) -> Image.Image:
    """One view as an RGB picture of `side` × `side` pixels."""
    return to_picture(render([view], side)[0])


def to_picture(pixels: Tensor) -> Image.Image:
    """An RGB picture from float[3, H, W] in [0, 1] (values outside are clipped)."""
    array = pixels.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())


def coverage(things: Sequence[Thing], side: int, device: torch.device | str = "cpu") -> Tensor:
    """How much of each pixel every object covers: float[N, side, side] in [0, 1]."""
    grid = (torch.arange(side, device=device) + 0.5) / side
    numbers = [(t.x, t.y, t.radius, math.cos(t.rotation), math.sin(t.rotation)) for t in things]
    numbers_N5 = torch.tensor(numbers, device=device)
    covered_NHW = torch.empty(len(things), side, side, device=device)
    places: dict[Shape, list[int]] = {}
    for n, thing in enumerate(things):
        places.setdefault(thing.shape, []).append(n)
    for shape, some in places.items():
        index = torch.tensor(some, device=device)
        x, y, radius, cos, sin = numbers_N5[index].reshape(-1, 5, 1, 1).unbind(1)
        dx, dy = (grid - x) / radius, (grid[:, None] - y) / radius
        distance_NHW = _DISTANCES[shape](dx * cos + dy * sin, dy * cos - dx * sin) * (radius * side)
        covered_NHW[index] = (0.5 - distance_NHW).clamp(0, 1)
    return covered_NHW


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _wedge(x: Tensor, y: Tensor, tip: float, base: float, half: float = 1.0) -> Tensor:
    """An isosceles triangle with its tip at (0, tip) and its base, twice `half` wide, at y = base."""
    height = base - tip
    side = (height * x.abs() - half * (y - tip)) / math.hypot(height, half)
    return torch.maximum(y - base, side)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    width, height = Shape.DIAMOND.half_box
    return (height * x.abs() + width * y.abs() - width * height) / math.hypot(width, height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, one upwards: a pentagram is where at most one of its five lines has the point outside."""
    y = y - 0.105
    radius = 1.1
    line = radius * math.cos(2 * math.pi / 5)
    first = second = torch.full_like(x, -math.inf)
    for angle in (2 * math.pi * k / 5 for k in range(5)):
        outside = math.sin(angle) * x - math.cos(angle) * y - line
        first, second = first.maximum(outside), second.maximum(first.minimum(outside))
    return second


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs side by side, and the wedge that goes down from their centres and touches both."""
    x, y = x.abs() - 0.48, y + 0.35
    disc = torch.hypot(x, y) - 0.52
    slopes = torch.maximum((x + y) * math.sqrt(0.5) - 0.52, (x - y) * math.sqrt(0.5))
    wedge = torch.maximum(slopes, -y)
    return torch.minimum(disc, wedge)


_DISTANCES: dict[Shape, Distance] = {
    Shape.CIRCLE: lambda x, y: torch.hypot(x, y) - 1,
    Shape.SQUARE: lambda x, y: _box(x, y, *Shape.SQUARE.half_box),
    Shape.TRIANGLE: lambda x, y: _wedge(x, y, -0.87, 0.87),
    Shape.CROSS: lambda x, y: torch.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0)),
    Shape.STAR: _star,
    Shape.RING: lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.3,
    Shape.HEART: _heart,
    Shape.DIAMOND: _diamond,
    # a disc without a smaller one that reaches over its right side
    Shape.MOON: lambda x, y: torch.maximum(torch.hypot(x - 0.2, y) - 1, 0.8 - torch.hypot(x - 0.8, y)),
    Shape.ARROW: lambda x, y: torch.minimum(_wedge(x, y, -1.0, 0.0, 0.9), _box(x, y - 0.4, 0.34, 0.6)),
}
