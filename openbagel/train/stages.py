"""A recipe to a trained model: weights, data, loop, export. The same steps for one process and for many."""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openbagel import lora
from openbagel.checks import check_choice, retold
from openbagel.config import BagelConfig, from_json, nano, to_json
from openbagel.data.loader import Loader
from openbagel.data.mixture import Group, read_mixture
from openbagel.data.samples import Dataset, Sample
from openbagel.dfloat11 import is_packed
from openbagel.files import write_json
from openbagel.hub import find_model
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.pretrained import join
from openbagel.quantize import Precision, precision_of, quantize
from openbagel.sequence import Packer
from openbagel.tokens import TextCodec
from openbagel.train.checkpoint import MANIFEST, Checkpoints, Stored
from openbagel.train.encoders import AutoencoderTrainer, VisionTrainer
from openbagel.train.guards import Start, banner, overfit_fault
from openbagel.train.latents import LatentCache, LatentEncoder
from openbagel.train.metrics import Report, say
from openbagel.train.parallel import Parallel, Ranks, materialise, memory_estimate, shard, stored_weights
from openbagel.train.previews import Previews
from openbagel.train.recipe import Data, Origin, Recipe, Resolution, merged, read_recipe
from openbagel.train.trainer import Place, Trainer
from openbagel.weights import MODEL_FILES, Checkpoint, load_checkpoint, open_weights, save_checkpoint
from openbagel.world.samples import WorldDataset, world_codec, world_named

KINDS = {"text": "text", "t2i_pretrain": "t2i", "vlm_sft": "i2t", "video_interleaved": "video"}
KINDS |= dict.fromkeys(("web_interleaved", "unified_edit", "reasoning"), "web")
KINDS |= {"interleaved_und": "interleaved_und"}
"""The kind in the paper's table that a task counts as; editing sets are part of its web data."""
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


def train(recipe: Recipe, report: Report = say) -> Path:
    """Runs what the folder still lacks and returns what it wrote: a checkpoint folder in the official layout
    with the averaged weights, or an adapter's folder. ValueError while another process trains in it, where
    the system can tell.
    """
    folder = Path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    used = f"another process trains in {folder}; wait for it, or name another folder"
    with closing(Ranks(report=report)) as ranks, (folder / ".lock").open("w") as lock:
        with suppress(ImportError, OSError), retold(used, BlockingIOError):
            import fcntl  # a lock that ends with its process, and that no child of it holds

            if ranks.is_first:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _train(recipe, ranks)


def _train(recipe: Recipe, ranks: Ranks) -> Path:
    begin = begin_from(recipe, ranks)
    _mark(begin.checkpoint.model, recipe)
    parallel, memory = _planned(begin.checkpoint.model, recipe, ranks)
    model = _prepared(begin, replace(recipe, parallel=parallel), ranks)
    rank = recipe.lora and recipe.lora.rank
    ranks.report(banner(model, start=begin.start, source=begin.source, rank=rank))
    ranks.report(memory)
    trainer = _trainer(begin, recipe, ranks)
    if recipe.overfit:
        _overfit(trainer, recipe.overfit)
        return Path(recipe.folder)
    trainer.run(lambda: ranks.is_first and write_json(Path(recipe.folder, "recipe.json"), to_json(recipe)))
    with trainer.averaged():
        return _export(begin, recipe, ranks)


def _mark(model: BagelModel, recipe: Recipe) -> None:
    """Freezes what does not learn and binds adapters."""
    training = recipe.train
    frozen = {"language_model": training.freeze.llm, "vit_model": training.freeze.vit}
    if not training.visual_und:
        frozen |= {"vit_model": True, "connector": True}
    for name, freeze in frozen.items():
        if freeze and hasattr(model, name):
            getattr(model, name).requires_grad_(False)
    if recipe.lora is None:
        if (precision := precision_of(model)) is not None:
            raise ValueError(f"{precision} weights do not learn; add lora, or start from the original ones")
        return
    preset = recipe.lora.preset
    if training.freeze.und and preset is not lora.Preset.GEN:
        raise ValueError(f"train.freeze.und leaves adapters of preset {preset} without gradients; use gen")
    if recipe.quantise_base:
        quantize(model, Precision.NF4)
    lora.bind(model, recipe.lora, generator=torch.Generator().manual_seed(training.seed))


