"""Trains a small autoencoder on pictures of the toy world: absolute and squared error and a little KL.

The last steps train the decoder alone on latents with noise: what a model draws is never exact, and a decoder
that has seen such latents puts it right. Source: noise-augmented decoding, arXiv 2510.11690 §4.
"""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openbagel.config import VAEConfig
from openbagel.model.vae import AutoEncoder
from openbagel.train.trainer import Loop, Place, Training
from openbagel.world.render import render
from openbagel.world.scene import World


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderTraining:
    """How it is trained; seed of the weights, the pictures and the noise is that of `train`."""

    train: Training
    samples: int = 4
    kl_weight: float = 1e-4
    decoder_steps: int = 0
    decoder_noise: float = 0.6
    """The most noise of those steps, in deviations of the latents."""


class AutoencoderTrainer(Loop):
    model: AutoEncoder

    def __init__(self, config: VAEConfig, world: World, recipe: AutoencoderTraining, place: Place) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.train.seed)
            autoencoder = AutoEncoder(replace(config, scale=1.0, shift=0.0))
        _start_small(autoencoder)
        placed = autoencoder.to(place.ranks.device, memory_format=torch.channels_last)  # pyright: ignore
        super().__init__(placed, recipe.train, place)
        self.world, self.recipe = world, recipe

    @property
    def weights(self) -> dict[str, float]:
        return {"error": 1.0, "kl": self.recipe.kl_weight}

    def batches(self) -> list[Tensor]:
        return [self.pictures(self.step).contiguous(memory_format=torch.channels_last)]

    def counts(self, batch: Tensor) -> dict[str, float]:
        latents = batch.numel() // 3 // self.model.config.downsample**2 * self.model.config.z_channels
        cells = latents // self.model.config.z_channels
        seen = {"tokens": cells, "room": cells, "samples": len(batch), "flops": 0}
        return {"error": batch.numel(), "kl": latents, **seen}

    def sums(self, batch: Tensor) -> dict[str, Tensor]:
        decoder_alone = self.step >= self.training.steps - self.recipe.decoder_steps
        with torch.set_grad_enabled(not decoder_alone):
            moments = self.model.moments(batch)
            mean, log_variance = moments.chunk(2, dim=1)
            z = self.model.latents(moments, self._noise(mean, "posterior"))
        if decoder_alone:
            most = self.recipe.decoder_noise * z.std()
            share = torch.rand(len(z), 1, 1, 1, generator=self._generator("share")).to(z)
            z = z + most * share * self._noise(z, "decoder")
        difference = self.model.decode(z) - batch
        error = difference.abs().sum() + difference.square().sum()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return {"error": error, "kl": kl}

    def pictures(self, step: int) -> Tensor:
        """float[samples, 3, side, side] in [-1, 1], a function of the seed and the step alone."""
        rng = random.Random(f"autoencoder/{self.training.seed}/{step}")
        scenes = self.world.sample_scenes(rng, self.recipe.samples)
        return render(scenes, self.world.side, self.ranks.device) * 2 - 1

    def latent_statistics(self) -> tuple[float, float]:
        """(scale, shift) that bring sampled latents to mean 0 and variance 1, measured on fresh pictures."""
        pixels = torch.cat([self.pictures(-1 - i) for i in range(512 // self.recipe.samples)])
        with torch.no_grad():
            moments = self.model.moments(pixels)
            z = self.model.latents(moments, self._noise(moments.chunk(2, dim=1)[0], "statistics"))
        return round(1 / z.std().item(), 4), round(z.mean().item(), 4)

    def _noise(self, like: Tensor, purpose: str) -> Tensor:
        return torch.randn(like.shape, generator=self._generator(purpose)).to(like)

    def _generator(self, purpose: str) -> torch.Generator:
        seed = random.Random(f"{purpose}/{self.training.seed}/{self.step}").getrandbits(62)
        return torch.Generator().manual_seed(seed)


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
