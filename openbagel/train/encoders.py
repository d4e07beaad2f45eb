"""Trains on the toy world what nano has in place of FLUX's autoencoder and of SigLIP's pre-training.

The autoencoder learns absolute and squared error and a little KL. Its last steps train the decoder alone on
latents with noise: what a model draws is never exact, and a decoder that has seen such latents puts it right.
Source: noise-augmented decoding, arXiv 2510.11690 §4.

It sees pictures of every kind of exercise: one that knew stills alone spoiled two of three solids.

The ViT learns to see: from a patch's features a linear head tells whether an object's centre lies there,
which object it is, where in the picture, and what the ground is. The decoder adds positions of its own, but
features outgrow them.

Shapes: V patches of all pictures, D width of the ViT.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.config import VAEConfig
from openbagel.images import grid_position_ids, patchify
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.train.trainer import Loop, Place, Training
from openbagel.world.render import render
from openbagel.world.scene import Scene, View, World
from openbagel.world.tasks import sample_views


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderTraining:
    """How it is trained; seed of the weights, the pictures and the noise is that of `train`."""

    train: Training
    samples: int = 4
    kl_weight: float = 1e-4
    decoder_steps: int = 0
    decoder_noise: float = 0.6
    """The most noise of those steps, in deviations of the latents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTraining:
    """How it is trained; seed of the head and of the pictures is that of `train`."""

    train: Training
    samples: int = 64


class EncoderTrainer(Loop):
    """Learns from fresh pictures in each step, a function of the seed and the step alone."""

    name: str

    def __init__(self, make: Callable[[], nn.Module], world: World, recipe: Any, place: Place) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.train.seed)
            made = make()
        placed = made.to(place.ranks.device, memory_format=torch.channels_last)  # pyright: ignore
        super().__init__(placed, recipe.train, place)
        self.world, self.recipe = world, recipe

    def finish(self) -> None:
        """Runs to the last step; ValueError when it was stopped before."""
        self.run()
        if (step := self.step) < (steps := self.training.steps):
            raise ValueError(f"the {self.name} stopped at step {step} of {steps}; run again to go on")

    def chance(self, step: int) -> random.Random:
        """What decides which pictures a step shows."""
        return random.Random(f"{self.name}/{self.training.seed}/{step}")

    def rendered(self, views: Sequence[View]) -> Tensor:
        """float[views, 3, side, side] in [-1, 1]."""
        return render(views, self.world.side, self.ranks.device) * 2 - 1


# the autoencoder --------------------------------------------------------------------------------------------


