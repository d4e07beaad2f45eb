"""Pictures and clips: from pixels to what the model is fed, from latents back, and drawing with both.

    condition   [clean frame … clean frame][ViT look] … [ViT look]     positions p … p+n-1, p+n … p+2n-1
    drawing     [noised frame … noised frame]                          positions p … p+n-1

as training has it: the frames of one group share a split, in full attention. Shapes: n frames, h·w latent
tokens of a frame, C channels of a token.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from PIL import Image
from torch import Tensor

from openbagel.config import BagelConfig, Sampling, to_json
from openbagel.images import patchify, to_picture, to_pixels, unpatchify
from openbagel.inference import events
from openbagel.inference.engine import Request
from openbagel.inference.image import Branches, denoise, draw_noise, frames_of
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Segment, Text, VaeImage, VitImage


class PictureCodec:
    """Pictures to segments and latents to pictures, for one model; what `TextCodec` is for texts."""

    def __init__(self, config: BagelConfig, autoencoder: AutoEncoder | None) -> None:
        self.config, self.autoencoder = config, autoencoder

    @torch.inference_mode()
    def decode(self, latents: Tensor, grid: tuple[int, int], *, tiled: bool = False) -> Image.Image:
        """The picture of latent tokens float[h·w, C]. ValueError when they, or what becomes of them, are not
        finite.
        """
        assert self.autoencoder is not None
        z_CHW = unpatchify(latents, grid, self.config.latent_patch_size)
        z_CHW = z_CHW.to(self.autoencoder.decoder.conv_in.weight)
        pixels_CHW = self.autoencoder.decode(z_CHW[None], tiled=tiled)[0]
        if not pixels_CHW.isfinite().all():
            dtype = str(pixels_CHW.dtype).removeprefix("torch.")
            raise ValueError(
                f"the picture's numbers overflowed ({dtype}); load the model in bfloat16 or float32"
            )
        return to_picture(pixels_CHW)

    @torch.inference_mode()
    def encode(self, pixels_CHW: Tensor, generator: torch.Generator, *, tiled: bool = False) -> VaeImage:
        """A clean picture split from float[3, H, W] in [-1, 1]; the posterior is sampled with CPU noise."""
        assert self.autoencoder is not None
        vae = self.autoencoder.config
        _, height, width = pixels_CHW.shape
        noise = torch.randn(
            1, vae.z_channels, height // vae.downsample, width // vae.downsample, generator=generator
        )
        pixels = pixels_CHW[None].to(self.autoencoder.encoder.conv_in.weight)
        z_CHW = self.autoencoder.encode(pixels, noise.to(pixels), tiled=tiled)[0].float()
        stride = self.config.latent_stride
        return VaeImage.clean(
            patchify(z_CHW, self.config.latent_patch_size), (height // stride, width // stride)
        )

    def look(self, picture: Image.Image) -> VitImage:
        """The picture as the ViT sees it."""
        if self.config.vit is None:
            raise ValueError("this model cannot look at pictures: it has no ViT")
        return VitImage(to_pixels(self.config.settings.vit_limits.resize(picture)))

    def condition(
        self, tokens: Iterable[Tensor], grid: tuple[int, int], pictures: Sequence[Image.Image]
    ) -> list[Segment]:
        """Clean latents float[h·w, C] of each frame as one split, then a look at each."""
        return [VaeImage(frames_of(tokens, grid)), *(self.look(picture) for picture in pictures)]

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The latent grid of a (height, width) in pixels; ValueError when it cannot be drawn."""
        if self.autoencoder is None or self.config.vae is None:
            raise ValueError(
                "this model cannot draw: its autoencoder (ae.safetensors) was not loaded or is missing"
            )
        pair = tuple(size) if isinstance(size, list | tuple) else ()
        if len(pair) != 2 or not all(isinstance(side, SupportsIndex) for side in pair):
            raise ValueError(f"size {size!r} must be (height, width) in pixels, such as (64, 64)")
        stride, most = self.config.latent_stride, self.config.max_latent_size * self.config.latent_stride
        if any(side < stride or side % stride or side > most for side in size):
            raise ValueError(
                f"a picture of {size[1]}x{size[0]} (width x height) is not possible; "
                f"both sides must be multiples of {stride}, from {stride} to {most}"
            )
        return size[0] // stride, size[1] // stride


@dataclass(frozen=True, slots=True, eq=False)
class Brush:
    """How one request draws; its generator gives the noise of one picture after the other."""

    codec: PictureCodec
    grid: tuple[int, int]
    sampling: Sampling
    generator: torch.Generator
    device: torch.device
    negative: Sequence[Text] = ()

    def draw(
        self, branches: Branches, frames: int = 1, *, thought: str | None = None
    ) -> Request[tuple[list[Image.Image], list[Tensor]]]:
        """Draws so many pictures together, at one time in full attention: the pictures and their latents."""
        channels = self.codec.config.latent_channels
        drawn = [draw_noise(self.grid, channels, self.generator) for _ in range(frames)]
        noise = torch.stack(drawn) if frames > 1 else drawn[0]
        if self.negative:
            branches = yield from branches.avoiding(self.negative)
        noise = noise.to(self.device)
        latents = yield from denoise(branches, noise, self.grid, self.sampling, self.generator)
        tokens = list(latents if frames > 1 else latents[None])
        pictures = [self.codec.decode(one, self.grid, tiled=self.sampling.tiled_vae) for one in tokens]
        settings, seed = json.dumps(to_json(self.sampling)), self.generator.initial_seed()
        for picture in pictures:
            picture.info = {"seed": seed, "settings": settings, "thought": thought}
            yield events.Picture(picture)
        return pictures, tokens

    def shown(self, pictures: Sequence[Image.Image]) -> list[Segment]:
        """What drawing sees of one picture, or of the frames of one clip, already within their limits."""
        tiled = self.sampling.tiled_vae
        images = [self.codec.encode(to_pixels(one), self.generator, tiled=tiled) for one in pictures]
        (grid,) = {frame.grid for image in images for frame in image.frames}
        return self.codec.condition([image.frames[0].tokens for image in images], grid, pictures)

    def kept(self, pictures: Sequence[Image.Image], tokens: Iterable[Tensor]) -> list[Segment]:
        """What was drawn, as the condition of what comes after it."""
        return self.codec.condition(tokens, self.grid, pictures)


def clips(
    parts: Iterable[str | Image.Image], size: tuple[int, int] | None = None
) -> list[str | list[Image.Image]]:
    """Neighbouring pictures as one clip, brought to a size (height, width) if one is given.

    ValueError when the pictures differ in size.
    """
    sizes = {f"{part.width}x{part.height}": None for part in parts if not isinstance(part, str)}
    if len(sizes) > 1:
        raise ValueError(f"the frames have different sizes ({', '.join(sizes)}); give them all one size")
    joined: list[str | list[Image.Image]] = []
    for part in parts:
        if isinstance(part, str):
            joined.append(part)
            continue
        frame = part if size is None else part.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        if joined and isinstance(joined[-1], list):
            joined[-1].append(frame)
        else:
            joined.append([frame])
    return joined
