"""The FLUX autoencoder: pictures to latents and back. Its parameters live apart, in `ae.safetensors`.

Shapes: B pictures, H, W pixels; Z latent channels; h = H / downsample, w = W / downsample.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.config import VAEConfig

TILE = 64
"""Side of a tile in latent cells when a large picture is decoded or encoded in pieces."""
OVERLAP = 16


class ResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(residual)))


class AttentionBlock(nn.Module):
    """Single-head attention over all places of a feature map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # rows in one piece each, as the kernels that never hold the whole matrix want them
        q, k, v = (
            conv(normed).flatten(2).transpose(1, 2).contiguous()[:, None] for conv in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(out.reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, in either direction; the outermost level does not resample."""

    def __init__(self, widths: list[int], groups: int, resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(a, b, groups) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        if resample is not None:
            self.add_module(*resample)
        self.resample = resample[0] if resample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.get_submodule(self.resample)(x) if self.resample else x


class Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = AttentionBlock(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Level(
                [inner] + [outer] * config.num_res_blocks,
                config.groups,
                None if index == last else ("downsample", Downsample(outer)),
            )
            for index, (inner, outer) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True))
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList(
            Level(
                [inner] + [outer] * (config.num_res_blocks + 1),
                config.groups,
                None if index == 0 else ("upsample", Upsample(outer)),
            )
            for index, (inner, outer) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.groups, config.ch * config.ch_mult[0], eps=1e-6)
        self.conv_out = nn.Conv2d(config.ch * config.ch_mult[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Encodes to the latents that the model sees, scale·(z - shift), and decodes them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, pixels_BCHW: Tensor) -> Tensor:
        """float[B, 2Z, h, w]: mean and log-variance of the posterior, of float[B, 3, H, W] in [-1, 1]."""
        return self.encoder(pixels_BCHW)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A posterior sample, scaled and shifted: float[B, Z, h, w]; noise is standard normal."""
        mean, log_variance = moments.chunk(2, dim=1)
        sample = mean + torch.exp(0.5 * log_variance) * noise
        return self.config.scale * (sample - self.config.shift)

    def encode(self, pixels_BCHW: Tensor, noise: Tensor, tiled: bool = False) -> Tensor:
        """float[B, 3, H, W] in [-1, 1] to latents float[B, Z, h, w]; H, W must be multiples of the
        downsampling.

        tiled bounds the memory of large pictures: overlapping pieces are encoded apart and blended
        (approximate).
        """
        moments = (
            in_tiles(self.moments, pixels_BCHW, self.config.downsample, 1)
            if tiled
            else self.moments(pixels_BCHW)
        )
        return self.latents(moments, noise)

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """float[B, Z, h, w] to float[B, 3, H, W], about [-1, 1], not clamped; tiled as in `encode`."""
        z = latents / self.config.scale + self.config.shift
        return in_tiles(self.decoder, z, 1, self.config.downsample) if tiled else self.decoder(z)


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, cell_in: int, cell_out: int) -> Tensor:
    """Runs overlapping tiles of x apart and blends them linearly; a cell is cell_in values wide before,
    cell_out after.
    """
    h, w = x.shape[-2] // cell_in, x.shape[-1] // cell_in
    if h <= TILE and w <= TILE:
        return run(x)
    total: Tensor | None = None
    weights = torch.zeros(h * cell_out, w * cell_out, device=x.device)
    for top in _tile_starts(h):
        for left in _tile_starts(w):
            bottom, right = min(top + TILE, h), min(left + TILE, w)
            y = run(x[..., top * cell_in : bottom * cell_in, left * cell_in : right * cell_in])
            ramps = [_ramp(size, OVERLAP * cell_out, x.device) for size in y.shape[-2:]]
            weight = ramps[0][:, None] * ramps[1]
            if total is None:
                total = y.new_zeros(*y.shape[:2], *weights.shape)
            area = (..., slice(top * cell_out, bottom * cell_out), slice(left * cell_out, right * cell_out))
            total[area] += y * weight
            weights[area] += weight
    assert total is not None
    return total / weights


def _tile_starts(cells: int) -> list[int]:
    if cells <= TILE:
        return [0]
    return [*range(0, cells - TILE, TILE - OVERLAP), cells - TILE]


def _ramp(size: int, overlap: int, device: torch.device) -> Tensor:
    """Blending weights along one side: rising over the overlap, flat, falling; never zero."""
    distance = torch.arange(size, device=device).float() + 1
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap) / overlap
