"""Pictures as tensors: the resize rule, pixels, patches, position ids and the 2-D position table.

Shapes: H, W pixels; h, w patches; C channels of a pixel; p pixels of a patch side; D width of the model.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Sizes a picture may have once resized: both sides multiples of stride, in pixels."""

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024
    square: bool = False
    """Both sides become max_size, whatever the picture's shape, as the paper's alignment stage has it."""

    def fit(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """(width, height) after resizing; the area limit is shared by num_images. Source:
        reference/transforms.py.

        The area correction multiplies the sides by a ratio of areas, as the reference does and the weights
        saw.
        """
        if self.square:
            return self._scaled((1, 1), self.max_size)
        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        size = self._scaled((width, height), scale)
        budget = self.max_pixels / num_images
        if size[0] * size[1] > budget:
            size = self._scaled(size, budget / (size[0] * size[1]))
        if max(size) > self.max_size:
            size = self._scaled(size, self.max_size / max(size))
        return size

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        stride = self.stride
        width, height = (max(stride, round(round(side * scale) / stride) * stride) for side in size)
        return width, height

    def resize(self, picture: Image.Image, num_images: int = 1) -> Image.Image:
        size = self.fit(*picture.size, num_images)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def to_pixels(picture: Image.Image) -> Tensor:
    """float32[3, H, W] in [-1, 1]."""
    return normalised(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))


def normalised(pixels: Tensor) -> Tensor:
    """uint8[H, W, 3] to float32[3, H, W] in [-1, 1]."""
    return (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def to_picture(pixels: Tensor) -> Image.Image:
    """float[3, H, W] in [-1, 1] to a picture; values are clamped and truncated, as the reference does."""
    scaled = (pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(scaled.permute(1, 2, 0).to("cpu", torch.uint8).numpy())


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """float[C, H, W] to float[h·w, p·p·C], patches row by row, inside a patch (row, column, channel)."""
    channels, height, width = image_CHW.shape
    h, w = height // patch, width // patch
    tiles = image_CHW.reshape(channels, h, patch, w, patch).permute(1, 3, 2, 4, 0)
    return tiles.reshape(h * w, patch * patch * channels)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of patchify: float[h·w, p·p·C] to float[C, h·p, w·p]."""
    h, w = grid
    tiles = tokens.reshape(h, w, patch, patch, -1).permute(4, 0, 2, 1, 3)
    return tiles.reshape(-1, h * patch, w * patch)


def grid_position_ids(grid: tuple[int, int], side: int, stretch: bool) -> Tensor:
    """int64[h·w]: the row of a side·side position table that each patch reads.

    stretch=False indexes row·side + column and needs h, w <= side (ValueError otherwise); stretch=True
    spreads the grid over the whole table (`interpolate_pos` of the reference), in float32 as the reference
    computes it.
    """
    h, w = grid
    if stretch:
        edges = torch.arange(1 / side, 1.0, 1 / side)
        places = (torch.arange(0, 1 - 1e-6, 1 / count) for count in (h, w))
        rows, columns = (torch.bucketize(place, edges, right=True) for place in places)
    elif max(h, w) > side:
        table = f"{side}x{side} position table"
        raise ValueError(f"a grid of {h}x{w} patches does not fit the {table}; use a smaller picture")
    else:
        rows, columns = torch.arange(h), torch.arange(w)
    return (rows[:, None] * side + columns).flatten()


def sincos_table(side: int, width: int) -> Tensor:
    """float32[side·side, D]: the first half of D encodes the column, the second the row; each half is [sin |
    cos].

    Angles are position / 10000^(i / (D/4)). Computed in float64, rounded once.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    encoded = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = encoded.repeat(side, 1)
    rows = encoded.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
