"""A recipe to a trained model: weights, data, loop, export. The same steps for one process and for many."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openbagel import lora
from openbagel.config import BagelConfig, nearest, to_json
from openbagel.data.loader import Loader, LoaderOptions
from openbagel.data.mixture import Group, read_mixture
from openbagel.data.samples import Dataset, Sample
from openbagel.images import ImageLimits
from openbagel.model.bagel import BagelModel
from openbagel.sequence import Packer
from openbagel.train.checkpoint import MANIFEST, Checkpoints, Stored
from openbagel.train.guards import banner, overfit_verdict
from openbagel.train.latents import LatentCache, LatentEncoder
from openbagel.train.metrics import say
from openbagel.train.origin import Beginning, begin_from, place_of
from openbagel.train.parallel import Parallel, Ranks, materialise, memory_estimate, shard
from openbagel.train.previews import Previews
from openbagel.train.recipe import Data, Recipe, read_recipe
from openbagel.train.trainer import Trainer
from openbagel.weights import Checkpoint, save_checkpoint
from openbagel.world.samples import WorldDataset, world_named

KINDS = {
    "text": "text",
    "t2i_pretrain": "t2i",
    "vlm_sft": "i2t",
    "interleaved_und": "interleaved_und",
    "video_interleaved": "video",
    "web_interleaved": "web",
    "unified_edit": "web",
    "reasoning": "web",
}
"""The kind in the paper's table that a task counts as; editing sets are part of its web data."""


def train(recipe: Recipe, report: Callable[[str], None] = say) -> Path:
    """Runs what the folder still lacks and returns what it wrote: a checkpoint folder in the official layout
    with the averaged weights, or an adapter's folder.
    """
    ranks = Ranks()
    try:
        return _train(recipe, ranks, report if ranks.is_first else _silent)
    finally:
        ranks.close()


def _silent(_: str) -> None:
    """Where only the first rank speaks."""


def _train(recipe: Recipe, ranks: Ranks, report: Callable[[str], None]) -> Path:
    folder = Path(recipe.folder)
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(to_json(recipe), indent=2) + "\n", "utf-8")
    begin = begin_from(recipe, ranks, report)
    _mark(begin.checkpoint.model, recipe)
    recipe = replace(recipe, parallel=_fitting(begin.checkpoint.model, recipe, ranks))
    model = _prepared(begin, recipe, ranks)
    report(_told(begin, recipe))
    report(_memory(model, recipe, ranks))
    trainer = _trainer(begin, recipe, ranks, report)
    if recipe.overfit:
        _overfit(trainer, recipe.overfit, report)
        return folder
    trainer.run()
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
        return
    if training.freeze.und and recipe.lora.preset is not lora.Preset.GEN:
        raise ValueError(
            f"train.freeze.und leaves adapters of preset {recipe.lora.preset} without gradients; use gen"
        )
    if recipe.quantise_base:
        lora.quantise_base(model)
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


def _told(begin: Beginning, recipe: Recipe) -> str:
    rank = recipe.lora.rank if recipe.lora else None
    return banner(begin.checkpoint.model, start=begin.start, source=begin.source, rank=rank)


def _fitting(model: BagelModel, recipe: Recipe, ranks: Ranks) -> Parallel:
    """How the run spreads its model; so many layers are recomputed as memory asks for, unless it says."""
    if recipe.parallel.recompute is not None:
        return recipe.parallel
    layers, room = len(model.language_model.model.layers), ranks.memory()
    choices = [replace(recipe.parallel, recompute=count / layers) for count in range(layers + 1)]
    return next((c for c in choices if sum(_needed(model, recipe, c, ranks).values()) <= room), choices[-1])


def _needed(model: BagelModel, recipe: Recipe, parallel: Parallel, ranks: Ranks) -> dict[str, int]:
    tokens, eight_bit = recipe.data.packing.max_num_tokens, recipe.train.eight_bit
    return memory_estimate(model, parallel, num_ranks=ranks.size, tokens=tokens, eight_bit=eight_bit)


