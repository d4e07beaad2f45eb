"""`Bagel`: one loaded model and its verbs."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from PIL import Image

from openbagel.config import Sampling, to_json
from openbagel.flow import Guidance
from openbagel.images import open_picture, patchify, to_picture, to_pixels, unpatchify
from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Request, Row
from openbagel.inference.image import Branches, denoise, draw_noise
from openbagel.inference.text import split_thought, write
from openbagel.lora import load_adapter
from openbagel.sequence import Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from openbagel.weights import Checkpoint, load_checkpoint

NANO = Path(__file__).parents[1] / "assets" / "nano"
Part = str | Path | Image.Image
"""Something said or shown: a `str` is text, a path or a picture is shown."""
Listener = Callable[[events.Event], object]


class DrawOptions(TypedDict, total=False):
    """The keywords of `Bagel.generate`."""

    size: tuple[int, int] | None
    seed: int
    think: bool
    guidance: Guidance | None


class Answer(str):
    """An answer; `thought` is what came before it when the model was asked to think."""

    thought: str | None

    def __new__(cls, text: str, thought: str | None = None) -> "Answer":
        answer = super().__new__(cls, text)
        answer.thought = thought
        return answer


class Bagel:
    """Draws, answers, edits and chats. Holds weights only: every call owns its contexts and its random
    generator.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.codec = checkpoint.config, checkpoint.codec
        self.model, self.autoencoder = checkpoint.model, checkpoint.autoencoder
        self.engine = Engine(self.model, Packer(self.config, self.codec))
        self.listen: Listener = lambda event: None

    @classmethod
    def load(
        cls,
        model: str | Path = "nano",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        understanding_only: bool = False,
        settings: dict[str, Any] | None = None,
        lora: str | Path | None = None,
    ) -> "Bagel":
        """Loads "nano" (ships with the package), a folder, or a Hugging Face model id.

        device None: CUDA if there is one, else the CPU. dtype None: bfloat16 on CUDA cards that have it, else
        float32. understanding_only leaves the generation expert and the autoencoder on disk. lora is an
        adapter to bind, a folder or a Hugging Face id; `openbagel.lora.merge(bagel.model)` then merges it.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            fast = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if fast else torch.float32
        checkpoint = load_checkpoint(
            find_model(model),
            dtype=dtype,
            device=chosen,
            understanding_only=understanding_only,
            settings=settings,
        )
        if lora is not None:
            load_adapter(checkpoint.model, find_model(lora))
        return cls(checkpoint)

    def using(self, sampling: Sampling | None = None, *, listen: Listener | None = None) -> "Bagel":
        """The same model with other options for every verb, or with a listener that receives every event.

        An exception that the listener raises ends the request: that is how a caller cancels between steps or
        tokens.
        """
        other = copy.copy(self)
        if sampling is not None:
            settings = replace(self.config.settings, draw=sampling, edit=sampling, ask=sampling)
            other.config = replace(self.config, settings=settings)
        other.listen = listen or self.listen
        return other

    @overload
    def generate(self, prompt: str, **options: Unpack[DrawOptions]) -> Image.Image: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[DrawOptions]) -> list[Image.Image]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        think: bool = False,
        guidance: Guidance | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Draws a picture for a prompt, or one for each of several.

        size: (height, width) in pixels, multiples of the latent stride. Prompt number i is drawn with seed +
        i. think lets the model plan in words first (the plan is in `picture.info["thought"]`). guidance
        replaces the model's own.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        sampling = self._sampling("draw", guidance)
        requests = [
            self.draw_request([text], size=size, seed=seed + i, think=think, sampling=sampling)
            for i, text in enumerate(prompts)
        ]
        pictures = self.engine.drive_all(requests, lambda _, event: self.listen(event))
        return pictures[0] if isinstance(prompt, str) else pictures

    def edit(
        self,
        images: Part | Sequence[Part],
        instruction: str,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        think: bool = False,
        guidance: Guidance | None = None,
    ) -> Image.Image:
        """Draws what the instruction makes of one or several pictures; as large as the last of them unless
        size says.
        """
        parts = [*_pictures(images), instruction]
        if len(parts) == 1:
            raise ValueError("nothing to edit: give at least one picture")
        sampling = self._sampling("edit", guidance)
        request = self.draw_request(parts, size=size, seed=seed, think=think, sampling=sampling)
        return self.engine.drive(request, self.listen)

    def ask(
        self, images: Part | Sequence[Part], question: str, *, seed: int = 0, think: bool = False
    ) -> Answer:
        """Answers a question about one or several pictures (none: a plain text question)."""
        parts = [*_pictures(images), question]
        return self.engine.drive(self.write_request(parts, seed=seed, think=think), self.listen)

    def chat(
        self,
        parts: Sequence[Part],
        *,
        reply: Literal["auto", "text", "image"] = "auto",
        size: tuple[int, int] | None = None,
        seed: int = 0,
        think: bool = False,
    ) -> list[Answer | Image.Image]:
        """Continues a conversation of texts and pictures and returns what the model adds, in order.

        reply: "text" or "image" asks for one of them; "auto" lets the model decide, which only models trained
        to decide can (ValueError otherwise).
        """
        if reply == "auto":
            raise ValueError(
                "this model was not trained to decide between writing and drawing; "
                'pass reply="text" or reply="image"'
            )
        if reply not in ("text", "image") or not parts:
            raise ValueError(
                f'"{reply}" is none of auto, text and image' if parts else "nothing was said or shown"
            )
        request: Request[Answer] | Request[Image.Image]
        if reply == "text":
            request = self.write_request(parts, seed=seed, think=think)
        else:
            task = "edit" if any(not isinstance(part, str) for part in parts) else "draw"
            sampling = self._sampling(task, None)
            request = self.draw_request(parts, size=size, seed=seed, think=think, sampling=sampling)
        return [self.engine.drive(request, self.listen)]

    def write_request(self, parts: Sequence[Part], *, seed: int, think: bool) -> Request[Answer]:
        """A request that takes in parts and writes an answer."""
        sampling = self.config.settings.ask
        limits = self.config.settings.vae_limits  # looking resizes twice, as the official inferencer does
        heard: list[Segment] = [
            self._said(p) if isinstance(p, str) else self._vit(limits.resize(open_picture(p))) for p in parts
        ]
        generator = seeded(seed)

        def request() -> Request[Answer]:
            context = Context(self.config.llm)
            if think:
                heard.insert(0, self._said(THINK_BEFORE_ANSWERING))
            yield Forward((Row(context, tuple(heard), keep=True),))
            budget = sampling.max_tokens + (sampling.max_think_tokens if think else 0)
            ids = yield from write(
                context, self.codec, sampling=sampling, max_tokens=budget, generator=generator, thinking=think
            )
            thought, answer = (
                split_thought(self.codec.decode(ids)) if think else (None, self.codec.decode(ids))
            )
            yield events.Done()
            return Answer(answer, thought)

        return request()

    def draw_request(
        self,
        parts: Sequence[Part],
        *,
        size: tuple[int, int] | None,
        seed: int,
        think: bool,
        sampling: Sampling,
    ) -> Request[Image.Image]:
        """A request that takes in parts and draws a picture."""
        if self.autoencoder is None or self.config.vae is None:
            raise ValueError(
                "this model cannot draw: its autoencoder (ae.safetensors) was not loaded or is missing"
            )
        limits = self.config.settings.vae_limits
        shown = {
            i: limits.resize(open_picture(part)) for i, part in enumerate(parts) if not isinstance(part, str)
        }
        last = [(picture.height, picture.width) for picture in shown.values()][-1:]
        height, width = self._checked(size or (last[0] if last else self.config.settings.size))
        generator = seeded(seed)
        heard: list[list[Segment]] = [
            [self._said(p)] if isinstance(p, str) else self._shown(shown[i], generator, sampling.tiled_vae)
            for i, p in enumerate(parts)
        ]

        def request() -> Request[Image.Image]:
            thought = None
            branches = Branches.of(Context(self.config.llm))
            if think:
                yield from branches.hear([[self._said(THINK_BEFORE_DRAWING)]])
                branches.text = branches.cond.fork()
            yield from branches.hear(heard)
            if think:
                ids = yield from write(
                    branches.cond,
                    self.codec,
                    sampling=sampling,
                    max_tokens=sampling.max_think_tokens,
                    generator=generator,
                    thinking=True,
                )
                text = self.codec.decode(ids)
                thought = split_thought(text)[0] or text.strip()
            grid = (height // self.config.latent_stride, width // self.config.latent_stride)
            noise = draw_noise(grid, self.config.latent_channels, generator).to(self.engine.device)
            latents = yield from denoise(branches, noise, grid, sampling)
            picture = self.decode(latents, grid, tiled=sampling.tiled_vae)
            picture.info = {"seed": seed, "settings": json.dumps(to_json(sampling)), "thought": thought}
            yield events.Picture(picture)
            yield events.Done()
            return picture

        return request()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, grid: tuple[int, int], *, tiled: bool = False) -> Image.Image:
        """The picture of latent tokens float[h·w, C]."""
        assert self.autoencoder is not None
        z_CHW = unpatchify(latents, grid, self.config.latent_patch_size)
        return to_picture(
            self.autoencoder.decode(z_CHW[None].to(self.autoencoder.decoder.conv_in.weight), tiled=tiled)[0]
        )

    @torch.inference_mode()
    def encode(
        self, pixels_CHW: torch.Tensor, generator: torch.Generator, *, tiled: bool = False
    ) -> VaeImage:
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

    def _said(self, text: str) -> Text:
        return Text(self.codec.encode(text))

    def _vit(self, picture: Image.Image) -> VitImage:
        if self.config.vit is None:
            raise ValueError("this model cannot look at pictures: it has no ViT")
        return VitImage(to_pixels(self.config.settings.vit_limits.resize(picture)))

    def _shown(self, picture: Image.Image, generator: torch.Generator, tiled: bool) -> list[Segment]:
        """What drawing sees of a picture already within its limits: its latents, then the ViT."""
        return [self.encode(to_pixels(picture), generator, tiled=tiled), self._vit(picture)]

    def _sampling(self, task: Literal["draw", "edit"], guidance: Guidance | None) -> Sampling:
        sampling: Sampling = getattr(self.config.settings, task)
        return replace(sampling, guidance=guidance) if guidance else sampling

    def _checked(self, size: tuple[int, int]) -> tuple[int, int]:
        stride, most = self.config.latent_stride, self.config.max_latent_size * self.config.latent_stride
        if any(side < stride or side % stride or side > most for side in size):
            raise ValueError(
                f"a picture of {size[1]}x{size[0]} (width x height) is not possible; "
                f"both sides must be multiples of {stride}, from {stride} to {most}"
            )
        return size


def seeded(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must lie in [0, 2^63)")
    return torch.Generator().manual_seed(seed)


def find_model(model: str | Path) -> Path:
    """The folder of "nano", of a path, or of a Hugging Face id (downloaded into the usual cache)."""
    if str(model) == "nano":
        return NANO
    folder = Path(model)
    looks_like_id = isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_id:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{model} is neither a folder nor a model that could be downloaded ({error})"
        ) from None


def _pictures(images: Part | Sequence[Part]) -> list[Path | Image.Image]:
    several = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    return [Path(image) if isinstance(image, str) else image for image in several]