def _prepared(begin: Beginning, recipe: Recipe, ranks: Ranks) -> BagelModel:
    """The model with its parameters where they are trained."""
    model = begin.checkpoint.model
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    shard(model.train(), recipe.parallel, ranks)
    if on_meta:
        adapters = lora.initial(model, torch.Generator().manual_seed(recipe.train.seed))
        read = begin.read
        materialise(model, lambda name: adapters[name] if name in adapters else read(name), ranks.device)
    return model


def _planned(model: BagelModel, recipe: Recipe, ranks: Ranks) -> tuple[Parallel, str]:
    """How the run spreads its model, and what that needs in words. So many layers are recomputed as memory
    asks for, unless the recipe says.
    """
    layers, tokens = len(model.language_model.model.layers), recipe.data.packing.max_num_tokens
    known: dict[str, Any] = {"ranks": ranks.size, "tokens": tokens, "eight_bit": recipe.train.eight_bit}
    given = recipe.parallel.recompute
    shares = [count / layers for count in range(layers + 1)] if given is None else [given]
    choices = [replace(recipe.parallel, recompute=share) for share in shares]
    plans = [(choice, memory_estimate(model, choice, **known)) for choice in choices]
    parallel, needed = next((p for p in plans if sum(p[1].values()) <= ranks.memory()), plans[-1])
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in needed.items() if size)
    return parallel, f"memory of each rank, estimated: {sum(needed.values()) / 2**30:.2f} GiB ({listed})"


def _trainer(begin: Beginning, recipe: Recipe, ranks: Ranks) -> Trainer:
    folder, checkpoint, training, data = Path(recipe.folder), begin.checkpoint, recipe.train, recipe.data
    autoencoder = checkpoint.autoencoder and checkpoint.autoencoder.to(ranks.device)
    cache = LatentCache(data.latent_cache, autoencoder) if data.latent_cache and autoencoder else None
    sets, config, share = datasets(data, checkpoint), checkpoint.config, (ranks.rank, ranks.size)
    quarantine = folder / f"quarantine-{ranks.rank}.jsonl"
    trainer = Trainer(
        checkpoint.model,
        training,
        replace(place_of(recipe, ranks), start=begin.start),
        loader=Loader(sets, config, data, share=share, quarantine=quarantine),
        encoder=LatentEncoder(autoencoder, config, training.seed, training.timestep_shift, cache),
        packer=Packer(config, checkpoint.codec, marker_loss=training.marker_loss),
    )
    if recipe.preview.every:
        seen = folder if ranks.is_first else None
        trainer.previews = Previews(checkpoint, recipe.preview, folder=seen)
    return trainer


# where the weights come from: a checkpoint, published parts, or nothing, which makes a nano -----------------


def begin_from(recipe: Recipe, ranks: Ranks) -> Beginning:
    """Where the run begins, with the facts of the model that it changes."""
    begin = _found(recipe, ranks)
    settings = begin.checkpoint.config.settings
    if recipe.data.world is not None:
        settings = replace(settings, world=_world(recipe))
    if recipe.train.marker_loss:
        settings = replace(settings, draws_by_itself=True)
    config = replace(begin.checkpoint.config, settings=settings)
    begin.checkpoint.model.config = config
    return replace(begin, checkpoint=replace(begin.checkpoint, config=config))


def _found(recipe: Recipe, ranks: Ranks) -> Beginning:
    origin, device = recipe.start, "meta" if ranks.size > 1 else "cpu"
    if origin.checkpoint is not None:
        return _stored(origin, recipe, device)
    if origin.parts is not None:
        joined = join(origin.parts)
        checkpoint = joined.load(device=device)
        return Beginning(checkpoint, Start.PARTS, origin.parts.llm, joined.tensors.__getitem__)
    checkpoint = _nano(recipe, ranks)
    return Beginning(checkpoint, Start.NOTHING, "", checkpoint.model.state_dict().__getitem__)


