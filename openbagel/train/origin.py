"""Where the weights of a run come from: a checkpoint, published parts, or nothing, which makes a nano."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openbagel.config import BagelConfig, from_json, nano, to_json
from openbagel.inference.pipeline import find_model
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.pretrained import join
from openbagel.tokens import TextCodec
from openbagel.train.autoencoder import AutoencoderTrainer
from openbagel.train.checkpoint import MANIFEST
from openbagel.train.guards import Start
from openbagel.train.parallel import Ranks, stored_weights
from openbagel.train.presets import merged
from openbagel.train.recipe import Origin, Recipe
from openbagel.train.trainer import Loop, Place
from openbagel.train.vision import VisionTrainer
from openbagel.weights import Checkpoint, TensorFiles, load_checkpoint, weight_files
from openbagel.world.samples import world_codec, world_named

Report = Callable[[str], None]
VOCABULARY = 512
"""Tokens of the vocabulary that a run from nothing makes."""


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """A checkpoint before its training, and how to name it.

    Of several ranks none holds the whole model: it is on the meta device, and `read` gives tensors by name.
    """

    checkpoint: Checkpoint
    start: Start
    source: str
    read: Callable[[str], Tensor]


def begin_from(recipe: Recipe, ranks: Ranks, report: Report) -> Beginning:
    """Where the run begins, with the facts of the model that it changes."""
    begin = _found(recipe, ranks, report)
    settings = begin.checkpoint.config.settings
    if recipe.data.world is not None:
        settings = replace(settings, world=_world(recipe))
    if recipe.train.marker_loss:
        settings = replace(settings, draws_by_itself=True)
    config = replace(begin.checkpoint.config, settings=settings)
    begin.checkpoint.model.config = config
    return replace(begin, checkpoint=replace(begin.checkpoint, config=config))


def _found(recipe: Recipe, ranks: Ranks, report: Report) -> Beginning:
    origin, device = recipe.start, "meta" if ranks.size > 1 else "cpu"
    if origin.checkpoint is not None:
        return _stored(origin, recipe, device)
    if origin.parts is not None:
        joined = join(origin.parts)
        checkpoint = joined.load(device=device)
        return Beginning(checkpoint, Start.PARTS, origin.parts.llm, joined.tensors.__getitem__)
    checkpoint = _nano(recipe, ranks, report)
    return Beginning(checkpoint, Start.NOTHING, "", checkpoint.model.state_dict().__getitem__)


def _stored(origin: Origin, recipe: Recipe, device: str) -> Beginning:
    assert origin.checkpoint is not None
    folder = find_model(origin.checkpoint)
    if origin.state and not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds no optimiser state; add --resume_model_only True to begin from its weights"
        )
    facts = find_model(origin.facts) if origin.facts else folder
    weights = folder / f"{origin.weights}.safetensors" if origin.weights else folder
    if origin.weights and not weights.is_file():
        weights = folder  # shards, or the only file there is
    checkpoint = load_checkpoint(
        facts,
        dtype=torch.float32,
        device=device,
        understanding_only=not recipe.train.visual_gen,
        settings=origin.settings,
        weights=weights,
    )
    files = TensorFiles(weight_files(weights))
    return Beginning(
        checkpoint, Start.CHECKPOINT, origin.checkpoint, stored_weights(files, checkpoint.config)
    )


def _nano(recipe: Recipe, ranks: Ranks, report: Report) -> Checkpoint:
    """A nano of random weights, beside encoders and a vocabulary that are found, or made first."""
    if ranks.size > 1:
        raise ValueError(f"a nano is begun by one process, not {ranks.size}; run the recipe alone first")
    if recipe.start.facts is not None:
        return _beside(recipe.start.facts, recipe)
    folder, world = Path(recipe.folder), world_named(_world(recipe))
    if recipe.autoencoder is None:
        raise ValueError(
            "give start.checkpoint, start.parts or start.facts, or an autoencoder for a nano from nothing"
        )
    if not (folder / "tokenizer.json").is_file():
        world_codec(world, VOCABULARY).save(folder)
    config = _changed(nano(VOCABULARY), recipe)
    assert config.vae is not None
    drawn = AutoencoderTrainer(
        config.vae, world, recipe.autoencoder, place_of(recipe, ranks, report, "autoencoder")
    )
    _finish(drawn, "autoencoder")
    scale, shift = drawn.latent_statistics()
    autoencoder = AutoEncoder(replace(config.vae, scale=scale, shift=shift))
    with drawn.averaged():
        autoencoder.load_state_dict(drawn.model.state_dict())
    model = BagelModel(replace(config, vae=autoencoder.config))
    model.initialise(torch.Generator().manual_seed(recipe.train.seed))
    if recipe.vision is not None:
        seeing = VisionTrainer(model, world, recipe.vision, place_of(recipe, ranks, report, "vision"))
        _finish(seeing, "vision encoder")
        with seeing.averaged():
            seen = {name: tensor.clone() for name, tensor in model.vit_model.state_dict().items()}
        model.vit_model.load_state_dict(seen)
        model.to("cpu")
    return Checkpoint(model.config, model, autoencoder.eval(), TextCodec.load(folder))


def _beside(facts: str, recipe: Recipe) -> Checkpoint:
    """A transformer of random weights beside a folder's ViT, autoencoder and vocabulary."""
    found = load_checkpoint(find_model(facts), dtype=torch.float32)
    model = BagelModel(_changed(found.config, recipe))
    model.initialise(torch.Generator().manual_seed(recipe.train.seed))
    if model.config.vit:
        model.vit_model.load_state_dict(found.model.vit_model.state_dict())
    return replace(found, config=model.config, model=model)


def _changed(config: BagelConfig, recipe: Recipe) -> BagelConfig:
    return from_json(BagelConfig, merged(to_json(config), recipe.start.settings), "start.settings")


def place_of(recipe: Recipe, ranks: Ranks, report: Report, part: str = "") -> Place:
    """Where a run, or a part of it that is trained first, keeps what it writes."""
    folder = Path(recipe.folder) / part
    return Place(
        folder=folder,
        checkpoints=folder / "checkpoints",
        ranks=ranks,
        guard=recipe.guard,
        track=recipe.track,
        report=report,
    )


def _finish(loop: Loop, what: str) -> None:
    loop.run()
    if loop.step < loop.training.steps:
        raise ValueError(
            f"the {what} stopped at step {loop.step} of {loop.training.steps}; run again to go on"
        )


def _world(recipe: Recipe) -> str:
    """The toy world of the run's data; the first one for a run that uses none."""
    return recipe.data.world.world if recipe.data.world else "nano"
