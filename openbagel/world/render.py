"""Scenes to pictures: signed distance fields on a pixel grid, for many scenes at once, at any size.

Shape suffixes: B scenes, N objects of all scenes, H and W pixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from openbagel.world.scene import COLOUR_RGB, GROUND_RGB, HALF_BOX, Scene, Shape, Thing

Distance = Callable[[Tensor, Tensor], Tensor]
"""Signed distance (negative inside) at points x (right) and y (down), all in units of the object's radius."""


def render(scenes: Sequence[Scene], side: int, device: torch.device | str = "cpu") -> Tensor:
    """Pictures float[B, 3, side, side] in [0, 1] of `scenes`, with edges about one pixel wide."""
    grounds = (
        torch.tensor([GROUND_RGB[scene.ground] for scene in scenes], device=device).reshape(-1, 3, 1, 1) / 255
    )
    canvas_B3HW = grounds.repeat(1, 1, side, side)
    layers = max((len(scene.things) for scene in scenes), default=0)
    for layer in range(layers):
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) > layer]
        things = [scenes[i].things[layer] for i in rows]
        colours = torch.tensor([COLOUR_RGB[thing.colour] for thing in things], device=device) / 255
        alpha_N1HW = coverage(things, side, device)[:, None]
        index = torch.tensor(rows, device=device)
        below = canvas_B3HW[index]
        canvas_B3HW[index] = torch.lerp(below, colours.reshape(-1, 3, 1, 1).expand_as(below), alpha_N1HW)
    return canvas_B3HW


def render_picture(scene: Scene, side: int) -> Image.Image:
    """One scene as an RGB picture of `side` × `side` pixels."""
    return to_picture(render([scene], side)[0])


def to_picture(pixels: Tensor) -> Image.Image:
    """An RGB picture from float[3, H, W] in [0, 1] (values outside are clipped)."""
    array = pixels.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())


def coverage(things: Sequence[Thing], side: int, device: torch.device | str = "cpu") -> Tensor:
    """How much of each pixel every object covers: float[N, side, side] in [0, 1]."""
    grid = (torch.arange(side, device=device) + 0.5) / side
    covered_NHW = torch.empty(len(things), side, side, device=device)
    for shape in dict.fromkeys(thing.shape for thing in things):
        rows = [i for i, thing in enumerate(things) if thing.shape == shape]
        some = [things[i] for i in rows]
        numbers = torch.tensor(
            [(t.x, t.y, t.radius, math.cos(t.rotation), math.sin(t.rotation)) for t in some]
        )
        x, y, radius, cos, sin = numbers.to(device).reshape(-1, 5, 1, 1).unbind(1)
        dx, dy = (grid - x) / radius, (grid[:, None] - y) / radius
        distance_NHW = _DISTANCES[shape](dx * cos + dy * sin, dy * cos - dx * sin) * (radius * side)
        covered_NHW[torch.tensor(rows, device=device)] = (0.5 - distance_NHW).clamp(0, 1)
    return covered_NHW


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.3


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, *HALF_BOX[Shape.SQUARE])


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0))


def _wedge(x: Tensor, y: Tensor, tip: float, base: float) -> Tensor:
    """An isosceles triangle with its tip at (0, tip) and its base, 2 units wide, at y = base."""
    height = base - tip
    side = (height * x.abs() - (y - tip)) / math.hypot(height, 1.0)
    return torch.maximum(y - base, side)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _wedge(x, y, -0.87, 0.87)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    width, height = HALF_BOX[Shape.DIAMOND]
    return (height * x.abs() + width * y.abs() - width * height) / math.hypot(width, height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, one upwards: a pentagram is where at most one of its five lines has the point outside."""
    y = y - 0.105
    radius = 1.1
    line = radius * math.cos(2 * math.pi / 5)
    sides = torch.stack(
        [
            math.sin(angle) * x - math.cos(angle) * y - line
            for angle in (2 * math.pi * k / 5 for k in range(5))
        ]
    )
    return sides.topk(2, dim=0).values[1]


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs side by side, and the wedge that goes down from their centres and touches both."""
    x, y = x.abs() - 0.48, y + 0.35
    disc = torch.hypot(x, y) - 0.52
    slopes = torch.maximum((x + y) * math.sqrt(0.5) - 0.52, (x - y) * math.sqrt(0.5))
    wedge = torch.maximum(slopes, -y)
    return torch.minimum(disc, wedge)


_DISTANCES: dict[Shape, Distance] = {
    Shape.CIRCLE: _circle,
    Shape.SQUARE: _square,
    Shape.TRIANGLE: _triangle,
    Shape.CROSS: _cross,
    Shape.STAR: _star,
    Shape.RING: _ring,
    Shape.HEART: _heart,
    Shape.DIAMOND: _diamond,
}
