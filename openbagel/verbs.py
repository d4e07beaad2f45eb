"""The verbs of the command line: `openbagel generate` and all others.

Every verb is a frozen dataclass: its fields are its arguments, its docstring is its help, its `run` does the
work and returns an exit code other than 0 if it has one.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from openbagel import doctor
from openbagel.config import Sampling, adjusted
from openbagel.data.convert import Format, convert
from openbagel.data.doctor import Examination, examine
from openbagel.data.packing import Packing
from openbagel.demo import sheet
from openbagel.dfloat11 import write_dfloat11
from openbagel.evals import curve
from openbagel.evals.page import page
from openbagel.evals.world import Plan, evaluate, report, table
from openbagel.flow import Renorm
from openbagel.gguf_files import KINDS, write_gguf
from openbagel.hub import download, find_model
from openbagel.images import clip_writer, read_frames, save_picture
from openbagel.inference.events import Event, Preview, Text, Thought
from openbagel.inference.pipeline import Bagel
from openbagel.lora import bound, load_adapter, merge
from openbagel.memory import PRESETS, bytes_of, fit, weights_of
from openbagel.placement import OFFLOADS, spreads
from openbagel.quantize import Precision, precision_of, quantize
from openbagel.train.metrics import plot
from openbagel.train.recipe import read_recipe
from openbagel.train.stages import dry_step, open_run, train
from openbagel.weights import (
    Checkpoint,
    config_in,
    config_json,
    default_device,
    describe,
    load_checkpoint,
    save_checkpoint,
)
from openbagel.world.dataset import write_example

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = (*DTYPES, *(str(one) for one in Precision), "dfloat11", *(f"gguf-{kind}" for kind in KINDS))


def option(help: str, default: Any = None, **argument: Any) -> Any:
    """A field that is an option; argument goes to argparse."""
    return field(default=default, metadata={"help": help, **argument})


def size_of(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT to (height, width)."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, for example 64x64")
    return int(height), int(width)


def limit_of(text: str) -> tuple[str, str]:
    """DEVICE=SIZE, for example 0=24GB."""
    device, equals, size = text.partition("=")
    if not (device and equals and size):
        raise argparse.ArgumentTypeError(f"{text!r} is no limit; write DEVICE=SIZE, for example 0=24GB")
    return device, size


def adapter_of(text: str) -> tuple[str, float]:
    """NAME=WEIGHT, or NAME alone for the weight 1."""
    name, _, weight = text.rpartition("=")
    with suppress(ValueError):
        return name or text, float(weight if name else 1)
    return text, 1.0


def weighted(help: str) -> Any:
    """An option for adapters with their weights."""
    return option(help, metavar="NAME[=WEIGHT]", type=adapter_of, action="append")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    model: str = option("nano, a checkpoint folder, or a Hugging Face model id", "nano")
    device: str | None = option("cpu, cuda, cuda:1, mps; default: CUDA if there is one")
    dtype: str | None = option("weights and compute; default: bfloat16 where it is fast", choices=DTYPES)
    quantize: str | None = option("pack the decoder's linears", choices=[str(one) for one in Precision])
    lora: list[tuple[str, float]] | None = weighted(
        "an adapter to bind (path or Hugging Face id); may be repeated"
    )
    offload: str | None = option("leave the weights in host memory, streamed from there", choices=OFFLOADS)
    max_memory: list[tuple[str, str]] | None = option(
        "spread over devices, up to so much of each", nargs="+", type=limit_of, metavar="DEVICE=SIZE"
    )
    understanding_only: bool = option("load no more than looking and writing takes", False)

    def load(self) -> Bagel:
        dtype = getattr(torch, self.dtype) if self.dtype else None
        options = {"quantize": self.quantize, "lora": dict(self.lora or ()), "offload": self.offload}
        options |= {"max_memory": dict(self.max_memory or ()) or None}
        options |= {"understanding_only": self.understanding_only}
        return Bagel.load(self.model, device=self.device, dtype=dtype, **options)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    think: bool = option("let the model think in words first", False)
    seed: int = option("of the noise and of sampled tokens", 0)
    max_tokens: int | None = option("longest answer")
    max_think_tokens: int | None = option("longest thought")
    temperature: float | None = option("of sampled tokens; 0 is greedy")
    top_p: float | None = option("keep the likeliest tokens up to this share")
    top_k: int | None = option("keep so many of the likeliest tokens")
    num_timesteps: int | None = option("schedule points; one step fewer is made")
    timestep_shift: float | None = option("above 1: more steps where there is much noise")
    taylorseer: bool | None = option("forecast two of three steps (approximate)")
    tiled_vae: bool | None = option("run the autoencoder in tiles: less memory for large pictures")
    text_guidance: float | None = option("scale of the text guidance; 1 is off")
    image_guidance: float | None = option("scale of the image guidance; 1 is off")
    guidance_interval: tuple[float, float] | None = option(
        "times at which guidance acts", metavar=("LOW", "HIGH")
    )
    renorm: Renorm | None = option("how a guided velocity is scaled back")
    renorm_min: float | None = option("least factor of the renormalisation; 1 is off")

    def over(self, default: Sampling) -> Sampling:
        """A model's default with what was asked for."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}
        return adjusted(default, {name: own[name] for name in own if name not in ("think", "seed")})


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions, SamplingOptions):
    """draw pictures from prompts"""

    prompt: str | None = option(positional=True, help="what to draw", nargs="?")
    prompts: Path | None = option("a text file with one prompt a line, instead of PROMPT")
    output: Path = option("a PNG file, or a folder for several pictures", Path("out.png"), short="-o")
    num: int = option("pictures of each prompt, with seeds SEED, SEED+1, …", 1)
    size: tuple[int, int] | None = option("of the picture in pixels", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        prompts = [prompt for prompt in self._prompts() for _ in range(self.num)]
        paths = numbered(self.output, len(prompts))
        bagel = self.load()
        sampling = self.over(bagel.config.settings.draw)
        with progress(len(prompts) * (sampling.num_timesteps - 1)) as bar:
            drawer = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            pictures = drawer.generate(prompts, size=self.size, seed=self.seed, think=self.think)
        for picture, path in zip(pictures, paths, strict=True):
            keep(picture, path)

    def _prompts(self) -> list[str]:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either a PROMPT or --prompts FILE")
        if self.num < 1:
            raise ValueError(f"--num {self.num} must be at least 1")
        if self.prompts is None:
            return [self.prompt or ""]
        lines = [line.strip() for line in self.prompts.read_text("utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"{self.prompts} holds no prompt; write one a line")
        return [line for line in lines if line]


@dataclass(frozen=True, kw_only=True)
class Ask(ModelOptions, SamplingOptions):
    """answer a question about pictures, or about none"""

    parts: list[str] = option(
        positional=True, help="picture files, then the question", nargs="+", metavar="IMAGE… QUESTION"
    )

    def run(self) -> None:
        *images, question = self.parts
        bagel = self.load()
        speaker = bagel.using(self.over(bagel.config.settings.ask), listen=speak)
        speaker.ask(images, question, seed=self.seed, think=self.think)
        print()


@dataclass(frozen=True, kw_only=True)
class Edit(ModelOptions, SamplingOptions):
    """change pictures as an instruction says"""

    parts: list[str] = option(
        positional=True, help="picture files, then the instruction", nargs="+", metavar="IMAGE… INSTRUCTION"
    )
    output: Path = option("a PNG file", Path("out.png"), short="-o")
    size: tuple[int, int] | None = option("of the picture in pixels", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        *images, instruction = self.parts
        if not images:
            raise ValueError("give at least one picture file before the instruction")
        bagel = self.load()
        sampling = self.over(bagel.config.settings.edit)
        with progress(sampling.num_timesteps - 1) as bar:
            editor = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            picture = editor.edit(images, instruction, size=self.size, seed=self.seed, think=self.think)
        keep(picture, self.output)


@dataclass(frozen=True, kw_only=True)
class Video(ModelOptions, SamplingOptions):
    """continue a clip, or film a prompt"""

    frames: list[str] | None = option(
        positional=True, help="the clip's first frames: picture, GIF or video files", nargs="*"
    )
    prompt: str | None = option("what happens in the clip")
    num_frames: int = option("frames to draw", 10)
    fps: float = option("frames a second of the file", 4.0)
    include_given: bool = option("put the given frames before the drawn ones", False)
    output: Path = option("a GIF or MP4 file", Path("out.gif"), short="-o")
    size: tuple[int, int] | None = option("of the frames in pixels", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        if self.think:
            raise ValueError("--think has no effect on clips; leave it out")
        if not (self.frames or self.prompt):
            raise ValueError("nothing to film: give FRAMES, --prompt TEXT, or both")
        write = clip_writer(self.output, self.fps)
        given = [frame for path in self.frames or [] for frame in read_frames(Path(path))]
        bagel = self.load()
        settings = bagel.config.settings
        sampling = self.over(settings.edit if given and self.prompt else settings.draw)
        groups = -(-self.num_frames // settings.video_group)
        with progress(groups * (sampling.num_timesteps - 1)) as bar:
            camera = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            drawn = camera.continue_video(
                given, self.num_frames, prompt=self.prompt, size=self.size, seed=self.seed
            )
        shown = [frame.resize(drawn[0].size) for frame in given] if self.include_given else []
        write([*shown, *drawn])
        print(self.output)


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
        if name not in PRESETS and self.fit is None:
            print(json.dumps(describe(find_model(name)), indent=2))
            return
        config = PRESETS[name]() if name in PRESETS else config_in(find_model(name))
        if self.fit is None:
            counts = {part: size // 4 for part, size in weights_of(config, "float32").parts.items()}
            print(json.dumps({"parameters": counts, "config": config_json(config)}, indent=2))
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
class Demo(ModelOptions):
    """draw, answer, edit, think, and all else that the model learned, on one sheet"""

    output: Path = option("the PNG file; a clip is put beside it", Path("demo/sheet.png"), short="-o")

    def run(self) -> None:
        picture, clip = sheet(self.load(), report=lambda line: print(line, flush=True))
        keep(picture, self.output)
        if clip:
            beside = self.output.with_name("clip.gif")
            clip_writer(beside, fps=4.0)(clip)
            print(beside)


@dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """score a model; suite: world"""

    suite: str = option(positional=True, help="which benchmark", choices=("world",))
    kinds: list[str] | None = option("kinds of tasks; default: all that the model's world has", nargs="+")
    samples: int = option("examples of each kind", 50)
    world: str | None = option("nano or full; default: the one that the model was trained on")
    held_out: bool = option("only examples with something held out, such as pairs of shape and colour", False)
    think: bool = option("let the model think first", False)
    output: Path | None = option("a JSON file with every verdict; an HTML page is put beside it", short="-o")

    def run(self) -> None:
        bagel = self.load()
        plan = Plan(
            kinds=tuple(self.kinds or ()),
            samples=self.samples,
            world=self.world,
            held_out=self.held_out,
            think=self.think,
        ).for_model(bagel)
        with progress(len(plan.kinds) * plan.samples, unit="example") as bar:
            records = list(evaluate(bagel, plan, bar.update))
        print(table(records))
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            told = report(records, plan, bagel, self.model)
            self.output.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
            beside = self.output.with_suffix(".html")
            beside.write_text(page(records, f"{self.model} in world {plan.world}"), "utf-8")
            print(self.output, beside, sep="\n")


@dataclass(frozen=True, kw_only=True)
class EvalCurve:
    """score the checkpoints of a training run and draw when each ability emerges"""

    run_folder: Path = option(positional=True, help="a folder that `openbagel train` wrote", metavar="RUN")
    output: Path | None = option("the PNG file, its numbers beside it; default: RUN/curve.png", short="-o")
    kinds: list[str] | None = option("kinds of tasks; default: all that the model's world has", nargs="+")
    samples: int = option("examples of each kind", 50)
    weights: str = option("the averaged weights or the last ones", "ema", choices=("ema", "model"))
    device: str | None = option("cpu, cuda, cuda:1, mps; default: CUDA if there is one")

    def run(self) -> None:
        output = self.output or self.run_folder / "curve.png"
        plan = Plan(kinds=tuple(self.kinds or ()), samples=self.samples)
        points = curve.score(self.run_folder, plan, self.load, output.with_suffix(".json"), print)
        print(curve.table(points))
        print(curve.draw(points, output))

    def load(self, folder: Path) -> Bagel:
        checkpoint = open_run(folder, self.weights)
        assert checkpoint is not None
        device = torch.device(self.device or default_device())
        for part in filter(None, (checkpoint.model, checkpoint.autoencoder)):
            part.to(device)
        return Bagel(checkpoint)


@dataclass(frozen=True, kw_only=True)
class Train:
    """train a model from a recipe"""

    recipe: str = option(positional=True, help="a YAML file, for example recipes/nano_finetuning.yaml")
    overrides: list[str] = option(
        positional=True, help="keys to change, for example model.steps=200", nargs="*", metavar="KEY=VALUE"
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
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty; name a new folder")
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


VERBS: dict[str, type] = {
    verb.__name__.lower(): verb
    for verb in (Generate, Ask, Edit, Video, Info, Download, Doctor, Demo, Eval, Train, Convert)
}
VERBS |= {
    "eval curve": EvalCurve,
    "train plot": TrainPlot,
    "data doctor": DataDoctor,
    "data convert": DataConvert,
    "data example": DataExample,
}


@contextmanager
def progress(total: int, unit: str = "step") -> Iterator[tqdm]:
    """A bar on a terminal, nothing elsewhere."""
    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:
        yield bar


def speak(event: Event) -> None:
    """Prints an answer as it comes; thoughts go to the error stream."""
    if isinstance(event, Text):
        print(event.text, end="", flush=True)
    elif isinstance(event, Thought):
        print(event.text, end="\n", file=sys.stderr, flush=True)


def numbered(output: Path, count: int) -> list[Path]:
    """One path, or several: out-1.png, out-2.png …, or 1.png, 2.png … in a folder."""
    if count == 1:
        return [output if output.suffix else output / "1.png"]
    width = len(str(count))
    numbers = [f"{i:0{width}d}" for i in range(1, count + 1)]
    if output.suffix:
        return [output.with_stem(f"{output.stem}-{number}") for number in numbers]
    return [output / f"{number}.png" for number in numbers]


def keep(picture: Image.Image, path: Path) -> None:
    save_picture(picture, path)
    print(path)
