"""What the loaders of vLLM and vLLM-Omni read (serving.json, with its sources), found in what we write.

They were not run: this compares names, shapes and fields.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from openbagel.config import BagelConfig, bagel_7b
from openbagel.hub import NANO
from openbagel.model.bagel import BagelModel
from openbagel.weights import config_json, load_checkpoint, save_checkpoint

FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("serving.json").read_text("utf-8"))
MODELS = {"7b": bagel_7b(), "nano": load_checkpoint(NANO, device="meta").config}


def sizes(config: BagelConfig) -> dict[str, Any]:
    assert config.vit is not None and config.vae is not None
    return {
        "vocabulary": config.llm.vocab_size,
        "width": config.llm.hidden_size,
        "inner": config.llm.intermediate_size,
        "layers": config.llm.num_hidden_layers,
        "heads": config.llm.num_attention_heads,
        "kv_heads": config.llm.num_key_value_heads,
        "head": config.llm.head_dim,
        "rope_theta": config.llm.rope_theta,
        "vit_width": config.vit.hidden_size,
        "vit_inner": config.vit.intermediate_size,
        "vit_layers": config.vit.num_used_layers,
        "vit_layers_stored": config.vit.num_hidden_layers,
        "vit_heads": config.vit.num_attention_heads,
        "vit_side": config.vit_max_num_patch_per_side,
        "patch": config.vit.patch_size,
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "z_channels": config.vae.z_channels,
        "downsample": config.vae.downsample,
    }


def product(words: str, known: dict[str, Any]) -> Any:
    """Of "a * 3": sizes by name, and numbers."""
    return math.prod(known[word] if word in known else int(word) for word in words.split(" * "))


def filled(fact: Any, known: dict[str, Any]) -> Any:
    """A fact with a model's sizes in place of their names."""
    if isinstance(fact, dict):
        return {name: filled(value, known) for name, value in fact.items()}
    return product(fact, known) if isinstance(fact, str) and fact.split()[0] in known else fact


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_fields_that_they_read_are_written(config: BagelConfig) -> None:
    written = json.loads(json.dumps(config_json(config)))
    wanted = filled(FACTS["config.json"], sizes(config))
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert {name: written[key].get(name) for name in value} == value
        else:
            assert written[key] == value


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_tensors_that_they_read_are_all_that_are_written(config: BagelConfig) -> None:
    with torch.device("meta"):
        written = {name: tuple(tensor.shape) for name, tensor in BagelModel(config).state_dict().items()}
    known, wanted = sizes(config), {}
    for patterns in FACTS["tensors"].values():
        for pattern, shape in patterns.items():
            layers = known["vit_layers"] if pattern.startswith("vit_model") else known["layers"]
            for layer in range(layers) if "*" in pattern else [0]:
                sides = tuple(product(side, known) for side in shape.split(", "))
                wanted[pattern.replace("*", str(layer))] = sides
    assert wanted == written


def test_the_7b_is_what_they_expect() -> None:
    """The rule of "limits": of the ViT's layers, 27 are taken as 26."""
    written = config_json(bagel_7b())
    assert written["vit_config"]["num_hidden_layers"] == 27
    assert MODELS["7b"].vit is not None and MODELS["7b"].vit.num_used_layers == 26
    assert written["vit_config"]["image_size"] == 980
    assert written["vae_config"] | {"z_channels": 16, "downsample": 8} == written["vae_config"]


def test_the_files_that_they_read_are_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, load_checkpoint(NANO))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FACTS["files"])
    transformers = pytest.importorskip("transformers")
    qwen = transformers.Qwen2Config(**json.loads((tmp_path / "llm_config.json").read_text()))
    siglip = transformers.SiglipVisionConfig(**json.loads((tmp_path / "vit_config.json").read_text()))
    assert (qwen.qk_norm, qwen.rope_parameters["rope_theta"]) == (True, 1e4)
    assert (siglip.image_size // siglip.patch_size) ** 2 == MODELS["nano"].vit_max_num_patch_per_side ** 2
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size.height == siglip.image_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, config=qwen)
    ids = [tokenizer.convert_tokens_to_ids(marker) for marker in ("<|im_start|>", "<|vision_end|>")]
    codec = load_checkpoint(tmp_path).codec
    assert ids == [codec.start, codec.vision_end]
    assert tokenizer.eos_token_id == codec.end
