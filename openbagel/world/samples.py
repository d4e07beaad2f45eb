"""Examples of the toy world as segments: what a model is trained on, and what it is asked at inference."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openbagel.config import BagelConfig
from openbagel.flow import interpolate, shifted, velocity_target
from openbagel.images import patchify
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Segment, Text, VaeImage, VitImage
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, TextCodec
from openbagel.world.render import render
from openbagel.world.scene import Scene, World
from openbagel.world.tasks import Example, corpus, example


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
    examples_per_kind: int = 20_000
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LatentCache:
    """Posterior moments of pictures, encoded when first wanted and kept on disk (float16)."""

    autoencoder: AutoEncoder
    folder: Path
    size: int
    arrays: dict[str, np.memmap] = field(default_factory=dict)

    def moments(self, name: str, wanted: Sequence[tuple[int, Scene]], side: int) -> Tensor:
        """float32[n, 2Z, h, w] of numbered scenes of one name."""
        array = self._array(name, side)
        missing = {i: scene for i, scene in wanted if np.isnan(array[i, 0, 0, 0])}
        if missing:
            with torch.no_grad():
                encoded = self.autoencoder.moments(render(list(missing.values()), side) * 2 - 1)
            array[list(missing)] = encoded.numpy().astype(np.float16)
        return torch.from_numpy(array[[i for i, _ in wanted]].astype(np.float32))

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
        self.config, self.codec, self.world, self.mixture, self.latents = (
            config,
            codec,
            world,
            mixture,
            latents,
        )

    def samples(self, pack: int, count: int) -> list[list[Segment]]:
        """`count` samples, none of which shows or names a held-out pair."""
        rng = random.Random(f"{self.mixture.seed}/pack/{pack}")
        kinds = rng.choices(list(self.mixture.kinds), weights=list(self.mixture.kinds.values()), k=count)
        chosen = [(kind, rng.randrange(self.mixture.examples_per_kind)) for kind in kinds]
        made = [
            example(self.world, self.mixture.seed, index, kind, think=rng.random() < self.mixture.think)
            for kind, index in chosen
        ]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        pixels = self._pixels(made)
        before = self._tokens(
            "before", chosen, [m.pictures[0] if m.target and m.pictures else None for m in made], generator
        )
        after = self._tokens("after", chosen, [m.target for m in made], generator)
        return [
            self._segments(m, rng, (p, b, a), generator)
            for m, p, b, a in zip(made, pixels, before, after, strict=True)
        ]

    def _pixels(self, made: list[Example]) -> list[Tensor | None]:
        rendered = iter(render([m.pictures[0] for m in made if m.pictures], self.world.side) * 2 - 1)
        return [next(rendered) if m.pictures else None for m in made]

    def _tokens(
        self, role: str, chosen: list[tuple[str, int]], scenes: list[Scene | None], generator: torch.Generator
    ) -> list[Tensor | None]:
        """Latent tokens float[h·w, C] of each scene, sampled from its cached posterior."""
        tokens: list[Tensor | None] = [None] * len(chosen)
        for kind in {kind for kind, _ in chosen}:
            places = [i for i, (k, _) in enumerate(chosen) if k == kind and scenes[i] is not None]
            if not places:
                continue
            wanted = [(chosen[i][1], scene) for i in places if (scene := scenes[i]) is not None]
            moments = self.latents.moments(f"{kind}-{role}", wanted, self.world.side)
            noise = torch.randn(moments.chunk(2, 1)[0].shape, generator=generator)
            for i, z in zip(places, self.latents.autoencoder.latents(moments, noise), strict=True):
                tokens[i] = patchify(z, self.config.latent_patch_size)
        return tokens

    def _segments(
        self,
        made: Example,
        rng: random.Random,
        pictures: tuple[Tensor | None, Tensor | None, Tensor | None],
        generator: torch.Generator,
    ) -> list[Segment]:
        pixels, before, after = pictures
        side = self.world.side // self.config.latent_stride
        grid = (side, side)
        mixture, drawing = self.mixture, after is not None

        def kept(dropout: float) -> bool:
            return not drawing or rng.random() >= dropout

        segments: list[Segment] = []
        if made.thought is not None:
            segments.append(self._text(THINK_BEFORE_DRAWING if drawing else THINK_BEFORE_ANSWERING))
        if before is not None:
            segments.append(VaeImage.clean(before, grid) if kept(mixture.vae_dropout) else VaeImage(()))
        if pixels is not None:
            segments.append(VitImage(pixels if kept(mixture.vit_dropout) else None))
        if kept(mixture.text_dropout):
            segments.append(self._text(made.prompt))
            if drawing and made.thought is not None:
                segments.append(self._text(thinking(made.thought), loss=True))
        if after is None:
            thought = "" if made.thought is None else thinking(made.thought)
            segments.append(self._text(thought + (made.answer or ""), loss=True))
            return segments
        t = shifted(torch.randn((), generator=generator).sigmoid(), mixture.timestep_shift).item()
        noise = torch.randn(after.shape, generator=generator)
        target = velocity_target(after, noise)
        return [*segments, VaeImage.noised(interpolate(after, noise, t), grid, t, target)]

    def _text(self, text: str, loss: bool = False) -> Text:
        return Text(self.codec.encode(text), loss)


def thinking(thought: str) -> str:
    return f"<think>{thought}</think>"


def world_codec(world: World, vocab_size: int = 512) -> TextCodec:
    """The world's own small vocabulary, think prompts included."""
    texts = [*corpus(world), *[THINK_BEFORE_DRAWING, THINK_BEFORE_ANSWERING, thinking("")] * 2000]
    return TextCodec.train(texts, vocab_size)