def _memory(model: BagelModel, recipe: Recipe, ranks: Ranks) -> str:
    kinds = _needed(model, recipe, recipe.parallel, ranks)
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in kinds.items() if size)
    return f"memory of each rank, estimated: {sum(kinds.values()) / 2**30:.2f} GiB ({listed})"


def _trainer(begin: Beginning, recipe: Recipe, ranks: Ranks, report: Callable[[str], None]) -> Trainer:
    folder, checkpoint, training, data = Path(recipe.folder), begin.checkpoint, recipe.train, recipe.data
    autoencoder = checkpoint.autoencoder and checkpoint.autoencoder.to(ranks.device)
    cache = LatentCache.of(data.latent_cache, autoencoder) if data.latent_cache and autoencoder else None
    place = replace(place_of(recipe, ranks, report), start=begin.start)
    if recipe.checkpoints:
        place = replace(place, checkpoints=Path(recipe.checkpoints))
    trainer = Trainer(
        checkpoint.model,
        training,
        place,
        loader=loader(datasets(data, checkpoint), recipe, checkpoint.config, ranks=ranks),
        encoder=LatentEncoder(autoencoder, checkpoint.config, training.seed, training.timestep_shift, cache),
        packer=Packer(checkpoint.config, checkpoint.codec, marker_loss=training.marker_loss),
    )
    if recipe.preview.every:
        seen = folder if ranks.is_first else None
        trainer.previews = Previews(checkpoint, recipe.preview, folder=seen)
    return trainer


def datasets(data: Data, checkpoint: Checkpoint) -> Sequence[Dataset]:
    """The recipe's data sets. ValueError when there are none."""
    groups: list[Group] = []
    config, codec = _sized(checkpoint.config, data), checkpoint.codec
    if data.mixture is not None:
        groups = read_mixture(
            data.mixture,
            codec=codec,
            config=config,
            dropout=data.dropout,
            dataset_info=data.dataset_info,
            tasks=[task for task, kind in KINDS.items() if data.ratios is None or data.ratios.get(kind)],
        )
        _share(groups, data.ratios)
    sets: list[Dataset] = [*groups]
    if data.world is not None:
        world = world_named(data.world.world)
        sets += [WorldDataset(kind, world, data.world, config, codec) for kind in data.world.kinds]
    if not sets:
        raise ValueError("the recipe has no data; give data.mixture, a YAML file or a folder of data")
    return sets


def _sized(config: BagelConfig, data: Data) -> BagelConfig:
    """The model with the recipe's resolution as its picture limits."""
    settings, resolution = config.settings, data.resolution

    def limits(size: tuple[int, int] | None, old: ImageLimits) -> ImageLimits:
        if size is None:
            return old
        return replace(old, min_size=size[0], max_size=size[1], square=size[0] == size[1])

    vae, vit = limits(resolution.gen, settings.vae_limits), limits(resolution.und, settings.vit_limits)
    return replace(config, settings=replace(settings, vae_limits=vae, vit_limits=vit))


def _share(groups: list[Group], ratios: dict[str, float] | None) -> None:
    """Gives the groups of each kind that kind's share, in proportion to their own weights."""
    if ratios is None:
        return
    for kind in ratios:
        if kind not in KINDS.values():
            kinds = sorted(set(KINDS.values()))
            raise ValueError(f"data.ratios: unknown kind {kind!r}{nearest(kind, kinds)}; there are {kinds}")
    of_kind: dict[str, list[Group]] = {}
    for group in groups:
        of_kind.setdefault(KINDS[group.task], []).append(group)
    for kind, members in of_kind.items():
        total = sum(group.weight for group in members) or 1.0
        for group in members:
            group.weight *= ratios.get(kind, 0.0) / total


