"""Trains a small autoencoder on pictures of the toy world: absolute and squared error, a little KL, then
unit-variance latents.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openbagel.config import VAEConfig
from openbagel.model.vae import AutoEncoder
from openbagel.train.optim import learning_rate
from openbagel.world.render import render
from openbagel.world.scene import World


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderRecipe:
    steps: int = 12_000
    batch: int = 4
    lr: float = 8e-4
    kl_weight: float = 1e-4
    seed: int = 0
    max_minutes: float = 60.0
    """The run stops here whatever the step; run again to go on."""


def batch_of(world: World, recipe: AutoencoderRecipe, step: int) -> Tensor:
    """float[batch, 3, side, side] in [-1, 1], a function of the seed and the step alone."""
    rng = random.Random(f"autoencoder/{recipe.seed}/{step}")
    scenes = [world.sample_scene(rng, rng.randint(1, world.max_things)) for _ in range(recipe.batch)]
    return render(scenes, world.side) * 2 - 1


def train_autoencoder(
    config: VAEConfig,
    world: World,
    recipe: AutoencoderRecipe,
    *,
    folder: Path,
    report: Callable[[str], None] = print,
) -> AutoEncoder:
    """Trains until recipe.steps or the time is up; state lives in `folder`/state.pt, from which the next call
    goes on.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        autoencoder = AutoEncoder(replace(config, scale=1.0, shift=0.0)).to(memory_format=torch.channels_last)  # pyright: ignore
    _start_small(autoencoder)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    state, first = folder / "state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        autoencoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        first = saved["step"]
    started = time.monotonic()
    for step in range(first, recipe.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, peak=recipe.lr, warmup=200, total=recipe.steps, decay=recipe.steps
        )
        pixels = batch_of(world, recipe, step).contiguous(memory_format=torch.channels_last)
        moments = autoencoder.moments(pixels)
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        difference = autoencoder.decode(autoencoder.latents(moments, noise)) - pixels
        error = difference.abs().mean() + difference.square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (error + recipe.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 200 == 0:
            row = {
                "step": done,
                "error": error.item(),
                "kl": kl.item(),
                "minutes": (time.monotonic() - started) / 60,
            }
            report(json.dumps({k: round(v, 5) for k, v in row.items()}))
        if time.monotonic() - started > recipe.max_minutes * 60 or done % 2000 == 0 or done == recipe.steps:
            saved = {"model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(saved | {"generator": generator.get_state()}, state)
        if time.monotonic() - started > recipe.max_minutes * 60:
            break
    return autoencoder


def _start_small(autoencoder: AutoEncoder) -> None:
    """Residual branches and posterior noise near zero: else the first thousand steps learn no colours."""
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            if name.endswith(("conv2.weight", "proj_out.weight")):
                parameter.mul_(0.1)
            elif name.endswith(("conv2.bias", "proj_out.bias")):
                parameter.zero_()
        bias = autoencoder.encoder.conv_out.bias
        assert bias is not None
        bias[autoencoder.config.z_channels :] = -4.0


def latent_scale(autoencoder: AutoEncoder, world: World, recipe: AutoencoderRecipe) -> tuple[float, float]:
    """(scale, shift) that bring sampled latents to mean 0 and variance 1, measured on 512 fresh pictures."""
    pixels = torch.cat([batch_of(world, recipe, -1 - i) for i in range(512 // recipe.batch)])
    with torch.no_grad():
        moments = autoencoder.moments(pixels)
        z = autoencoder.latents(
            moments, torch.randn(moments.chunk(2, 1)[0].shape, generator=torch.Generator().manual_seed(0))
        )
    return 1 / z.std().item(), z.mean().item()
