"""Examples of the toy world as segments: what a model is trained on, and what it is asked at inference."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openbagel.config import BagelConfig
from openbagel.flow import interpolate, shifted, velocity_target
from openbagel.images import patchify
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Frame, Segment, Text, VaeImage, VitImage
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, TextCodec
from openbagel.world.render import render
from openbagel.world.scene import Scene, World
from openbagel.world.tasks import corpus, example


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Which examples a run sees: weights per kind, the share that thinks first, and how often conditions are
    dropped.
    """

    kinds: dict[str, float]
    think: float = 0.1
    text_dropout: float = 0.1
    vit_dropout: float = 0.3
    vae_dropout: float = 0.1
    timestep_shift: float = 1.0
    copies: int = 1
    """Noised copies of a target, each at its own time: hidden splits share their context for free."""
    examples_per_kind: int = 20_000
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LatentCache:
    """Posterior moments of pictures, encoded when first wanted and kept on disk (float16)."""

    autoencoder: AutoEncoder
    folder: Path
    size: int
    arrays: dict[str, np.memmap] = field(default_factory=dict)

    def moments(self, name: str, index: int, scene: Scene, side: int) -> Tensor:
        """float32[2Z, h, w] of scene number `index` of that name."""
        array = self._array(name, side)
        if np.isnan(array[index, 0, 0, 0]):
            with torch.no_grad():
                encoded = self.autoencoder.moments(render([scene], side) * 2 - 1)
            array[index] = encoded[0].numpy().astype(np.float16)
        return torch.from_numpy(array[index].astype(np.float32))

    def _array(self, name: str, side: int) -> np.memmap:
        if name not in self.arrays:
            config = self.autoencoder.config
            cells = side // config.downsample
            shape = (self.size, 2 * config.z_channels, cells, cells)
            path = self.folder / f"{name}.f16"
            fresh = not path.is_file()
            self.folder.mkdir(parents=True, exist_ok=True)
            array = np.memmap(path, np.float16, "w+" if fresh else "r+", shape=shape)
            if fresh:
                array[:, 0, 0, 0] = np.nan
            self.arrays[name] = array
        return self.arrays[name]


class Teacher:
    """Draws training samples: pack number n is a function of the mixture's seed and n alone."""

    def __init__(
        self, config: BagelConfig, codec: TextCodec, *, world: World, mixture: Mixture, latents: LatentCache
    ) -> None:
        self.config, self.codec, self.world = config, codec, world
        self.mixture, self.latents = mixture, latents

    def samples(self, pack: int, count: int) -> list[list[Segment]]:
        """`count` samples, none of which shows or names a held-out pair."""
        rng = random.Random(f"{self.mixture.seed}/pack/{pack}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        kinds = rng.choices(list(self.mixture.kinds), weights=list(self.mixture.kinds.values()), k=count)
        return [self._sample(kind, rng, generator) for kind in kinds]

    def _sample(self, kind: str, rng: random.Random, generator: torch.Generator) -> list[Segment]:
        mixture, index = self.mixture, rng.randrange(self.mixture.examples_per_kind)
        made = example(self.world, mixture.seed, index, kind, think=rng.random() < mixture.think)
        drawing = made.target is not None

        def kept(dropout: float) -> bool:
            return not drawing or rng.random() >= dropout

        segments: list[Segment] = []
        if made.thought is not None:
            segments.append(self._text(THINK_BEFORE_DRAWING if drawing else THINK_BEFORE_ANSWERING))
        for scene in made.pictures:
            if drawing:
                seen = self._clean(f"{kind}-before", index, scene, generator)
                segments.append(seen if kept(mixture.vae_dropout) else VaeImage(()))
            pixels = render([scene], self.world.side)[0] * 2 - 1
            segments.append(VitImage(pixels if kept(mixture.vit_dropout) else None))
        thought = "" if made.thought is None else thinking(made.thought)
        if kept(mixture.text_dropout):
            segments.append(self._text(made.prompt))
            if drawing and thought:
                segments.append(self._text(thought, loss=True))
        if made.target is None:
            return [*segments, self._text(thought + (made.answer or ""), loss=True)]
        after = self._clean(f"{kind}-after", index, made.target, generator).frames[0]
        return segments + [self._noised(after, t, generator) for t in self._times(generator)]

    def _clean(self, name: str, index: int, scene: Scene, generator: torch.Generator) -> VaeImage:
        """A picture split of latents sampled from the cached posterior."""
        moments = self.latents.moments(name, index, scene, self.world.side)[None]
        noise = torch.randn(moments.chunk(2, 1)[0].shape, generator=generator)
        z_CHW = self.latents.autoencoder.latents(moments, noise)[0]
        cells = self.world.side // self.config.latent_stride
        return VaeImage.clean(patchify(z_CHW, self.config.latent_patch_size), (cells, cells))

    def _noised(self, clean: Frame, t: float, generator: torch.Generator) -> VaeImage:
        noise = torch.randn(clean.tokens.shape, generator=generator)
        target = velocity_target(clean.tokens, noise)
        return VaeImage.noised(interpolate(clean.tokens, noise, t), clean.grid, t, target)

    def _times(self, generator: torch.Generator) -> list[float]:
        """Shifted logit-normal times, one from each of `copies` equal parts of the distribution."""
        copies = self.mixture.copies
        parts = (torch.arange(copies) + torch.rand(copies, generator=generator)) / copies
        return shifted(torch.special.ndtri(parts).sigmoid(), self.mixture.timestep_shift).tolist()

    def _text(self, text: str, loss: bool = False) -> Text:
        return Text(self.codec.encode(text), loss)


def thinking(thought: str) -> str:
    return f"<think>{thought}</think>"


def world_codec(world: World, vocab_size: int = 512) -> TextCodec:
    """The world's own small vocabulary, think prompts included."""
    texts = [*corpus(world), *[THINK_BEFORE_DRAWING, THINK_BEFORE_ANSWERING, thinking("")] * 2000]
    return TextCodec.train(texts, vocab_size)
