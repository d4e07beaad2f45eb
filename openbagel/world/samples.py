"""The toy world as data sets: one for each kind of task, laid out as official data is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from openbagel.config import BagelConfig
from openbagel.data.samples import Draw, Look, Part, Picture, Role
from openbagel.images import to_picture
from openbagel.sequence import Text
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
    copies: int = 1
    """Noised copies of a target, each at its own time."""
    examples_per_kind: int = 20_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class WorldDataset:
    """Examples of one kind of task, none of which shows or names a held-out pair (a `Dataset`)."""

    kind: str
    world: World
    mixture: Mixture
    config: BagelConfig
    codec: TextCodec
    is_mandatory: bool = False

    @property
    def name(self) -> str:
        return f"world/{self.kind}"

    @property
    def weight(self) -> float:
        return self.mixture.kinds[self.kind]

    @property
    def blocks(self) -> Sequence[int]:
        return (self.mixture.examples_per_kind,)

    def where(self, row: int) -> str:
        return f"example {row} of {self.kind}"

    def parts(self, row: int, rng: random.Random) -> list[Part]:
        mixture, settings = self.mixture, self.config.settings
        made = example(self.world, mixture.seed, row, self.kind, think=rng.random() < mixture.think)
        drawing = made.target is not None

        def kept(dropout: float) -> bool:
            return not drawing or rng.random() >= dropout

        parts: list[Part] = []
        if made.thought is not None:
            parts.append(self._text(THINK_BEFORE_DRAWING if drawing else THINK_BEFORE_ANSWERING))
        for scene in made.pictures:
            picture = self._picture(scene)
            if drawing:
                shown = (picture,) if kept(mixture.vae_dropout) else ()
                parts.append(Draw(shown, settings.vae_limits, Role.CONDITION))
            parts.append(Look(picture if kept(mixture.vit_dropout) else None, settings.vit_limits))
        thought = "" if made.thought is None else thinking(made.thought)
        if kept(mixture.text_dropout):
            parts.append(self._text(made.prompt))
            if drawing and thought:
                parts.append(self._text(thought, loss=True))
        if made.target is None:
            return [*parts, self._text(thought + (made.answer or ""), loss=True)]
        target = (self._picture(made.target),)
        return [*parts, Draw(target, settings.vae_limits, Role.TARGET, copies=mixture.copies)]

    def _picture(self, scene: Scene) -> Picture:
        return Picture.of(to_picture(render([scene], self.world.side)[0] * 2 - 1))

    def _text(self, text: str, loss: bool = False) -> Text:
        return Text(self.codec.encode(text), loss)


def thinking(thought: str) -> str:
    return f"<think>{thought}</think>"


def world_codec(world: World, vocab_size: int = 512) -> TextCodec:
    """The world's own small vocabulary, think prompts included."""
    texts = [*corpus(world), *[THINK_BEFORE_DRAWING, THINK_BEFORE_ANSWERING, thinking("")] * 2000]
    return TextCodec.train(texts, vocab_size)
