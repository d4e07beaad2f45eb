"""The four stages of the paper as presets: its Table 3, in the recipe's words.

Source: the paper's Table 3 and §2.3 (condition dropout); reference/training.md §2.1. K is 1024 tokens, as in
the official script's defaults. None stands where the table has a dash. Resolutions are (shortest, longest)
sides in pixels, ratios are shares of the samples drawn.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from openbagel.config import nearest


class Stage(StrEnum):
    """In the order in which they follow one another."""

    ALIGNMENT = "alignment"
    """The connector alone learns, from captions of 378x378 pictures; the decoder has no q and k norms yet."""
    PRETRAINING = "pretraining"
    CONTINUED = "continued"
    FINETUNING = "finetuning"


K = 1024
TABLE: dict[str, tuple[Any, ...]] = {
    "train.steps": (5_000, 200_000, 100_000, 15_000),
    "train.schedule.kind": ("cosine", "constant", "constant", "constant"),
    "train.schedule.lr": (1e-3, 1e-4, 1e-4, 2.5e-5),
    "train.schedule.warmup": (250, 2500, 2500, 500),
    "train.weight_decay": (0.0,) * 4,
    "train.max_grad_norm": (1.0,) * 4,
    "train.beta1": (0.9,) * 4,
    "train.beta2": (0.95,) * 4,
    "train.eps": (1e-15,) * 4,
    "train.ce_weight": (1.0, 0.25, 0.25, 0.25),
    "train.mse_weight": (1.0,) * 4,
    "train.ema": (None, 0.9999, 0.9999, 0.995),
    "train.timestep_shift": (1.0, 1.0, 4.0, 4.0),
    "train.visual_gen": (False, True, True, True),
    "train.visual_und": (True,) * 4,
    "train.freeze.llm": (True, False, False, False),
    "train.freeze.vit": (True, False, False, False),
    "data.packing.expected_num_tokens": (32 * K, 32 * K, 40 * K, 40 * K),
    "data.packing.max_num_tokens": (36 * K, 36 * K, 45 * K, 45 * K),
    "data.packing.max_num_tokens_per_sample": (16 * K, 16 * K, 40 * K, 40 * K),
    "data.dropout.text": (0.1,) * 4,
    "data.dropout.vit": (0.5,) * 4,
    "data.dropout.vae": (0.1,) * 4,
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
nothing to weigh: they are neutral in the first column.
"""


def stage(name: Stage | str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A stage's part of the recipe's tree, with changes laid over it; ValueError names the nearest stage."""
    names = [one.value for one in Stage]
    if name not in names:
        raise ValueError(f"unknown stage {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    column = names.index(name)
    return merged(nested({place: row[column] for place, row in TABLE.items()}), changes or {})


def nested(places: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} to {"a": {"b": 1}}; tuples become lists, as in JSON."""
    tree: dict[str, Any] = {}
    for place, value in places.items():
        *branches, leaf = place.split(".")
        branch = tree
        for key in branches:
            branch = branch.setdefault(key, {})
        branch[leaf] = list(value) if isinstance(value, tuple) else value
    return tree


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree: branches are joined, leaves of changes win."""
    shared = [key for key in base if isinstance(base[key], Mapping) and isinstance(changes.get(key), Mapping)]
    return {**base, **changes, **{key: merged(base[key], changes[key]) for key in shared}}
