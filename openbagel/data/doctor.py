"""What is wrong with data, and what it will be in training: every row read, every picture decoded.

mixture ──> data sets ──> rows ──> problems (file, row, field, remedy)
                               └─> tokens ──> table, fill of packs
                               └─> first samples ──> samples.png, pack.png, one step
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from openbagel.attention import visible
from openbagel.config import BagelConfig
from openbagel.data.convert import mapped
from openbagel.data.mixture import Group, read_mixture
from openbagel.data.packing import Packing, PackingMethod, Stream, Supply, pair_cost
from openbagel.data.samples import Draw, Extent, Look, Part, Pixels, Role, Sample, SampleId, decode, extent
from openbagel.data.tasks import NEVER, picture_in
from openbagel.images import to_picture
from openbagel.sequence import Frame, PackedSequence, Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec

SEED, EPOCHS = 0, 4
"""A row is planned as in so many epochs: captions, instructions and groups are drawn anew in each."""
PACKS, SAMPLES, STREAMS = 32, 10_000, 2
"""Packs made to measure how full they are (fewer where they hold so many samples): of the streams by turns,
the second half, when all waiting samples are usual ones.
"""
SHOWN, LISTED = 2, 20
"""Samples of each data set in the previews; problems of each that are printed."""
DryRun = Callable[[list[Sample]], dict[str, float]]
"""One training step on these samples; gives numbers by name, such as ce and mse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """How data is examined. rows: so many of each data set, spread evenly; previews: a folder."""

    rows: int | None = None
    packing: Packing = Packing()
    dataset_info: Path | None = None
    previews: Path | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Where: a file and row, or a file, or a step. What: the field, its fault and the remedy."""

    dataset: str
    where: str
    what: str


Plan = tuple[Extent, ...]
"""What a row costs as it is planned in one epoch: in all, its texts, its looks, its latents."""


@dataclass(eq=False, slots=True)
class Examined:
    """A data set: one group of the mixture. plans: EPOCHS of each good row."""

    group: Group
    good: list[int] = field(default_factory=list)
    bad: int = 0
    plans: list[Plan] = field(default_factory=list)
    packs: float = math.nan
    """Packs of the whole mixture in which every row of this data set comes once."""

    def cells(self) -> list[str]:
        tokens = np.array([[extent.tokens for extent in plan] for plan in self.plans] or [[0] * 4])
        counts = (self.group.starts[-1], len(self.good), self.bad)
        spreads = (f"{n.min()}/{np.median(n):.0f}/{n.mean():.0f}/{n.max()}" for n in tokens.T)
        return [self.group.name, *map(str, counts), *spreads, f"{self.packs:.1f}"]


@dataclass(slots=True)
class Report:
    """fill: the share of max_num_tokens that packs use, by method; dry_run: what it gave, and its seconds."""

    packing: Packing
    datasets: list[Examined] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    fill: dict[str, float] = field(default_factory=dict)
    previews: tuple[Path, ...] = ()
    dry_run: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: the table, the packs, the step, then the problems of each data set."""
        head = ["data set", "rows", "good", "bad", "tokens", "text", "ViT", "VAE", "packs an epoch"]
        table = [head, *(dataset.cells() for dataset in self.datasets)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        lines += ["(tokens of a sample: minimum/median/mean/maximum; a step takes one pack for each rank)"]
        fill = ", ".join(f"{method} {share:.1%}" for method, share in self.fill.items())
        lines += [f"packs of {self.packing.max_num_tokens} tokens are full to: {fill}"] if fill else []
        results = ", ".join(f"{name} {value:.4g}" for name, value in self.dry_run.items())
        lines += [f"one step: {results}"] if results else []
        lines += [f"drawn: {path}" for path in self.previews]
        for name in dict.fromkeys(problem.dataset for problem in self.problems):
            own = [f"{problem.where}: {problem.what}" for problem in self.problems if problem.dataset == name]
            lines += own[:LISTED] + [f"{name}: {len(own) - LISTED} more"] * (len(own) > LISTED)
        return [*lines, f"{len(self.problems) or 'no'} problem{'s' * (len(self.problems) != 1)}"]


def examine(
    paths: Sequence[str | Path],
    *,
    config: BagelConfig,
    codec: TextCodec,
    options: Examination | None = None,
    dry_run: DryRun | None = None,
) -> Report:
    """Examines mixtures (YAML), data files and folders of data for one model; what is wrong is in the report.

    A problem names the row and field that are wrong, or the file or entry that cannot be read at all.
    """
    options = options or Examination()
    report = Report(options.packing)
    known: dict[str, Any] = {"codec": codec, "config": config, "dataset_info": options.dataset_info}
    for path in dict.fromkeys(map(str, paths)):
        try:
            for group in read_mixture(path, dropout=NEVER, **known):  # the longest that a row gets
                group.name = f"{path}: {group.name}" if len(paths) > 1 else group.name
                report.datasets.append(Examined(group))
        except ValueError as error:
            report.problems.append(Problem(path, path, str(error)))
    for dataset in report.datasets:
        report.problems += _faults(dataset, config, options)
    usable = [dataset for dataset in report.datasets if dataset.good]
    methods = sorted(PackingMethod, key=lambda method: method is options.packing.method)  # its packs stay
    for method in methods if usable else ():
        report.fill[method.value] = _packed(usable, replace(options.packing, method=method), config)
    samples = list(_first(usable, options.packing.max_num_tokens, config))
    if dry_run and samples:
        report.dry_run, failures = _step(dry_run, samples)
        report.problems += failures
    if options.previews and samples:
        report.previews = _previews(samples, options.previews, Packer(config, codec))
    return report


# rows ------------------------------------------------------------------------------------------------------


def _faults(dataset: Examined, config: BagelConfig, options: Examination) -> Iterator[Problem]:
    """The first thing that is wrong with each row; on the way it is filled in what the rows are."""
    group, rows = dataset.group, dataset.group.starts[-1]
    count = max(min(options.rows or rows, rows), 1)
    for turn in tqdm(range(count), desc=group.name, disable=None, leave=False):
        row = turn * rows // count
        try:
            dataset.plans += _plans(group, row, options.packing.longest, config)
            dataset.good.append(row)
        except (OSError, ValueError) as error:
            dataset.bad += 1
            yield Problem(group.name, group.where(row), str(error))


def _plans(group: Group, row: int, most: int, config: BagelConfig) -> list[Plan]:
    """Those of a row in each epoch. ValueError for a row with a fault, or of more than so many tokens."""
    plans: list[Plan] = []
    fields, folder = group.fields(row)
    mapped(fields, lambda name, value: picture_in(folder, value, name, whole=True))
    for epoch in range(EPOCHS):
        parts = group.parts(row, SampleId(group.name, epoch, row).random(SEED, "parts"))
        kinds = ([part for part in parts if isinstance(part, kind)] for kind in (Part, Text, Look, Draw))
        plans.append(tuple(extent(kind, config) for kind in kinds))
        if fields.get("video"):
            decode(parts)
    if (longest := max(plan[0].tokens for plan in plans)) > most:
        remedy = "raise it, lower max_image_size, or shorten the row"
        raise ValueError(f"{longest} tokens, max_num_tokens_per_sample is {most}; {remedy}")
    return plans


# packs and one step ----------------------------------------------------------------------------------------


def _packed(usable: Sequence[Examined], packing: Packing, config: BagelConfig) -> float:
    """How full packs of the good rows are; on the way the data sets hear how many packs an epoch lasts."""
    datasets = {dataset.group.name: dataset for dataset in usable}

    def measure(id: SampleId) -> Extent:
        """Of the row itself, or of a good one near it."""
        dataset = datasets[id.dataset]
        place = id.row * len(dataset.good) // dataset.group.starts[-1]
        return dataset.plans[place * EPOCHS + id.epoch % EPOCHS][0]

    groups = [dataset.group for dataset in usable]
    supply = Supply(groups, packing, seed=SEED, measure=measure, pair_cost=pair_cost(config))
    streams = [Stream(supply, index) for index in range(min(STREAMS, packing.streams))]
    packs: list[Any] = []
    while len(packs) < PACKS and sum(map(len, packs)) < SAMPLES:
        packs += [stream.next_pack()[0] for stream in streams]
    packs = packs[len(packs) // 2 :]
    samples = [sample for pack in packs for sample in pack]
    seen = Counter(sample.id.dataset for sample in samples)
    for name, dataset in datasets.items():
        dataset.packs = dataset.group.starts[-1] * len(packs) / seen[name] if seen[name] else math.nan
    return sum(sample.extent.tokens for sample in samples) / (len(packs) * packing.max_num_tokens)


def _first(usable: Sequence[Examined], most: int, config: BagelConfig) -> Iterator[Sample]:
    """The first samples of every data set, as many as one pack of `most` tokens holds."""
    tokens = 0
    for turn, dataset in itertools.product(range(SHOWN), usable):
        for row in dataset.good[turn : turn + 1]:
            id = SampleId(dataset.group.name, 0, row)
            parts = dataset.group.parts(row, id.random(SEED, "parts"))
            tokens += extent(parts, config).tokens
            if tokens <= most:
                yield Sample(id, decode(parts))


def _step(dry_run: DryRun, samples: list[Sample]) -> tuple[dict[str, float], list[Problem]]:
    started = time.perf_counter()
    try:
        results = dry_run(samples)
    except (ValueError, RuntimeError) as error:
        return {}, [Problem("one step", "one step on the first samples", f"fails: {error}")]
    wrong = [name for name, value in results.items() if not math.isfinite(value)]
    problems = [Problem("one step", name, f"is {results[name]}; check the weights") for name in wrong]
    return results | {"seconds": time.perf_counter() - started}, problems


# previews --------------------------------------------------------------------------------------------------

TEXT, LEARNED, VIT = "text", "learned text", "ViT"
COLOURS = {TEXT: "#4a82bd", LEARNED: "#2f6296", VIT: "#3f9e83"}
COLOURS |= {Role.CONDITION: "#e5a83b", Role.TARGET: "#d9604c", Role.GROUP: "#a868a8"}
PAPER, INK, PALE = "#ffffff", "#1f2933", "#f1f3f5"
TILE, GAP, TILES, CELLS = 128, 16, 16, 640
"""Pixels of a tile and around it; most tiles of a sample; most cells of the mask's side."""


def _previews(samples: Sequence[Sample], folder: Path, packer: Packer) -> tuple[Path, Path]:
    """Draws the samples, and the pack they make with its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [[piece for part in sample.parts for piece in _shown(part, packer.config)] for sample in samples]
    paths = folder / "samples.png", folder / "pack.png"
    _draw_samples(samples, shown, packer.codec).save(paths[0])
    pack = packer.pack([[segment for _, _, segment in pieces] for pieces in shown])
    _draw_pack(pack, [kind for pieces in shown for kind, _, _ in pieces]).save(paths[1])
    return paths


_Shown = tuple[str, Sequence[Text | Tensor], Segment]
"""Its kind, its text or pictures, its segment with zeros in place of latents."""


def _shown(part: Text | VitImage | Pixels, config: BagelConfig) -> list[_Shown]:
    """What makes tokens: nothing of a dropped condition."""
    if isinstance(part, Text):
        return [(LEARNED if part.loss else TEXT, (part,), part)]
    if isinstance(part, VitImage):
        return [] if part.pixels is None else [(VIT, (part.pixels,), part)]
    grids = [[side // config.latent_stride for side in pixels.shape[1:]] for pixels in part.frames]
    frames = [Frame(torch.zeros(h * w, config.latent_channels), (h, w)) for h, w in grids]
    image = VaeImage(tuple(frames), hidden=part.role is Role.TARGET)
    return [(part.role, part.frames, image)] * (part.copies if frames else 0)


def _draw_samples(samples: Sequence[Sample], shown: Sequence[list[_Shown]], codec: TextCodec) -> Image.Image:
    """A row of tiles for each sample, in the order of its parts."""
    step, height = TILE + GAP, TILE + 3 * GAP
    sheet = Image.new("RGB", (TILES * step + GAP, len(samples) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (sample, pieces) in enumerate(zip(samples, shown, strict=True)):
        y = index * height + GAP
        draw.text((GAP, y - GAP), f"{sample.id.dataset}, row {sample.id.row}", INK)
        tiles = [(kind, item) for kind, items, _ in pieces for item in items]
        for x, (kind, item) in zip(range(GAP, TILES * step, step), tiles, strict=False):
            draw.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), PALE, COLOURS[kind], 2)
            draw.text((x, y + TILE + 2), kind, COLOURS[kind])
            if isinstance(item, Text):
                words = "\n".join(wrap(codec.decode(item.ids), 20)[:9])
                draw.multiline_text((x + 4, y + 2), words, INK, spacing=2)
            else:
                sheet.paste(ImageOps.contain(to_picture(item), (TILE, TILE)), (x, y))
    return sheet


def _draw_pack(pack: PackedSequence, kinds: Sequence[str]) -> Image.Image:
    """Tokens coloured by kind, and below what each sees in a row of its own; long packs are thinned out."""
    stored = torch.argsort(pack.logical)
    places = stored[torch.linspace(0, len(pack) - 1, min(len(pack), CELLS)).long()]
    seen = visible(pack, places[:, None], places[None, :]).numpy()
    colours = np.array([ImageColor.getrgb(COLOURS[kind]) for kind in kinds], np.uint8)[pack.split[places]]
    cells = np.where(seen[..., None], colours, np.array(ImageColor.getrgb(PALE), np.uint8))
    sheet = Image.new("RGB", (CELLS + 2 * GAP, CELLS + 5 * GAP), PAPER)
    for pixels, top, height in ((colours[None], GAP, GAP // 2), (cells, 2 * GAP, CELLS)):
        picture = Image.fromarray(pixels).resize((CELLS, height), Image.Resampling.NEAREST)
        sheet.paste(picture, (GAP, top))
    draw = ImageDraw.Draw(sheet)
    title = f"{len(pack)} tokens of {len(pack.lengths)} samples; a row shows what a token sees"
    draw.text((GAP, 0), title, INK)
    for index, kind in enumerate(dict.fromkeys(kinds)):
        draw.text((GAP + 100 * index, CELLS + 3 * GAP), kind, COLOURS[kind])
    return sheet
