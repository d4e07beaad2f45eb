"""The stages against Table 3 of the paper, number by number, and how they are changed."""

from dataclasses import replace
from typing import Any

import pytest

from openbagel.config import to_json
from openbagel.data.tasks import PAPER
from openbagel.train.recipe import STAGES, K, merged, nested, recipe_from, stage

# as printed; – is a dash
TABLE_3 = """
train.schedule.lr            1e-3      1e-4      1e-4      2.5e-5
train.schedule.kind          cosine    constant  constant  constant
train.weight_decay     0         0         0         0
train.max_grad_norm          1.0       1.0       1.0       1.0
train.beta1            .9        .9        .9        .9
train.beta2            .95       .95       .95       .95
train.eps              1e-15     1e-15     1e-15     1e-15
train.ce_weight              –         0.25      0.25      0.25
train.mse_weight             –         1         1         1
train.schedule.warmup        250       2500      2500      500
train.steps                  5K        200K      100K      15K
train.ema                    –         0.9999    0.9999    0.995
packing.expected             32k       32k       40k       40k
packing.max                  36k       36k       45k       45k
packing.per_sample           16k       16k       40k       40k
data.resolution.gen          –         256,512   512,1024  512,1024
data.resolution.und          378,378   224,980   378,980   378,980
train.timestep_shift         –         1.0       4.0       4.0
data.ratios.text             0         .05       .05       .05
data.ratios.t2i              0         .60       .40       .30
data.ratios.i2t              1.0       .10       .10       .05
data.ratios.interleaved_und  0         .10       .15       .20
data.ratios.video            0         .10       .15       .20
data.ratios.web              0         .05       .15       .20
"""
NEUTRAL = {"train.ce_weight": 1.0, "train.mse_weight": 1.0, "train.timestep_shift": 1.0}
NAMES = {
    "packing.expected": "data.packing.expected_num_tokens",
    "packing.max": "data.packing.max_num_tokens",
    "packing.per_sample": "data.packing.max_num_tokens_per_sample",
}


def number(text: str) -> Any:
    if "," in text:
        return [int(side) for side in text.split(",")]
    if text.endswith("k"):  # tokens
        return int(text[:-1]) * 1024
    if text.endswith("K"):  # steps
        return int(text[:-1]) * 1000
    return text if text.isalpha() else float(text)


def at(tree: dict[str, Any], place: str) -> Any:
    for key in place.split("."):
        tree = tree[key]
    return tree


ROWS = [line.split() for line in TABLE_3.strip().split("\n")]


@pytest.mark.parametrize(
    ("place", "column", "printed"),
    [(row[0], column, printed) for row in ROWS for column, printed in enumerate(row[1:])],
)
def test_table_3(place: str, column: int, printed: str) -> None:
    value = at(stage(STAGES[column]), NAMES.get(place, place))
    assert value == (NEUTRAL.get(place) if printed == "–" else number(printed))


def test_the_scripts_token_counts_are_the_papers() -> None:
    packing = stage("pretraining")["data"]["packing"]
    assert (packing["expected_num_tokens"], packing["max_num_tokens"]) == (32768, 36864) == (32 * K, 36 * K)
    assert packing["max_num_tokens_per_sample"] == 16384


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_a_recipe(name: str) -> None:
    recipe = recipe_from({"folder": "runs/x", "stage": name, "train": {"steps": 7}})
    tree = stage(name)
    assert recipe.train == replace(recipe.train, steps=7, weight_decay=0.0, eps=1e-15)
    assert to_json(recipe.train.schedule).items() >= tree["train"]["schedule"].items()
    assert to_json(recipe.data.packing).items() >= tree["data"]["packing"].items()
    assert recipe.data.dropout == PAPER
    assert recipe.data.ratios == tree["data"]["ratios"] and sum(recipe.data.ratios.values()) == pytest.approx(
        1
    )


def test_alignment_trains_the_connector_from_captions() -> None:
    tree = stage("alignment")
    assert tree["train"]["freeze"] == {"llm": True, "vit": True} and not tree["train"]["visual_gen"]
    assert [kind for kind, ratio in tree["data"]["ratios"].items() if ratio] == ["i2t"]
    for later in STAGES[1:]:
        assert stage(later)["train"]["freeze"] == {"llm": False, "vit": False}
        assert stage(later)["train"]["visual_gen"]


def test_changes_lie_over_a_stage() -> None:
    changes = {"train": {"schedule": {"lr": 1e-5}, "ema": None}, "folder": "runs/x"}
    changed = merged(stage("finetuning"), changes)
    base = stage("finetuning")
    assert changed["train"]["schedule"] == base["train"]["schedule"] | {"lr": 1e-5}
    assert changed["train"]["ema"] is None and changed["folder"] == "runs/x"
    assert changed["data"] == base["data"] and base == stage("finetuning"), "a preset is made anew each time"


def test_a_stage_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="stage 'finetune' is none of .*; did you mean 'finetuning'"):
        stage("finetune")


def test_trees() -> None:
    tree = nested({"a.b": 1, "a.c.d": (2, 3), "e": None})
    assert tree == {"a": {"b": 1, "c": {"d": [2, 3]}}, "e": None}
    assert merged(tree, {"a": {"c": 4}, "f": {"g": 5}}) == {"a": {"b": 1, "c": 4}, "e": None, "f": {"g": 5}}
    assert tree["a"]["c"] == {"d": [2, 3]}
