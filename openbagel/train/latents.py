"""Decoded samples to segments: pictures through the autoencoder, then times and noise.

All randomness is a sample's own (posterior, times, noise), so a sample is the same in any pack, on any rank.
Shapes: Z latent channels, h·w latent cells.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openbagel.checks import spared
from openbagel.config import BagelConfig
from openbagel.data.samples import Pixels, Role, Sample
from openbagel.flow import interpolate, shifted, velocity_target
from openbagel.images import patchify
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Frame, Segment, VaeImage

ENCODED_TOGETHER = 16
"""Pictures of one size that go through the autoencoder at once."""


class LatentCache:
    """Posterior means and variances on disk (float16), found by the pixels and the autoencoder's weights: a
    folder per autoencoder, so that other weights never find these latents. A file that cannot be read, or was
    cut short, counts as absent.
    """

    def __init__(self, folder: str | Path, autoencoder: AutoEncoder) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in autoencoder.encoder.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.folder = Path(folder) / digest.hexdigest()

    def get(self, pixels: Tensor) -> Tensor | None:
        """Moments float32[2Z, h, w], or None."""
        with suppress(OSError, ValueError, EOFError):
            return torch.from_numpy(np.load(self._path(pixels)).astype(np.float32))

    def put(self, pixels: Tensor, moments: Tensor) -> Tensor:
        """The moments as `get` will give them."""
        path, rounded = self._path(pixels), moments.to("cpu", torch.float16)
        with spared("latents are not kept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_suffix(f".{os.getpid()}.tmp")
            with written.open("wb") as file:
                np.save(file, rounded.numpy())
            written.replace(path)
        return rounded.float()

    def _path(self, pixels: Tensor) -> Path:
        content = repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.npy"


@dataclass(frozen=True, slots=True, eq=False)
class LatentEncoder:
    """Makes segments of samples. The autoencoder is frozen and works in its own dtype and device."""

    autoencoder: AutoEncoder | None
    config: BagelConfig
    seed: int
    timestep_shift: float = 1.0
    cache: LatentCache | None = None

    def segments(self, samples: Sequence[Sample]) -> list[list[Segment]]:
        """One list for each sample, on the CPU. ValueError for pictures to draw without an autoencoder."""
        drawn = [part for sample in samples for part in sample.parts if isinstance(part, Pixels)]
        moments = self._moments([frame for part in drawn for frame in part.frames])
        return [list(self._sample(sample, moments)) for sample in samples]

    def _moments(self, frames: list[Tensor]) -> Iterator[Tensor]:
        """float32[2Z, h, w] of each frame, in order; pictures of one size are encoded together, but alone for
        the cache: a batch of another size rounds differently, and its size would depend on what is cached.
        """
        if frames and self.autoencoder is None:
            remedy = "add ae.safetensors to its folder, or leave those data sets out"
            raise ValueError(f"the data has pictures to draw and the model has no autoencoder; {remedy}")
        found = [self.cache.get(frame) if self.cache else None for frame in frames]
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for index, known in enumerate(found):
            if known is None:
                by_size[frames[index].shape].append(index)
        together = 1 if self.cache else ENCODED_TOGETHER
        for indexes in by_size.values():
            for first in range(0, len(indexes), together):
                group = indexes[first : first + together]
                for index, moments in zip(group, self._encode([frames[i] for i in group]), strict=True):
                    found[index] = self.cache.put(frames[index], moments) if self.cache else moments
        return iter([moments for moments in found if moments is not None])

    @torch.no_grad()
    def _encode(self, frames: list[Tensor]) -> Tensor:
        assert self.autoencoder is not None
        weight = self.autoencoder.encoder.conv_in.weight
        pixels = torch.stack(frames).to(weight.device, weight.dtype)
        return self.autoencoder.moments(pixels).float().cpu()

    def _sample(self, sample: Sample, moments: Iterator[Tensor]) -> Iterator[Segment]:
        generator = sample.id.generator(self.seed, "noise")
        for part in sample.parts:
            if not isinstance(part, Pixels):
                yield part
            else:
                frames = [self._latents(next(moments), generator) for _ in part.frames]
                yield from self._images(part, frames, generator)

    def _latents(self, moments: Tensor, generator: torch.Generator) -> Frame:
        assert self.autoencoder is not None
        noise = torch.randn(moments.chunk(2)[0].shape, generator=generator)
        z_CHW = self.autoencoder.latents(moments[None], noise[None])[0]
        patch = self.config.latent_patch_size
        grid = (z_CHW.shape[1] // patch, z_CHW.shape[2] // patch)
        return Frame(patchify(z_CHW, patch), grid)

    def _images(self, part: Pixels, frames: list[Frame], generator: torch.Generator) -> Iterator[VaeImage]:
        steps = [part.position_step] * (len(frames) - 1) + [0]
        frames = [replace(frame, position_step=step) for frame, step in zip(frames, steps, strict=False)]
        if part.role is Role.CONDITION:
            yield VaeImage(tuple(frames))
            return
        # shifted logit-normal times, one from each of `copies` equal parts of the distribution
        shares = (torch.arange(part.copies) + torch.rand(part.copies, generator=generator)) / part.copies
        for t in shifted(torch.special.ndtri(shares).sigmoid(), self.timestep_shift).tolist():
            noised = tuple(_noised(frame, t, generator) for frame in frames)
            yield VaeImage(noised, t, hidden=part.role is Role.TARGET)


def _noised(frame: Frame, t: float, generator: torch.Generator) -> Frame:
    noise = torch.randn(frame.tokens.shape, generator=generator)
    target = velocity_target(frame.tokens, noise)
    return replace(frame, tokens=interpolate(frame.tokens, noise, t), target=target)
