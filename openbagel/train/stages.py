"""A recipe file to a trained model: autoencoder, vocabulary, transformer, checkpoint folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from openbagel.config import from_json, nano, to_json
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Packer
from openbagel.tokens import TextCodec
from openbagel.train.autoencoder import AutoencoderTrainer
from openbagel.train.trainer import Trainer, TrainRecipe
from openbagel.weights import Checkpoint, load_checkpoint, save_checkpoint
from openbagel.world.samples import LatentCache, Mixture, Teacher, world_codec
from openbagel.world.scene import nano_world

VOCABULARY = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run. `start` is a checkpoint folder whose bare weights to begin from (None: from nothing)."""

    folder: str
    mixture: Mixture
    autoencoder: TrainRecipe
    model: TrainRecipe
    start: str | None = None


def read_recipe(path: str | Path, overrides: list[str]) -> Recipe:
    """A YAML file with `section.key=value` overrides; ValueError names unknown keys and the nearest one."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path} ({error})") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is no override; write key=value, for example model.steps=200")
        *sections, leaf = key.split(".")
        branch: dict[str, Any] = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = yaml.safe_load(value)
    return from_json(Recipe, tree, str(path))


def train(recipe: Recipe, report: Callable[[str], None]) -> Path:
    """Runs what the folder still lacks and returns the checkpoint folder with the averaged weights."""
    folder = Path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe), indent=2) + "\n", "utf-8")
    begin = _begin_from(recipe, folder, report)
    assert begin.autoencoder is not None
    latents = LatentCache(begin.autoencoder, folder / "latents", recipe.mixture.examples_per_kind)
    teacher = Teacher(begin.config, begin.codec, world=nano_world(), mixture=recipe.mixture, latents=latents)
    trainer = Trainer(begin.model, Packer(begin.config, begin.codec), teacher, recipe.model)
    trainer.run(folder, report)
    begin.model.load_state_dict(trainer.ema.state_dict(), strict=False)
    save_checkpoint(folder / "checkpoint", begin, dtype=torch.bfloat16)
    return folder / "checkpoint"


def _begin_from(recipe: Recipe, folder: Path, report: Callable[[str], None]) -> Checkpoint:
    """The untrained checkpoint: bare weights of another run, or random ones beside a trained autoencoder."""
    if recipe.start is not None:
        return load_checkpoint(recipe.start, dtype=torch.float32)
    config = nano(VOCABULARY)
    assert config.vae is not None
    trainer = AutoencoderTrainer(config.vae, nano_world(), recipe.autoencoder)
    trainer.run(folder / "autoencoder", report)
    scale, shift = trainer.latent_statistics()
    vae = replace(config.vae, scale=scale, shift=shift)
    autoencoder = AutoEncoder(vae)
    autoencoder.load_state_dict(trainer.model.state_dict())
    config = replace(config, vae=vae)
    model = BagelModel(config)
    model.initialise(torch.Generator().manual_seed(recipe.model.seed))
    if not (folder / "tokenizer.json").is_file():
        world_codec(nano_world(), VOCABULARY).save(folder)
    return Checkpoint(config, model, autoencoder.eval(), TextCodec.load(folder))
