"""Verbs about models as files: what they are, where they come from, what they become."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from openbagel import doctor
from openbagel.data.convert import check_vacant
from openbagel.dfloat11 import write_dfloat11
from openbagel.gguf_files import KINDS, write_gguf
from openbagel.hub import download, find_model, outlined
from openbagel.lora import bound, load_adapter, merge
from openbagel.memory import PRESETS, bytes_of, fit, parameters_of
from openbagel.placement import spreads
from openbagel.quantize import Precision, precision_of, quantize
from openbagel.train.stages import open_run
from openbagel.verbs.options import option, size_of, weighted
from openbagel.weights import (
    DTYPES,
    Checkpoint,
    config_in,
    config_json,
    describe,
    load_checkpoint,
    save_checkpoint,
)

FORMATS = (*DTYPES, *(str(one) for one in Precision), "dfloat11", *(f"gguf-{kind}" for kind in KINDS))


@dataclass(frozen=True, kw_only=True)
class Info:
    """say what a model is and what fits, without loading its weights"""

    model: str | None = option(
        positional=True, help=f"nano, a folder, a Hugging Face id, or {', '.join(PRESETS)}", nargs="?"
    )
    fit: str | None = option(
        "what fits a device of this memory, or several: 24GB, or 24GB,12GB", metavar="SIZE"
    )
    size: tuple[int, int] | None = option("of the pictures", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        name = self.model or "nano"
        with outlined(name) as folder:  # presets have none
            config = PRESETS[name]() if name in PRESETS else config_in(folder)
            stored = {} if self.fit or name in PRESETS else describe(folder)
        if self.fit is None:
            told = {"model": name, "parameters": parameters_of(config)}
            told |= {fact: stored[fact] for fact in ("dtypes", "quantization") if stored}
            print(json.dumps(told | {"config": config_json(config)}, indent=2))
            return
        memory = [bytes_of(one) for one in self.fit.split(",")]
        print("\n".join(fit(config, "FOLDER" if name in PRESETS else name, memory[0], self.size)))
        if len(memory) > 1:
            print("\n".join(spreads(config, memory, self.size)))


@dataclass(frozen=True, kw_only=True)
class Download:
    """bring a model of the Hugging Face Hub here; goes on where it was cut"""

    model: str = option(positional=True, help="owner/name, or owner/name@revision")
    to: Path | None = option("a folder; default: the usual cache, where every verb finds it")
    revision: str | None = option("a branch, tag or commit")
    workers: int = option("requests at a time", 8)

    def run(self) -> None:
        print(download(self.model, to=self.to, revision=self.revision, workers=self.workers))


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """say what of this machine, and of a model, is wrong, and how to repair it"""

    model: str | None = option(positional=True, help="nano, a folder, or an id in the cache", nargs="?")

    def run(self) -> int:
        return doctor.main(self.model)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """write a model, or a checkpoint of a run, as an official folder"""

    source: str = option(
        positional=True, help="nano, a checkpoint folder, a Hugging Face model id, or a run's folder"
    )
    output: Path = option(positional=True, help="the folder to write")
    lora: list[tuple[str, float]] | None = weighted("an adapter to merge into the weights; may be repeated")
    weights: str = option("of a run: the averaged weights or the last ones", "ema", choices=("ema", "model"))
    to: str = option("precision or format of the stored weights", "bfloat16", choices=FORMATS)
    shard_gb: float | None = option("split the transformer into files of this size, in gigabytes")

    def run(self) -> None:
        check_vacant(self.output)
        checkpoint = open_run(self.source, self.weights) or load_checkpoint(find_model(self.source))
        for name, weight in self.lora or ():
            load_adapter(checkpoint.model, find_model(name), weight=weight)
        if bound(checkpoint.model):
            merge(checkpoint.model)
        self.write(checkpoint)
        print(self.output)

    def write(self, checkpoint: Checkpoint) -> None:
        if (before := precision_of(checkpoint.model)) is not None:
            raise ValueError(f"the weights of {self.source} are {before} already; convert the original ones")
        if self.shard_gb is not None and self.to.startswith(("dfloat11", "gguf")):
            raise ValueError(f"--shard-gb has no effect with --to {self.to}; leave it out")
        if self.to == "dfloat11":
            return write_dfloat11(self.output, checkpoint)
        if self.to.startswith("gguf-"):
            return write_gguf(self.output, checkpoint, self.to.removeprefix("gguf-"))
        if self.to not in DTYPES:
            needs_cuda = self.to == Precision.INT4 and torch.cuda.is_available()
            quantize(checkpoint.model, self.to, device="cuda" if needs_cuda else None)
        shard_bytes = None if self.shard_gb is None else int(self.shard_gb * 1e9)
        dtype = getattr(torch, self.to if self.to in DTYPES else "bfloat16")
        save_checkpoint(self.output, checkpoint, dtype=dtype, shard_bytes=shard_bytes)