def _stored(origin: Origin, recipe: Recipe, device: str) -> Beginning:
    assert origin.checkpoint is not None
    folder = find_model(origin.checkpoint)
    if origin.state and not (folder / MANIFEST).is_file():
        remedy = "add --resume_model_only True to begin from its weights"
        raise ValueError(f"{folder} holds no optimiser state; {remedy}")
    facts = find_model(origin.facts) if origin.facts else folder
    named = folder / f"{origin.weights}.safetensors"
    there = [] if is_packed(folder) else [name for name in MODEL_FILES if (folder / name).is_file()]
    if origin.weights and there and named.name not in there:
        remedy = f"set start.weights to {Path(there[0]).stem} (official flag: --finetune_from_ema)"
        raise ValueError(f"{folder} has no {named.name}; {remedy}")
    weights = named if named.name in there else folder  # shards, the file there is, or DFloat11's many
    checkpoint = load_checkpoint(
        facts,
        dtype=torch.float32,
        device=device,
        understanding_only=not recipe.train.visual_gen,
        settings=origin.settings,
        weights=weights,
    )
    read = stored_weights(open_weights(weights), checkpoint.config)
    return Beginning(checkpoint, Start.CHECKPOINT, origin.checkpoint, read)


def _nano(recipe: Recipe, ranks: Ranks) -> Checkpoint:
    """A nano of random weights, beside encoders and a vocabulary that are found, or made first."""
    if ranks.size > 1:
        raise ValueError(f"a nano is begun by one process, not {ranks.size}; run the recipe alone first")
    if recipe.start.facts is not None:
        return _beside(recipe.start.facts, recipe)
    folder, world = Path(recipe.folder), world_named(_world(recipe))
    if recipe.autoencoder is None:
        known = "start.checkpoint, start.parts or start.facts"
        raise ValueError(f"give {known}, or an autoencoder for a nano from nothing")
    if not (folder / "tokenizer.json").is_file():
        world_codec(world, VOCABULARY).save(folder)
    config = _changed(nano(VOCABULARY), recipe)
    assert config.vae is not None
    place = place_of(recipe, ranks, "autoencoder")
    drawn = AutoencoderTrainer(config.vae, world, recipe.autoencoder, place)
    drawn.finish()
    scale, shift = drawn.latent_statistics()
    autoencoder = AutoEncoder(replace(config.vae, scale=scale, shift=shift))
    with drawn.averaged():
        autoencoder.load_state_dict(drawn.model.state_dict())
    model = BagelModel(replace(config, vae=autoencoder.config))
    model.initialise(torch.Generator().manual_seed(recipe.train.seed))
    if recipe.vision is not None:
        seeing = VisionTrainer(model, world, recipe.vision, place_of(recipe, ranks, "vision"))
        seeing.finish()
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


def place_of(recipe: Recipe, ranks: Ranks, part: str = "") -> Place:
    """Where a run, or a part of it that is trained first, keeps what it writes."""
    folder, facts = Path(recipe.folder) / part, {"guard": recipe.guard, "track": recipe.track}
    own = None if part else recipe.checkpoints
    checkpoints = Path(own or folder / "checkpoints")
    return Place(folder=folder, checkpoints=checkpoints, ranks=ranks, **facts)


def _world(recipe: Recipe) -> str:
    """The toy world of the run's data; the first one for a run that uses none."""
    return recipe.data.world.world if recipe.data.world else "nano"


# data -------------------------------------------------------------------------------------------------------


def datasets(data: Data, checkpoint: Checkpoint) -> Sequence[Dataset]:
    """The recipe's data sets. ValueError when there are none."""
    sets: list[Dataset] = []
    config, codec = _sized(checkpoint.config, data.resolution), checkpoint.codec
    if data.mixture is not None:
        groups = read_mixture(
            data.mixture,
            codec=codec,
            config=config,
            dropout=data.dropout,
            dataset_info=data.dataset_info,
            tasks=[task for task, kind in KINDS.items() if data.ratios is None or data.ratios.get(kind)],
        )
        if data.ratios is not None:
            _share(groups, data.ratios)
        sets += groups
    if data.world is not None:
        world = world_named(data.world.world)
        sets += [WorldDataset(kind, world, data.world, config, codec) for kind in data.world.kinds]
    if not sets:
        raise ValueError("the recipe has no data; give data.mixture, a YAML file or a folder of data")
    return sets


def _sized(config: BagelConfig, wanted: Resolution) -> BagelConfig:
    """The model with the recipe's resolution as its picture limits."""
    settings = config.settings
    for name, size in (("vae_limits", wanted.gen), ("vit_limits", wanted.und)):
        if size is not None:
            sides = {"min_size": size[0], "max_size": size[1], "square": size[0] == size[1]}
            settings = replace(settings, **{name: replace(getattr(settings, name), **sides)})
    return replace(config, settings=settings)


