"""The toy world as data sets: one for each kind of exercise, its rows read by the ordinary data tasks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from openbagel.checks import check_choice, check_least
from openbagel.config import BagelConfig
from openbagel.data.samples import Part
from openbagel.data.tasks import TASKS as DATA_TASKS
from openbagel.data.tasks import Dropout, TaskSetting
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, TextCodec
from openbagel.world import rows
from openbagel.world.scene import WORLDS, World
from openbagel.world.tasks import TASKS, corpus, example


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Which examples a run sees: weights per kind, the share that thinks first, and how often conditions are
    dropped.
    """

    kinds: dict[str, float]
    think: float = 0.1
    think_kinds: float = 0.5
    """The same for the kinds think_…, whose prompts are hard without."""
    ends: float = 0.0
    """How often a drawing or an edit is a page that the model ends itself; with marker loss it learns to."""
    text_dropout: float = 0.1
    vit_dropout: float = 0.3
    vae_dropout: float = 0.1
    copies: int = 1
    """Noised copies of a target, each at its own time."""
    group_decay: float = 0.3
    """Frames to draw are cut into n groups with a weight of group_decay^(n - 1)."""
    film_window: int | None = None
    """A group is learned after so many frames, None: after all before it; see `TaskSetting.window`."""
    examples_per_kind: int = 20_000
    seed: int = 0
    world: str = "nano"

    def __post_init__(self) -> None:
        check_least(self, film_window=1)
        world_named(self.world)
        for kind in self.kinds:
            check_choice("kinds: kind", kind, TASKS)


def world_named(name: str) -> World:
    """ValueError when there is none of this name."""
    check_choice("world", name, WORLDS)
    return WORLDS[name]()


@dataclass(frozen=True, slots=True)
class WorldDataset:
    """Examples of one kind, none of which shows or names what is held out (a `Dataset`).

    They are made anew whenever they are asked for; nothing is kept.
    """

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
        made = example(self.world, mixture.seed, row, self.kind)
        share = mixture.think_kinds if self.kind.startswith("think_") else mixture.think
        task, fields = rows.row(made, self.world.side, thinks=rng.random() < share)
        if task in ("t2i_pretrain", "unified_edit") and mixture.ends and rng.random() < mixture.ends:
            task, fields = "web_interleaved", rows.page(made.steps, self.world.side)
        setting = TaskSetting(
            codec=self.codec,
            vae=settings.vae_limits,
            vit=settings.vit_limits if self.config.vit else None,
            dropout=Dropout(mixture.text_dropout, mixture.vit_dropout, mixture.vae_dropout),
            rng=rng,
            copies=mixture.copies,
            group_decay=mixture.group_decay,
            window=mixture.film_window,
        )
        return DATA_TASKS[task](fields, setting)


def world_codec(world: World, vocab_size: int = 512) -> TextCodec:
    """The world's own small vocabulary, think prompts included."""
    prompts = [THINK_BEFORE_DRAWING, THINK_BEFORE_ANSWERING, "<think></think>"]
    return TextCodec.train([*corpus(world), *prompts * 2000], vocab_size)
