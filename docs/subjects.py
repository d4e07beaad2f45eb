"""What the figures show: a tiny model with random weights, its samples, and who saw what when they ran."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from openbagel.config import BagelConfig, Sampling, nano
from openbagel.flow import Guidance
from openbagel.images import to_pixels
from openbagel.inference.engine import Engine, Forward, Result
from openbagel.inference.pipeline import Bagel
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Frame, PackedSequence, Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec
from openbagel.weights import Checkpoint

INSTRUCTION = "make the circle green"
PROMPT = "a red circle"


def tiny_codec() -> TextCodec:
    return TextCodec.train([INSTRUCTION, PROMPT], 400)


def tiny_config(codec: TextCodec) -> BagelConfig:
    config = nano(len(codec))
    llm = replace(config.llm, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    return replace(config, llm=llm)


def toy_picture(side: int) -> Image.Image:
    picture = Image.new("RGB", (side, side), "#dfe9f1")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0.1 * side, 0.58 * side, 0.48 * side, 0.9 * side), "#3f6fb5")
    draw.circle((0.6 * side, 0.38 * side), 0.24 * side, "#d8493a")
    return picture


def edit_segments(config: BagelConfig, codec: TextCodec) -> list[Segment]:
    """A picture of 2x2 tokens, an instruction, and the edited picture as a noised target."""
    tokens = torch.zeros(4, config.latent_channels)
    return [
        VaeImage.clean(tokens, (2, 2)),
        VitImage(to_pixels(toy_picture(32))),
        Text(codec.encode(INSTRUCTION)),
        VaeImage.noised(tokens, (2, 2), 0.7, target=tokens),
    ]


def video_segments(config: BagelConfig, codec: TextCodec) -> list[list[Segment]]:
    """A sample of two frame groups, and one that goes on after a picture it has drawn."""
    tokens = torch.zeros(2, config.latent_channels)
    frame = Frame(tokens, (1, 2), tokens, position_step=1)
    words = codec.encode("a circle")
    video = [Text(words), VaeImage((frame, frame), t=0.8), VaeImage((frame,), t=0.5)]
    story = [
        Text(words),
        VaeImage.noised(tokens, (1, 2), 0.7, tokens),
        VaeImage.clean(tokens, (1, 2)),
        Text(words),
    ]
    return [video, story]


def tokens_through_modules(pack: PackedSequence, config: BagelConfig) -> Counter[str]:
    """How many tokens pass each named module, seen by hooks in one forward, read out and all."""
    model = BagelModel(config)
    model.initialise(torch.Generator().manual_seed(0))
    passed: Counter[str] = Counter()

    def hook(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
            passed[name] += len(inputs[0])

        return count

    for name, module in model.named_modules():
        module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        hidden = model(pack)
        model.logits(hidden[pack.text_places[pack.split[pack.text_places] == 2]])
        model.velocity(hidden[pack.num_und + pack.target_places])
    return passed


class Spy(Engine):
    """An engine that notes what every context has taken in, by lineage, and the rows of every step."""

    def __init__(self, model: BagelModel, packer: Packer) -> None:
        super().__init__(model, packer)
        self.taken: dict[object, tuple[Segment, ...]] = {"empty": ()}
        self.steps: list[list[Forward]] = []

    def step(self, forwards: Sequence[Forward]) -> list[tuple[Result, ...]]:
        rows = [row for forward in forwards for row in forward.rows]
        pasts = [self.taken[row.context.lineage] for row in rows]
        self.steps.append(list(forwards))
        results = super().step(forwards)
        for row, past in zip(rows, pasts, strict=True):
            if row.keep:
                self.taken[row.context.lineage] = (*past, *row.segments)
        return results


def spied_bagel() -> tuple[Bagel, Spy]:
    """A tiny model with random weights that draws in one guided step and thinks in five tokens."""
    codec = tiny_codec()
    config = tiny_config(codec)
    sampling = Sampling(
        num_timesteps=2, max_think_tokens=5, max_tokens=6, guidance=Guidance(text=4.0, image=2.0)
    )
    settings = replace(config.settings, size=(32, 32), draw=sampling, edit=sampling, ask=sampling)
    config = replace(config, settings=settings)
    assert config.vae is not None
    model, autoencoder = BagelModel(config), AutoEncoder(config.vae)
    model.initialise(torch.Generator().manual_seed(0))
    bagel = Bagel(Checkpoint(config, model, autoencoder, codec))
    spy = Spy(model, bagel.engine.packer)
    bagel.engine = spy
    return bagel, spy
