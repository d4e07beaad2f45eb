"""A recipe: everything that decides a training run, as one tree of dataclasses read from YAML.

The resolved tree is written into the run's folder, and is itself a recipe that repeats the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openbagel.config import from_json
from openbagel.data.packing import Packing
from openbagel.data.tasks import Dropout
from openbagel.lora import Adapter
from openbagel.pretrained import Parts
from openbagel.train import presets
from openbagel.train.autoencoder import AutoencoderTraining
from openbagel.train.guards import Guard
from openbagel.train.metrics import Track
from openbagel.train.parallel import Parallel
from openbagel.train.previews import Preview
from openbagel.train.trainer import Training
from openbagel.train.vision import VisionTraining
from openbagel.world.samples import Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the weights come from: a checkpoint, published parts, or nothing at all, which makes a nano."""

    checkpoint: str | None = None
    """"nano", a folder in the official layout, or a Hugging Face model id."""
    weights: str | None = None
    """"ema" or "model": which of a folder's two; None takes the averaged ones if they are there."""
    state: bool = False
    """Also the optimiser and the place in the data: the official `resume_from`. Only a run's own folder has
    them, so it must be the run that goes on by itself."""
    facts: str | None = None
    """The folder with configuration, tokenizer and autoencoder, if not the checkpoint's; without a checkpoint
    its ViT is taken too, and the rest of the weights are random.
    """
    settings: dict[str, Any] = field(default_factory=dict)
    """Overrides of config.json; for random weights of any architecture number, such as {llm: {hidden_size:
    128}}.
    """
    parts: Parts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """(shortest, longest) side in pixels of pictures to draw and to look at; None: as data or model say."""

    gen: tuple[int, int] | None = None
    und: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is seen. mixture is an official YAML, plain data, or the content of such a file; world adds tasks
    of the toy world.
    """

    mixture: str | dict[str, Any] | None = None
    dataset_info: str | dict[str, Any] | None = None
    world: Mixture | None = None
    dropout: Dropout = Dropout(0.1, 0.3, 0.3)
    resolution: Resolution = Resolution()
    ratios: dict[str, float] | None = None
    """Of kinds of data: text, t2i, i2t, interleaved_und, video, web; data sets of one kind share its own."""
    packing: Packing = Packing()
    workers: int = 0
    prefetch_factor: int = 2
    timeout: float = 0.0
    max_bad: float = 0.01
    seed: int = 42
    latent_cache: str | None = None
    """A folder in which latents of pictures are kept, for repeated epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run."""

    folder: str
    checkpoints: str | None = None
    """Default: `checkpoints` in the folder."""
    stage: str | None = None
    """A stage of the paper, whose values stand where the recipe has none: alignment, pretraining, …"""
    autoencoder: AutoencoderTraining | None = None
    """Trained first, on the toy world, when the run starts from nothing."""
    vision: VisionTraining | None = None
    """Of the ViT, trained next then."""
    start: Origin = Origin()
    data: Data = Data()
    train: Training = Training()
    lora: Adapter | None = None
    """Train adapters instead of the weights."""
    quantise_base: bool = False
    """QLoRA: the decoder's own weights in 4 bits (NF4) while adapters learn; one process, extra `quant`."""
    parallel: Parallel = Parallel()
    guard: Guard = Guard()
    preview: Preview = Preview()
    track: Track = Track()
    overfit: int = 0
    """A self-test instead of a run: so many steps on the first pack, whose losses must fall below half."""


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A YAML or JSON file with `section.key=value` overrides; ValueError names unknown keys."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path} ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"the recipe {path} is no mapping; begin with `folder: runs/name`")
    places: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is no override; write key=value, for example train.steps=200")
        places[key] = yaml.safe_load(value)
    return recipe_from(presets.merged(tree, presets.nested(places)), str(path))


def recipe_from(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """A tree with its stage's values laid under it."""
    if tree.get("stage") is not None:
        tree = presets.stage(tree["stage"], tree)
    recipe = from_json(Recipe, tree, where)
    if recipe.quantise_base and recipe.lora is None:
        raise ValueError(f"{where}: quantise_base freezes the base in 4 bits; add lora to train adapters")
    return recipe