def loader(sets: Sequence[Dataset], recipe: Recipe, config: BagelConfig, *, ranks: Ranks) -> Loader:
    data = recipe.data
    options = LoaderOptions(
        rank=ranks.rank,
        ranks=ranks.size,
        num_workers=data.workers,
        prefetch_factor=data.prefetch_factor,
        timeout=data.timeout,
        max_bad=data.max_bad,
        quarantine=Path(recipe.folder) / f"quarantine-{ranks.rank}.jsonl",
    )
    return Loader(sets, data.packing, config, seed=data.seed, options=options)


def dry_step(checkpoint: Checkpoint, samples: Sequence[Sample]) -> dict[str, float]:
    """The losses of one forward and backward over samples: whether a run on them would start."""
    encoder = LatentEncoder(checkpoint.autoencoder, checkpoint.config, seed=0)
    pack = Packer(checkpoint.config, checkpoint.codec).pack(encoder.segments(samples))
    losses = dict(zip(("ce", "mse"), checkpoint.model.losses(pack), strict=True))
    means = {name: loss.mean() for name, loss in losses.items() if loss.numel()}
    if means:
        torch.stack(list(means.values())).sum().backward()
    return {name: mean.item() for name, mean in means.items()}


def _overfit(trainer: Trainer, steps: int, report: Callable[[str], None]) -> None:
    """Repeats the first batches, noise and all; ValueError when the losses do not fall below half."""
    first = trainer.batches()
    trainer.batches = lambda: first
    history = []
    for _ in range(steps):
        record = trainer.train_step()
        history.append(record.losses)
        if record.step % trainer.place.track.log_every == 0:
            report(f"overfitting, step {record.step}: {_listed(record.losses)}")
    verdict = overfit_verdict(history)
    if not verdict.good:
        raise ValueError(f"the self-test failed: {verdict.reason}")
    report(f"the self-test passed: {_listed(history[0])} became {_listed(history[-1])}")


def _listed(losses: Any) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items())


def _export(begin: Beginning, recipe: Recipe, ranks: Ranks) -> Path:
    """Writes the model as it is, from whole tensors gathered on the first rank."""
    model, folder = begin.checkpoint.model, Path(recipe.folder)
    state = dict(_whole(model.named_parameters(), ranks))
    if recipe.lora is not None:
        if ranks.is_first:
            base = recipe.start.checkpoint or ""
            lora.save_adapter(model, folder / "adapter", base=base, state=state)
        ranks.barrier()
        return folder / "adapter"
    if ranks.is_first:
        with torch.device("meta"):
            written = BagelModel(model.config)
        written.load_state_dict(state, assign=True)
        save_checkpoint(folder / "checkpoint", replace(begin.checkpoint, model=written), dtype=torch.bfloat16)
    ranks.barrier()
    return folder / "checkpoint"


def _whole(named: Any, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, gathered by all ranks together, one at a time; kept on the first one's CPU."""
    for name, tensor in named:
        value = tensor.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if ranks.is_first:
            yield name, value.cpu()


def open_run(folder: str | Path, weights: str) -> Checkpoint | None:
    """The model of a run's folder, or of one of its checkpoints' folders, with its averaged ("ema") or last
    ("model") weights; adapters are bound. None if the folder is of no run.

    ValueError when the run has no checkpoint yet.
    """
    folder = Path(folder)
    step = folder if (folder / MANIFEST).is_file() else None
    run = step.parent.parent if step else folder
    if not (run / "recipe.json").is_file():
        return None
    recipe, ranks = read_recipe(run / "recipe.json"), Ranks("cpu")
    step = step or Checkpoints(Path(recipe.checkpoints or run / "checkpoints"), ranks).latest()
    if step is None:
        raise ValueError(f"{run} has no checkpoint yet; train it first")
    begin = begin_from(recipe, ranks, _silent)
    _mark(begin.checkpoint.model, recipe)
    stored, parameters = Stored(step), dict(begin.checkpoint.model.named_parameters())
    for name in stored.shapes:
        part, _, parameter = name.partition("/")
        if part == weights:
            parameters[parameter].data.copy_(stored[name])
    return begin.checkpoint