class AutoencoderTrainer(EncoderTrainer):
    model: AutoEncoder
    name = "autoencoder"

    def __init__(self, config: VAEConfig, world: World, recipe: AutoencoderTraining, place: Place) -> None:
        super().__init__(lambda: _started(replace(config, scale=1.0, shift=0.0)), world, recipe, place)
        self.weights = {"error": 1.0, "kl": recipe.kl_weight}

    def batches(self) -> list[Tensor]:
        return [self.pixels(self.step).contiguous(memory_format=torch.channels_last)]

    def pixels(self, step: int) -> Tensor:
        """Pictures of every kind of exercise, turned and cut objects and solids among them."""
        return self.rendered(sample_views(self.world, self.chance(step), self.recipe.samples))

    def counts(self, batch: Tensor) -> dict[str, float]:
        cells = batch.numel() // 3 // self.model.config.downsample**2
        seen = {"tokens": cells, "room": cells, "samples": len(batch), "flops": 0}
        return {"error": batch.numel(), "kl": cells * self.model.config.z_channels, **seen}

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

    def latent_statistics(self) -> tuple[float, float]:
        """(scale, shift) that bring sampled latents to mean 0 and variance 1, measured on fresh pictures."""
        pixels = torch.cat([self.pixels(-1 - i) for i in range(512 // self.recipe.samples)])
        with torch.no_grad():
            moments = self.model.moments(pixels)
            z = self.model.latents(moments, self._noise(moments.chunk(2, dim=1)[0], "statistics"))
        return round(1 / z.std().item(), 4), round(z.mean().item(), 4)

    def _noise(self, like: Tensor, purpose: str) -> Tensor:
        return torch.randn(like.shape, generator=self._generator(purpose)).to(like)

    def _generator(self, purpose: str) -> torch.Generator:
        seed = random.Random(f"{purpose}/{self.training.seed}/{self.step}").getrandbits(62)
        return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _started(config: VAEConfig) -> AutoEncoder:
    """Residual branches and posterior noise near zero: else the first thousand steps learn no colours."""
    autoencoder = AutoEncoder(config)
    for name, parameter in autoencoder.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            parameter.mul_(0.1)
        elif name.endswith(("conv2.bias", "proj_out.bias")):
            parameter.zero_()
    autoencoder.encoder.conv_out.get_parameter("bias")[config.z_channels :] = -4.0
    return autoencoder


# the ViT ----------------------------------------------------------------------------------------------------


class Seeing(nn.Module):
    """A ViT and the head that is thrown away afterwards."""

    def __init__(self, model: BagelModel, world: World) -> None:
        super().__init__()
        assert model.config.vit
        self.vit = model.vit_model
        facts = (world.shapes, world.colours, world.sizes, world.grounds)
        self.widths = [1, 2, *map(len, facts)]
        self.head = nn.Linear(model.config.vit.hidden_size, sum(self.widths))

    def forward(self, patches: Tensor, ids: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """For each patch: whether there is a centre (a logit), where, shape, colour, size, ground."""
        return self.head(self.vit(patches, ids, counts)).split(self.widths, dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """A batch of patches with what they show; `things` are rows (patch, shape, colour, size) of objects."""

    patches: Tensor
    ids: Tensor
    counts: tuple[int, ...]
    things: Tensor
    places: Tensor
    """float[objects, 2]: each centre in the picture, from 0 to 1."""
    grounds: Tensor


class VisionTrainer(EncoderTrainer):
    model: Seeing
    name = "vision"

    def __init__(self, model: BagelModel, world: World, recipe: VisionTraining, place: Place) -> None:
        super().__init__(lambda: Seeing(model, world), world, recipe, place)
        assert model.config.vit
        self.patch, self.side = model.config.vit.patch_size, model.config.vit_max_num_patch_per_side
        self.grid = world.side // self.patch
        self.weights = {"found": 4.0, "placed": 160.0, "named": 1.0, "ground": 0.3}

    def batches(self) -> list[Pictures]:
        return [self.pictures(self.step)]

    def counts(self, batch: Pictures) -> dict[str, float]:
        patches, things = len(batch.patches), len(batch.things)
        seen = {"tokens": patches, "room": patches, "samples": len(batch.counts), "flops": 0}
        return {"found": patches, "placed": things, "named": things, "ground": patches, **seen}

    def sums(self, batch: Pictures) -> dict[str, Tensor]:
        found, placed, *named, ground = self.model(batch.patches, batch.ids, batch.counts)
        at, *truth = batch.things.unbind(1)
        centres = torch.zeros_like(found).index_fill(0, at, 1.0)
        names = [F.cross_entropy(n[at], t, reduction="sum") for n, t in zip(named, truth, strict=True)]
        return {
            "found": F.binary_cross_entropy_with_logits(found, centres, reduction="sum"),
            "placed": (placed[at].sigmoid() - batch.places).square().sum(),
            "named": torch.stack(names).sum(),
            "ground": F.cross_entropy(ground, batch.grounds, reduction="sum"),
        }

    def pictures(self, step: int) -> Pictures:
        scenes = self.world.sample_scenes(self.chance(step), self.recipe.samples)
        images = self.rendered(scenes)
        (things, places), device = self._truth(scenes), images.device
        grounds = torch.tensor([self.world.grounds.index(scene.ground) for scene in scenes])
        ids = grid_position_ids((self.grid, self.grid), self.side, False)
        return Pictures(
            patches=torch.cat([patchify(image, self.patch) for image in images]),
            ids=ids.repeat(len(scenes)).to(device),
            counts=(self.grid**2,) * len(scenes),
            things=torch.tensor(things, dtype=torch.int64, device=device),
            places=torch.tensor(places, device=device),
            grounds=grounds.repeat_interleave(self.grid**2).to(device),
        )

    def _truth(self, scenes: list[Scene]) -> tuple[list[list[int]], list[list[float]]]:
        """Of two centres in one patch the upper object's counts."""
        world, things, places = self.world, {}, {}
        for number, scene in enumerate(scenes):
            for thing in scene.things:
                column, row = (min(int(c * self.grid), self.grid - 1) for c in (thing.x, thing.y))
                patch = (number * self.grid + row) * self.grid + column
                names = (world.shapes.index(thing.shape), world.colours.index(thing.colour))
                things[patch] = [patch, *names, world.sizes.index(thing.size)]
                places[patch] = [thing.x, thing.y]
        return list(things.values()), list(places.values())
