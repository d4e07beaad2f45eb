"""The mixture: which data sets a run sees, how often, and at which sizes.

Reads the official YAML unchanged. What the reference keeps in a Python file (DATASET_INFO) stands under one
more key, `dataset_info`, in the same YAML, or comes apart; relative paths start at the file they stand in::

    t2i_pretrain:                     # a group; its name is its task, or `task:` names it
      dataset_names: [t2i]            # names of dataset_info, or paths
      image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
      weight: 1.0
    dataset_info:
      t2i_pretrain: {t2i: {data_dir: bagel_example/t2i, num_files: 10, num_total_samples: 1000}}
"""

import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from openbagel.checks import check_choice, nearest
from openbagel.config import BagelConfig, from_json, read_yaml
from openbagel.data.samples import FrameSampler, Part
from openbagel.data.sources import CAPTIONS_FILES, PICTURE_ENDINGS, Source, located, open_source
from openbagel.data.tasks import TASKS, UNDERSTANDING, Dropout, Row, TaskSetting, guess_task
from openbagel.images import ImageLimits
from openbagel.tokens import TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageArgs:
    """`image_transform_args`, in pixels."""

    image_stride: int
    max_image_size: int
    min_image_size: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def limits(self, where: str, token: int, side: int) -> ImageLimits:
        """token: pixels of a token's side; side: tokens of the position table's. ValueError if too large."""
        stride, longest = self.image_stride, self.max_image_size
        if stride % token:
            raise ValueError(f"{where}: image_stride {stride} is no multiple of {token}; write {token}")
        if -(-longest // stride) * stride > side * token:
            there_are = f"the model has positions for {side} tokens of {token} pixels"
            raise ValueError(f"{where}: max_image_size {longest}: {there_are}; write {side * token} at most")
        return ImageLimits(longest, self.min_image_size, stride, self.max_pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupArgs:
    """One group of the YAML; `task` and `text_loss` (see `TaskSetting`) are not official."""

    dataset_names: tuple[str, ...]
    image_transform_args: ImageArgs | None = None
    vit_image_transform_args: ImageArgs | None = None
    frame_sampler_args: FrameSampler = FrameSampler()
    is_mandatory: bool = False
    shuffle_lines: bool = False
    shuffle_seed: int = 0
    num_used_data: tuple[int, ...] | None = None
    weight: float = 1.0
    resume_data_status: bool | None = None
    task: str | None = None
    text_loss: bool = False

    def __post_init__(self) -> None:
        used = self.num_used_data
        if used is not None and (len(used) != len(self.dataset_names) or min(used) < 1):
            raise ValueError(f"num_used_data {used} must hold a number above 0 for each dataset")
        if self.resume_data_status is not None:
            warnings.warn("resume_data_status has no effect: resuming is always exact", stacklevel=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPlace:
    """An entry of `dataset_info`. data_dir is a folder or a file; pictures of a JSONL start there."""

    data_dir: str
    jsonl_path: str | None = None
    parquet_info_path: str | None = None
    num_files: int | None = None
    num_total_samples: int | None = None


@dataclass(eq=False)
class Group:
    """Data sets of one task, as packing and loading see them (`samples.Dataset`); travels to workers."""

    name: str
    task: str
    sources: Sequence[tuple[Source, Path]]
    """Each with the folder that its relative paths start at."""
    setting: TaskSetting
    weight: float = 1.0
    is_mandatory: bool = False

    def __post_init__(self) -> None:
        self.blocks: Sequence[int] = [rows for source, _ in self.sources for rows in source.blocks]
        self.starts = list(accumulate((sum(source.blocks) for source, _ in self.sources), initial=0))

    def fields(self, row: int) -> tuple[Row, Path]:
        """What is stored of a row, and the folder that its relative paths start at."""
        place, index = located(self.starts, row)
        source, folder = self.sources[place]
        return source.row(index), folder

    def parts(self, row: int, rng: Random) -> list[Part]:
        fields, folder = self.fields(row)
        return TASKS[self.task](fields, replace(self.setting, rng=rng, folder=folder))

    def where(self, row: int) -> str:
        place, index = located(self.starts, row)
        return self.sources[place][0].where(index)


Known = tuple[dict[str, Any], Path]
"""A mapping from a file, and the folder that its relative paths start at."""


def read_mixture(
    source: str | Path | Mapping[str, Any],
    *,
    codec: TextCodec,
    config: BagelConfig,
    dropout: Dropout,
    dataset_info: str | Path | Mapping[str, Any] | None = None,
    tasks: Container[str] = TASKS,
) -> list[Group]:
    """The groups of a mixture YAML or its content; or of plain data: a file, or a folder of data sets.

    Groups of other tasks than those asked for are left out unopened. Raises ValueError for unknown keys,
    names and tasks (the nearest valid one is named), missing or damaged files, and picture sizes that do not
    fit the model.
    """
    vit = config.settings.vit_limits if config.vit else None
    default = TaskSetting(codec=codec, vae=config.settings.vae_limits, vit=vit, dropout=dropout)
    if isinstance(source, str | Path) and Path(source).suffix not in (".yaml", ".yml"):
        return _guessed(Path(source), default)
    described, base = _described(source)
    info, info_base = described.pop("dataset_info", None) or {}, base
    if dataset_info is not None:
        info, info_base = _described(dataset_info)
    if not described:
        raise ValueError(f"{source}: the mixture has no group; write one of {', '.join(TASKS)}")
    groups: list[Group] = []
    faults: list[str] = []
    for name, entry in described.items():
        try:
            args = from_json(GroupArgs, entry, name)
            task = args.task or name
            if task in TASKS and task not in tasks:
                continue
            setting = _fitted(default, name, task, args, config)
            known = {**(info.get(task) or {}), **(info.get(name) or {})}, info_base
            sources = [_opened(args, i, name, base, known) for i in range(len(args.dataset_names))]
            groups.append(Group(name, task, sources, setting, args.weight, args.is_mandatory))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return groups


def _described(source: str | Path | Mapping[str, Any]) -> Known:
    """The content of a YAML or JSON file, and the folder that its relative paths start at."""
    if isinstance(source, Mapping):
        return dict(source), Path()
    return read_yaml(source, "the mixture", "write groups such as t2i_pretrain:"), Path(source).parent


def _fitted(default: TaskSetting, name: str, task: str, args: GroupArgs, config: BagelConfig) -> TaskSetting:
    """The group's setting; ValueError for an unknown task, and for pictures that the model cannot take."""
    check_choice(f"{name}: task", task, TASKS)
    looks = task in UNDERSTANDING
    if (looks and config.vit is None) or (config.vae is None and not looks and task != "text"):
        lacking = "ViT to look at pictures with" if looks else "autoencoder to draw with"
        raise ValueError(f"{name}: the model has no {lacking}; leave the group out")
    vae, vit = args.image_transform_args, args.vit_image_transform_args
    vae, vit = (None, vit or vae) if looks else (vae, vit)
    setting = replace(default, frames=args.frame_sampler_args, text_loss=args.text_loss)
    endless = 2**20 if config.interpolate_pos else 0
    if vae:
        side = endless or config.max_latent_size
        setting = replace(setting, vae=vae.limits(f"{name}, for drawing", config.latent_stride, side))
    if vit and config.vit:
        side = endless or config.vit_max_num_patch_per_side
        setting = replace(setting, vit=vit.limits(f"{name}, for looking", config.vit.patch_size, side))
    return setting


def _opened(args: GroupArgs, index: int, name: str, base: Path, info: Known) -> tuple[Source, Path]:
    """A data set as dataset_info says, or where its name leads when that is a path."""
    dataset, (known, info_base) = args.dataset_names[index], info
    where = f"{name}: dataset {dataset!r}"
    if dataset in known:
        place, base = from_json(DatasetPlace, known[dataset], f"{where} in dataset_info"), info_base
    elif (base / dataset).exists():
        place = DatasetPlace(data_dir=dataset)
    else:
        raise ValueError(f"{where} is neither in dataset_info nor a path{nearest(dataset, known)}")
    folder = base / place.data_dir
    source = open_source(
        base / place.jsonl_path if place.jsonl_path else folder,
        num_used=args.num_used_data[index] if args.num_used_data else None,
        info=base / place.parquet_info_path if place.parquet_info_path else None,
        shuffle_seed=args.shuffle_seed if args.shuffle_lines else None,
    )
    return source, folder if folder.is_dir() else folder.parent


# plain data ------------------------------------------------------------------------------------------------


GUESSED_ROWS = 8
"""Rows tried in turn, for the first may be damaged."""


def guess_source(path: str | Path) -> tuple[str, Source]:
    """(task, source) of one data set, by the fields of a first row. ValueError when no task reads them."""
    source = open_source(Path(path))
    faults: list[str] = []
    for index in range(min(GUESSED_ROWS, sum(source.blocks))):
        try:
            return guess_task(source.row(index)), source
        except ValueError as error:
            faults.append(str(error))
    raise ValueError(f"{path}: {faults[0] if faults else 'there is no row'}")


def find_data(path: Path) -> Iterator[Path]:
    """The data sets in a folder, such as the official t2i/, editing/…, vlm/.

    One is a JSONL file, or a folder that itself holds parquet files, tars, pictures or their captions' file.
    """
    children = sorted(path.iterdir()) if path.is_dir() else []
    endings = {child.suffix.lower() for child in children} | {child.name for child in children}
    if not path.is_dir() or endings & {".parquet", ".tar", *PICTURE_ENDINGS, *CAPTIONS_FILES}:
        yield path
    elif ".jsonl" in endings:
        yield from (child for child in children if child.suffix == ".jsonl")
    else:
        for child in children:
            yield from find_data(child) if child.is_dir() else ()


def picture_folder(place: Path) -> Path:
    """Where relative paths start in a data set that nobody describes: images/ beside a JSONL file."""
    folder = place if place.is_dir() else place.parent
    images = folder / "images"
    return images if place.suffix == ".jsonl" and images.is_dir() else folder


def _guessed(path: Path, default: TaskSetting) -> list[Group]:
    groups: list[Group] = []
    for place in find_data(path):
        task, source = guess_source(place)
        name = place.name if place == path else place.relative_to(path).as_posix()
        groups.append(Group(name, task, [(source, picture_folder(place))], default))
    if not groups:
        raise ValueError(f"{path} holds no data; expected parquet, tar or JSONL files, or pictures")
    return groups