def _share(groups: list[Group], ratios: dict[str, float]) -> None:
    """Gives the groups of each kind that kind's share, in proportion to their own weights."""
    for kind in ratios:
        check_choice("data.ratios: kind", kind, sorted(set(KINDS.values())))
    totals = dict.fromkeys(KINDS.values(), 0.0)
    for group in groups:
        totals[KINDS[group.task]] += group.weight
    for group in groups:
        kind = KINDS[group.task]
        group.weight *= ratios.get(kind, 0.0) / (totals[kind] or 1.0)


def dry_step(checkpoint: Checkpoint, samples: Sequence[Sample]) -> dict[str, float]:
    """The losses of one forward and backward over samples: whether a run on them would start."""
    encoder = LatentEncoder(checkpoint.autoencoder, checkpoint.config, seed=0)
    pack = Packer(checkpoint.config, checkpoint.codec).pack(encoder.segments(samples))
    losses = dict(zip(("ce", "mse"), checkpoint.model.losses(pack), strict=True))
    means = {name: loss.mean() for name, loss in losses.items() if loss.numel()}
    if means:
        torch.stack(list(means.values())).sum().backward()
    return {name: mean.item() for name, mean in means.items()}


# what comes out ---------------------------------------------------------------------------------------------


def _overfit(trainer: Trainer, steps: int) -> None:
    """Repeats the first batches, noise and all; ValueError when the losses do not fall below half."""
    first = trainer.batches()
    trainer.batches = lambda: first
    history = []
    for _ in range(steps):
        record = trainer.train_step()
        history.append(record.losses)
        if record.step % trainer.place.track.log_every == 0:
            trainer.ranks.report(f"overfitting, step {record.step}: {_listed(record.losses)}")
    if fault := overfit_fault(history):
        raise ValueError(f"the self-test failed: {fault}")
    trainer.ranks.report(f"the self-test passed: {_listed(history[0])} became {_listed(history[-1])}")


def _listed(losses: Any) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items())


def _export(begin: Beginning, recipe: Recipe, ranks: Ranks) -> Path:
    """Writes the model as it is, from whole tensors gathered one at a time on the first rank's CPU."""
    model, state = begin.checkpoint.model, {}
    target = Path(recipe.folder) / ("adapter" if recipe.lora else "checkpoint")
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value  # by all ranks together
        if ranks.is_first:
            state[name] = value.cpu()
    if ranks.is_first and recipe.lora:
        lora.save_adapter(model, target, base=recipe.start.checkpoint or "", state=state)
    elif ranks.is_first:
        with torch.device("meta"):
            written = BagelModel(model.config)
        written.load_state_dict(state, assign=True)
        save_checkpoint(target, replace(begin.checkpoint, model=written), dtype=torch.bfloat16)
    ranks.barrier()
    return target


def open_run(folder: str | Path, weights: str) -> Checkpoint | None:
    """The model of a run's folder, or of one of its checkpoints' folders, with its averaged ("ema") or last
    ("model") weights, the last ones of a run without an average; adapters are bound. None if the folder is
    of no run.

    ValueError when the run has no checkpoint yet.
    """
    folder = Path(folder)
    step = folder if (folder / MANIFEST).is_file() else None
    run = step.parent.parent if step else folder
    if not (run / "recipe.json").is_file():
        return None
    recipe, ranks = read_recipe(run / "recipe.json"), Ranks("cpu", report=lambda _: None)
    step = step or Checkpoints(Path(recipe.checkpoints or run / "checkpoints"), ranks).latest()
    if step is None:
        raise ValueError(f"{run} has no checkpoint yet; train it first")
    begin = begin_from(recipe, ranks)
    _mark(begin.checkpoint.model, recipe)
    stored, parameters = Stored(step), dict(begin.checkpoint.model.named_parameters())
    is_averaged = any(name.startswith("ema/") for name in stored.shapes)
    for name in stored.shapes:
        part, _, parameter = name.partition("/")
        if part == (weights if is_averaged else "model"):
            parameters[parameter].data.copy_(stored[name])
    return begin.checkpoint
