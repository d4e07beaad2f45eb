"""A recipe: everything that decides a training run, as one tree of dataclasses read from YAML.

The resolved tree is written into the run's folder, and is itself a recipe that repeats the run. The stages of
the paper are presets: its Table 3 and §2.3 (condition dropout) in the recipe's words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openbagel.checks import check_choice, check_least, retold
from openbagel.config import from_json, read_yaml, to_json
from openbagel.data.loader import Reading
from openbagel.data.tasks import PAPER, SCRIPT, Dropout
from openbagel.lora import Adapter
from openbagel.pretrained import Parts
from openbagel.train.encoders import AutoencoderTraining, VisionTraining
from openbagel.train.guards import Guard
from openbagel.train.metrics import Track
from openbagel.train.optim import AdamW
from openbagel.train.parallel import Parallel
from openbagel.train.previews import Preview
from openbagel.train.trainer import Training
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

    def __post_init__(self) -> None:
        if self.weights is not None:
            check_choice("start.weights", self.weights, ("ema", "model"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """(shortest, longest) side in pixels of pictures to draw and to look at; None: as data or model say."""

    gen: tuple[int, int] | None = None
    und: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Data(Reading):
    """What is seen. mixture is an official YAML, plain data, or the content of such a file; world adds tasks
    of the toy world.
    """

    mixture: str | dict[str, Any] | None = None
    dataset_info: str | dict[str, Any] | None = None
    world: Mixture | None = None
    dropout: Dropout = SCRIPT
    resolution: Resolution = Resolution()
    ratios: dict[str, float] | None = None
    """Of kinds of data: text, t2i, i2t, interleaved_und, video, web; data sets of one kind share its own."""
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

    def __post_init__(self) -> None:
        check_least(self, overfit=0)
        if self.quantise_base and self.lora is None:
            raise ValueError("quantise_base freezes the base in 4 bits; add lora to train adapters")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A YAML or JSON file with `section.key=value` overrides; ValueError names unknown keys."""
    tree = read_yaml(path, "the recipe", "begin with `folder: runs/name`")
    places: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is no override; write key=value, for example train.steps=200")
        with retold(f"{override!r} is no override: the value is no YAML; quote it", yaml.YAMLError):
            places[key] = yaml.safe_load(value)
    return recipe_from(merged(tree, nested(places)), str(path))


def recipe_from(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """A tree with its stage's values laid under it."""
    if tree.get("stage") is not None:
        tree = merged(stage(tree["stage"]), tree)
    return from_json(Recipe, tree, where)


# the stages of the paper ------------------------------------------------------------------------------------


STAGES = ("alignment", "pretraining", "continued", "finetuning")
"""As they follow one another. In the first the connector alone learns, from captions of 378x378 pictures; the
decoder has no q and k norms yet.
"""
K = 1024
TABLE: dict[str, tuple[Any, ...]] = {
    **{f"train.{name}": (value,) * 4 for name, value in to_json(AdamW()).items()},
    **{f"data.dropout.{name}": (value,) * 4 for name, value in to_json(PAPER).items()},
    "train.max_grad_norm": (1.0,) * 4,
    "train.mse_weight": (1.0,) * 4,
    "train.steps": (5_000, 200_000, 100_000, 15_000),
    "train.schedule.kind": ("cosine", "constant", "constant", "constant"),
    "train.schedule.lr": (1e-3, 1e-4, 1e-4, 2.5e-5),
    "train.schedule.warmup": (250, 2500, 2500, 500),
    "train.ce_weight": (1.0, 0.25, 0.25, 0.25),
    "train.ema": (None, 0.9999, 0.9999, 0.995),
    "train.timestep_shift": (1.0, 1.0, 4.0, 4.0),
    "train.visual_gen": (False, True, True, True),
    "train.visual_und": (True,) * 4,
    "train.freeze.llm": (True, False, False, False),
    "train.freeze.vit": (True, False, False, False),
    "data.packing.expected_num_tokens": (32 * K, 32 * K, 40 * K, 40 * K),
    "data.packing.max_num_tokens": (36 * K, 36 * K, 45 * K, 45 * K),
    "data.packing.max_num_tokens_per_sample": (16 * K, 16 * K, 40 * K, 40 * K),
    "data.resolution.gen": (None, (256, 512), (512, 1024), (512, 1024)),
    "data.resolution.und": ((378, 378), (224, 980), (378, 980), (378, 980)),
    "data.ratios.text": (0.0, 0.05, 0.05, 0.05),
    "data.ratios.t2i": (0.0, 0.60, 0.40, 0.30),
    "data.ratios.i2t": (1.0, 0.10, 0.10, 0.05),
    "data.ratios.interleaved_und": (0.0, 0.10, 0.15, 0.20),
    "data.ratios.video": (0.0, 0.10, 0.15, 0.20),
    "data.ratios.web": (0.0, 0.05, 0.15, 0.20),
}
"""A place in the recipe, and its value in each stage. With captions alone the loss weights and the shift have
nothing to weigh: they are neutral in the first column. K is 1024 tokens, as in the official script's
defaults; None stands where the table has a dash.
"""


def stage(name: str) -> dict[str, Any]:
    """A stage's part of the recipe's tree; ValueError names the nearest stage."""
    check_choice("stage", name, STAGES)
    return nested({place: row[STAGES.index(name)] for place, row in TABLE.items()})


def nested(places: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} to {"a": {"b": 1}}; tuples become lists, as in JSON."""
    tree: dict[str, Any] = {}
    for place, value in places.items():
        *branches, leaf = place.split(".")
        branch = tree
        with retold(f"{place} lies below a key with a value; give one of them", TypeError, AttributeError):
            for key in branches:
                branch = branch.setdefault(key, {})
            branch[leaf] = list(value) if isinstance(value, tuple) else value
    return tree


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree: branches are joined, leaves of changes win."""
    shared = [key for key in base if isinstance(base[key], Mapping) and isinstance(changes.get(key), Mapping)]
    return {**base, **changes, **{key: merged(base[key], changes[key]) for key in shared}}
