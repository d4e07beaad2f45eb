"""The autoencoder against diffusers' `AutoencoderKL`, and pieces against the whole."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openbagel.config import VAEConfig
from openbagel.model.vae import OVERLAP, TILE, AutoEncoder, in_tiles
from tests import tiny

SMALL = VAEConfig(
    ch=16, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, groups=8, scale=0.3611, shift=0.1159
)
SIZES = [(32, 32), (16, 40), (56, 24)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffusers_twin(ours: AutoEncoder) -> torch.nn.Module:
    """The same weights in diffusers' own class, brought there by diffusers' own conversion."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config, levels = ours.config, len(ours.config.ch_mult)
    twin = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * m for m in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    twin.load_state_dict(convert_ldm_vae_checkpoint(dict(ours.state_dict()), twin.config), strict=True)
    return twin.eval()


@pytest.fixture(scope="module")
def ours() -> AutoEncoder:
    return tiny.randomised(AutoEncoder(SMALL), seed=3)


@pytest.fixture(scope="module")
def theirs(ours: AutoEncoder) -> torch.nn.Module:
    return diffusers_twin(ours)


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_moments_equal_diffusers(ours: AutoEncoder, theirs: torch.nn.Module, size: tuple[int, int]) -> None:
    pixels = draw(2, 3, *size).clamp(-1, 1)
    expected = theirs.encode(pixels).latent_dist.parameters  # pyright: ignore
    torch.testing.assert_close(ours.moments(pixels), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_pictures_equal_diffusers(ours: AutoEncoder, theirs: torch.nn.Module, size: tuple[int, int]) -> None:
    latents = draw(2, SMALL.z_channels, size[0] // 8, size[1] // 8)
    expected = theirs.decode(latents / SMALL.scale + SMALL.shift).sample  # pyright: ignore
    torch.testing.assert_close(ours.decode(latents), expected, rtol=2e-5, atol=2e-5)


@torch.inference_mode()
def test_latents_are_a_scaled_posterior_sample(ours: AutoEncoder) -> None:
    pixels, noise = draw(1, 3, 16, 16), draw(1, SMALL.z_channels, 2, 2, seed=1)
    mean, log_variance = ours.moments(pixels).chunk(2, dim=1)
    expected = 0.3611 * (mean + (log_variance / 2).exp() * noise - 0.1159)
    torch.testing.assert_close(ours.encode(pixels, noise), expected)


# tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(TILE, TILE), (TILE + 1, 5), (3 * TILE - OVERLAP, TILE + 30)])
def test_tiles_cover_every_cell(h: int, w: int) -> None:
    """Of a function without neighbours, tiles give the same: shrinking, growing, of whatever channels."""
    cells = draw(2, 3, h, w)
    torch.testing.assert_close(in_tiles(lambda x: x * 2, cells, 1, 1), cells * 2)
    grown = F.interpolate(cells, scale_factor=2.0)
    torch.testing.assert_close(in_tiles(lambda x: F.interpolate(x, scale_factor=2.0), cells, 1, 2), grown)
    torch.testing.assert_close(in_tiles(lambda x: F.avg_pool2d(x, 2), grown, 2, 1), cells)


def test_tiles_are_never_larger_than_promised() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(x.shape[-2:])
        return x

    in_tiles(run, draw(1, 1, 4 * TILE, TILE // 2), 1, 1)
    assert len(seen) > 4
    assert {tuple(shape) for shape in seen} == {(TILE, TILE // 2)}


@pytest.fixture(scope="module")
def smooth() -> AutoEncoder:
    """Close to a trained one: residual branches small, so that places far away matter little."""
    module = tiny.randomised(AutoEncoder(replace(tiny.VAE, ch=4, groups=1)), seed=5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".conv2." in name or ".proj_out." in name:
                parameter.mul_(0.05)
    return module


@torch.inference_mode()
def test_a_picture_in_tiles_resembles_the_whole(smooth: AutoEncoder) -> None:
    h, w = TILE + 24, TILE - 20
    latents = draw(1, smooth.config.z_channels, h, w)
    whole, tiled = smooth.decode(latents), smooth.decode(latents, tiled=True)
    assert not torch.equal(whole, tiled)
    assert (tiled - whole).norm() < 0.05 * whole.norm()
    noise = draw(*latents.shape, seed=1)
    whole, tiled = smooth.encode(whole, noise), smooth.encode(whole, noise, tiled=True)
    assert (tiled - whole).norm() < 0.05 * whole.norm()


@torch.inference_mode()
def test_a_picture_of_one_tile_is_exact(smooth: AutoEncoder) -> None:
    latents = draw(1, smooth.config.z_channels, 12, TILE)
    picture = smooth.decode(latents)
    assert torch.equal(smooth.decode(latents, tiled=True), picture)
    assert torch.equal(smooth.encode(picture, latents, tiled=True), smooth.encode(picture, latents))
