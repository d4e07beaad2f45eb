"""Trains a small autoencoder on pictures of the toy world: absolute and squared error and a little KL."""

import random
from dataclasses import replace

import torch
from torch import Tensor

from openbagel.config import VAEConfig
from openbagel.model.vae import AutoEncoder
from openbagel.train.trainer import Loop, TrainRecipe
from openbagel.world.render import render
from openbagel.world.scene import World


class AutoencoderTrainer(Loop):
    model: AutoEncoder

    def __init__(self, config: VAEConfig, world: World, recipe: TrainRecipe) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            autoencoder = AutoEncoder(replace(config, scale=1.0, shift=0.0))
        _start_small(autoencoder)
        super().__init__(autoencoder.to(memory_format=torch.channels_last), recipe)  # pyright: ignore
        self.world = world

    def losses(self) -> dict[str, Tensor]:
        pixels = self.pictures(self.step).contiguous(memory_format=torch.channels_last)
        moments = self.model.moments(pixels)
        mean, log_variance = moments.chunk(2, dim=1)
        difference = self.model.decode(self.model.latents(moments, self._noise(mean, self.step))) - pixels
        error = difference.abs().mean() + difference.square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": error + self.recipe.kl_weight * kl, "error": error, "kl": kl}

    def pictures(self, step: int) -> Tensor:
        """float[samples, 3, side, side] in [-1, 1], a function of the seed and the step alone."""
        rng = random.Random(f"autoencoder/{self.recipe.seed}/{step}")
        counts = [rng.randint(1, self.world.max_things) for _ in range(self.recipe.samples)]
        return render([self.world.sample_scene(rng, count) for count in counts], self.world.side) * 2 - 1

    def latent_statistics(self) -> tuple[float, float]:
        """(scale, shift) that bring sampled latents to mean 0 and variance 1, measured on fresh pictures."""
        pixels = torch.cat([self.pictures(-1 - i) for i in range(512 // self.recipe.samples)])
        with torch.no_grad():
            moments = self.model.moments(pixels)
            z = self.model.latents(moments, self._noise(moments.chunk(2, dim=1)[0], -1))
        return round(1 / z.std().item(), 4), round(z.mean().item(), 4)

    def _noise(self, like: Tensor, step: int) -> Tensor:
        seed = random.Random(f"noise/{self.recipe.seed}/{step}").getrandbits(62)
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


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
