"""Verbs that train models, and look after data."""

from dataclasses import dataclass
from pathlib import Path

import torch

from openbagel.data.convert import Format, convert
from openbagel.data.doctor import Examination, examine
from openbagel.data.packing import Packing
from openbagel.hub import find_model
from openbagel.train.metrics import plot
from openbagel.train.recipe import read_recipe
from openbagel.train.stages import dry_step, train
from openbagel.verbs.options import option
from openbagel.weights import load_checkpoint
from openbagel.world.dataset import write_example


@dataclass(frozen=True, kw_only=True)
class Train:
    """train a model from a recipe"""

    recipe: str = option(positional=True, help="a YAML file, for example recipes/nano_finetuning.yaml")
    overrides: list[str] = option(
        positional=True, help="keys to change, for example train.steps=200", nargs="*", metavar="KEY=VALUE"
    )

    def run(self) -> None:
        print(train(read_recipe(self.recipe, self.overrides or [])))


@dataclass(frozen=True, kw_only=True)
class TrainPlot:
    """draw the curves of training runs"""

    runs: list[str] = option(
        positional=True, help="folders that `openbagel train` wrote", nargs="+", metavar="RUN"
    )
    output: Path = option("the PNG file", Path("curves.png"), short="-o")
    smoothing: float = option("weight of the past, in [0, 1)", 0.6)

    def run(self) -> None:
        print(plot(self.runs, self.output, smoothing=self.smoothing))


@dataclass(frozen=True, kw_only=True)
class DataDoctor:
    """find what is wrong with data, count its tokens and draw previews"""

    paths: list[str] = option(
        positional=True, help="mixtures (YAML), data files, or folders of them", nargs="+", metavar="PATH"
    )
    model: str = option("whose tokenizer, picture sizes and dry step", "nano")
    rows: int | None = option("so many rows of each data set, spread evenly; default: all")
    max_num_tokens: int = option("room of a pack", Packing().max_num_tokens)
    dataset_info: Path | None = option("a YAML file with the paths that a mixture leaves out")
    previews: Path | None = option("a folder for pictures of samples, packs and masks", short="-o")

    def run(self) -> int:
        checkpoint = load_checkpoint(find_model(self.model), dtype=torch.float32)
        options = Examination(
            rows=self.rows,
            packing=Packing(max_num_tokens=self.max_num_tokens),
            dataset_info=self.dataset_info,
            previews=self.previews,
        )
        report = examine(
            self.paths,
            config=checkpoint.config,
            codec=checkpoint.codec,
            options=options,
            dry_run=lambda samples: dry_step(checkpoint, samples),
        )
        print("\n".join(report.lines()))
        return 1 if report.problems else 0


@dataclass(frozen=True, kw_only=True)
class DataConvert:
    """rewrite data in another format"""

    source: Path = option(positional=True, help="a file or a folder of data")
    output: Path = option(positional=True, help="the folder to write")
    format: Format = option("parquet, jsonl, tar (WebDataset), or a folder of pictures", Format.PARQUET)

    def run(self) -> int:
        done = convert(self.source, self.output, self.format)
        print("\n".join(done.lines()))
        return 1 if done.skipped else 0


@dataclass(frozen=True, kw_only=True)
class DataExample:
    """write a small data set of every kind, with a mixture that trains nano"""

    folder: Path = option(positional=True, help="an empty or new folder")
    rows: int = option("of each kind", 48)
    seed: int = option("of the scenes", 0)

    def run(self) -> None:
        print(write_example(self.folder, rows=self.rows, seed=self.seed))
