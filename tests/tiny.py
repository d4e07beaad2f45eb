"""Small random models: the package's own classes, with numbers that a CPU runs in milliseconds."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from openbagel.config import (
    Activation,
    BagelConfig,
    Experts,
    LLMConfig,
    ModelSettings,
    Sampling,
    VAEConfig,
    ViTConfig,
)
from openbagel.flow import Guidance
from openbagel.images import ImageLimits
from openbagel.inference.pipeline import Bagel
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Frame, PackedSequence, Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec
from openbagel.weights import Checkpoint

M = TypeVar("M", bound=nn.Module)

LIMITS = ImageLimits(max_size=32, min_size=8, stride=4)
SAMPLING = Sampling(
    max_tokens=8,
    max_think_tokens=6,
    num_timesteps=4,
    guidance=Guidance(text=4.0, image=1.0, interval=(0.0, 1.0)),
)
VIT = ViTConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, patch_size=4
)
VAE = VAEConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, groups=4, scale=0.5, shift=0.1)
KINDS = ("text", "bare", "vit", "clean", "noised", "group", "learned group", "dropped vit", "dropped vae")
"""What `segments` makes: every kind of segment there is."""


@cache
def codec() -> TextCodec:
    return TextCodec.train(["a red circle above a blue square", "how many circles are there?"] * 2, 300)


@cache
def config(experts: Experts = Experts.MOT) -> BagelConfig:
    """64 wide, 2 layers; a latent token and a ViT patch are 4 pixels wide."""
    return BagelConfig(
        llm=LLMConfig(
            vocab_size=len(codec()),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            qk_norm=True,
        ),
        vit=VIT,
        vae=VAE,
        layer_module=experts,
        latent_patch_size=2,
        max_latent_size=8,
        vit_max_num_patch_per_side=8,
        connector_act=Activation.GELU_TANH,
        interpolate_pos=False,
        settings=ModelSettings(
            size=(8, 12),
            vae_limits=LIMITS,
            vit_limits=LIMITS,
            draw=SAMPLING,
            edit=replace(SAMPLING, guidance=Guidance(text=4.0, image=2.0, interval=(0.0, 1.0))),
            ask=SAMPLING,
            draws_by_itself=False,
        ),
    )


def randomised(module: M, seed: int = 0) -> M:
    """Draws every parameter anew, so that none is zero, one, or equal to its twin by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(float(name.endswith("weight")), 0.1, generator=generator)
    return module.eval()


@cache
def model(experts: Experts = Experts.MOT) -> BagelModel:
    """Shared by all tests: they must not change it."""
    with torch.inference_mode(False):
        return randomised(BagelModel(config(experts)))


@cache
def checkpoint(experts: Experts = Experts.MOT) -> Checkpoint:
    return Checkpoint(config(experts), model(experts), randomised(AutoEncoder(VAE), seed=1), codec())


def bagel(**settings: Any) -> Bagel:
    """A new `Bagel` around the shared weights; settings replace fields of the model's settings."""
    c = config()
    changed = replace(c, settings=replace(c.settings, **settings))
    return Bagel(replace(checkpoint(), config=changed))


def packer(experts: Experts = Experts.MOT) -> Packer:
    return Packer(config(experts), codec())


def in_order(pack: PackedSequence, x: Tensor) -> Tensor:
    """Rows of stored tokens, brought into the plain concatenation of the samples."""
    return x[torch.argsort(pack.logical)]


# random samples ---------------------------------------------------------------------------------------------


def segments(rng: random.Random, count: int, kinds: Sequence[str] = KINDS) -> list[Segment]:
    return [_segment(rng, rng.choice(kinds)) for _ in range(count)]


def _segment(rng: random.Random, kind: str) -> Segment:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def tokens(grid: tuple[int, int]) -> Tensor:
        return torch.randn(grid[0] * grid[1], config().latent_channels, generator=generator)

    grid = (rng.randint(1, 3), rng.randint(1, 3))
    match kind:
        case "text" | "bare":
            ids = tuple(rng.randrange(len(codec()) - 4) for _ in range(rng.randint(1, 6)))
            return Text(ids, loss=rng.random() < 0.5, bare=kind == "bare")
        case "vit":
            size = tuple(side * VIT.patch_size for side in grid)
            return VitImage(torch.rand(3, *size, generator=generator) * 2 - 1)
        case "clean":
            return VaeImage.clean(tokens(grid), grid)
        case "noised":
            return VaeImage.noised(tokens(grid), grid, rng.random(), target=tokens(grid))
        case "group" | "learned group":
            learned = kind == "learned group"
            frames = [
                Frame(tokens(grid), grid, tokens(grid) if learned else None, rng.randint(1, 4))
                for _ in range(rng.randint(1, 3))
            ]
            frames[-1] = replace(frames[-1], position_step=0)
            return VaeImage(tuple(frames), rng.random() if learned else 0.0)
        case "dropped vit":
            return VitImage(None)
        case _:
            return VaeImage(())


def samples(seed: int, most: int = 3) -> list[list[Segment]]:
    """Up to `most` random samples, some of them empty, at least one with tokens."""
    rng = random.Random(seed)
    drawn = [segments(rng, rng.randint(0, 6)) for _ in range(rng.randint(1, most))]
    return [*drawn, segments(rng, 1, ("text",))]
