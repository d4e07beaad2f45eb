"""A BAGEL with random weights, as wide and deep as asked: what the cost benchmarks and the cost tests run."""

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openbagel.config import BagelConfig, nano
from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Read, Row
from openbagel.inference.image import draw_noise
from openbagel.model.bagel import BagelModel
from openbagel.sequence import Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec

HEAD_WIDTH = 32
QUERIES_PER_KEY = 4


def random_config(vocab_size: int, width: int, layers: int) -> BagelConfig:
    """The nano model in another size, with pictures of up to 64x64 latent tokens (1024x1024 pixels)."""
    config = nano(vocab_size)
    heads = max(1, width // HEAD_WIDTH)
    llm = replace(
        config.llm,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // QUERIES_PER_KEY),
    )
    return replace(config, llm=llm, max_latent_size=64)


@dataclass(frozen=True, slots=True, eq=False)
class Rig:
    """A random model with its engine, and the segments and contexts to feed it."""

    config: BagelConfig
    engine: Engine

    @classmethod
    def of(cls, width: int, layers: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Rig":
        codec = TextCodec.train(["a red circle above a blue square"], 300)
        config = random_config(len(codec), width, layers)
        with torch.device(device):
            model = BagelModel(config).to(dtype).eval()
        if device != "meta":
            model.initialise(torch.Generator(device).manual_seed(0))
            torch.nn.init.normal_(model.llm2vae.weight, std=0.05, generator=_seeded(device))
        return cls(config, Engine(model, Packer(config, codec)))

    def text(self, tokens: int) -> Text:
        """A text of exactly so many tokens, markers included."""
        return Text(tuple(i % 200 for i in range(tokens - 2)))

    def shown(self, side: int) -> tuple[Segment, ...]:
        """An input picture of side x side latent tokens, as an edit sees it: clean latents, then the ViT."""
        pixels = side * self.config.latent_stride
        return VaeImage.clean(self.noise(side), (side, side)), VitImage(torch.zeros(3, pixels, pixels))

    def noise(self, side: int) -> Tensor:
        noise = draw_noise((side, side), self.config.latent_channels, torch.Generator().manual_seed(side))
        return noise.to(self.engine.device)

    def context(self, tokens: int, spare: int = 0) -> Context:
        """A context that holds a text of so many tokens, with storage reserved for spare more."""
        context = Context(self.config.llm)
        context.reserve(tokens + spare)
        self.read(context, self.text(tokens))
        return context

    def read(self, context: Context, *segments: Segment) -> None:
        self.engine.step([Forward((Row(context, segments, keep=True),))])

    def write(self, *contexts: Context) -> None:
        """Decodes one more token of every context, in one pack."""
        token = Text((7,), bare=True)
        rows = tuple(Row(context, (token,), keep=True, read=Read.LOGITS) for context in contexts)
        self.engine.step([Forward(rows)])

    def denoise_once(self, side: int, *contexts: Context) -> None:
        """One denoising pass over a picture of side x side latent tokens per context, in one pack."""
        picture = VaeImage.noised(self.noise(side), (side, side), 0.5)
        rows = tuple(Row(context, (picture,), read=Read.VELOCITY) for context in contexts)
        self.engine.step([Forward(rows)])


def _seeded(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all cost benchmarks share."""
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each measurement; the least counts")


def numbers(text: str) -> list[int]:
    """An option such as 16,64,256."""
    return [int(item) for item in text.split(",")]
