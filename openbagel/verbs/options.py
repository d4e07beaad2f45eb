"""What verbs share: fields that are arguments, the options of models and of sampling, progress and
output."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tqdm import tqdm

from openbagel.config import Sampling, adjusted
from openbagel.flow import Renorm
from openbagel.inference.pipeline import Bagel
from openbagel.picture_files import make_place, save_picture
from openbagel.placement import OFFLOADS
from openbagel.quantize import Precision
from openbagel.weights import DTYPES


def option(help: str, default: Any = None, **argument: Any) -> Any:
    """A field that is an option; argument goes to argparse."""
    return field(default=default, metadata={"help": help, **argument})


def size_of(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT to (height, width)."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, for example 64x64")
    return int(height), int(width)


def limit_of(text: str) -> tuple[str, str]:
    """DEVICE=SIZE, for example 0=24GB."""
    device, equals, size = text.partition("=")
    if not (device and equals and size):
        raise argparse.ArgumentTypeError(f"{text!r} is no limit; write DEVICE=SIZE, for example 0=24GB")
    return device, size


def setting_of(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value in YAML: queue=8, url_hosts=[example.com]."""
    key, equals, value = text.partition("=")
    with suppress(yaml.YAMLError):
        if equals:
            return key, yaml.safe_load(value)
    raise argparse.ArgumentTypeError(f"{text!r} is no setting; write KEY=VALUE, for example queue=8")


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
        options = {"quantize": self.quantize, "lora": dict(self.lora or ()), "offload": self.offload}
        options |= {"max_memory": dict(self.max_memory or ()) or None}
        options |= {"understanding_only": self.understanding_only}
        return Bagel.load(self.model, device=self.device, dtype=self.dtype, **options)


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
    eta: float | None = option("share of the noise drawn anew at every step, 0 to 1; 0 is Euler's way")
    taylorseer: bool | None = option("forecast two of three steps (approximate)")
    tiled_vae: bool | None = option("run the autoencoder in tiles: less memory for large pictures")
    negative_prompt: str | None = option("what a picture should not show")
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


@contextmanager
def progress(total: int, unit: str = "step") -> Iterator[tqdm]:
    """A bar on a terminal, nothing elsewhere."""
    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:
        yield bar


def numbered(output: Path, count: int = 1, given: Sequence[str] = ()) -> list[Path]:
    """One path, or several: out-1.png, out-2.png …, or 1.png, 2.png … in a folder. Made before any work, so
    that no picture is lost: ValueError, or an OSError, where none could be kept, or one that was given would
    be overwritten.
    """
    if str(output) == "-":
        raise ValueError("pictures are not written to standard output; name a file with -o")
    ends = [f"{i:0{len(str(count))}d}" for i in range(1, count + 1)]
    paths = [output.with_stem(f"{output.stem}-{n}") if output.suffix else output / f"{n}.png" for n in ends]
    paths = [output] if output.suffix and count == 1 else paths
    for path in paths:
        known = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
        make_place(path, "a .png or .jpg file", fits=known)
    check_apart(paths, given)
    return paths


def check_apart(paths: Sequence[Path], given: Sequence[str]) -> None:
    if taken := {path.resolve() for path in paths} & {Path(one).resolve() for one in given}:
        raise ValueError(f"{taken.pop()} was given and would be overwritten; name another file with -o")


def keep(picture: Image.Image, path: Path) -> None:
    save_picture(picture, path)
    print(path)
