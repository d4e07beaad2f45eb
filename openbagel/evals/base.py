"""Benchmarks: samples in, verdicts out, every figure traceable to what was asked, made and said.

    RUN/run.json          what was run: suite, model, options, data; a run goes on only with the same
        made-R.jsonl      what the model made of each sample, by rank R; pictures stand in outputs/
        verdicts-R.jsonl  what that is worth, and why: scores, replies of judges
        summary.json      values with their intervals, and how many samples had a problem
        index.html        all of it to look through

A run that was cut goes on where it was: a line is written when its sample is done. Ranks (RANK and
WORLD_SIZE, as torchrun sets them) share the samples; whichever ends last writes the summary.
"""

import hashlib
import json
import math
import os
import platform
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from PIL import Image

import openbagel
from openbagel.checks import check_least, retold
from openbagel.config import adjusted, from_json, to_json
from openbagel.evals.judges import Absent, Judge, Reply
from openbagel.files import read_json, write_json
from openbagel.hub import find_model
from openbagel.images import ImageLimits
from openbagel.inference.engine import Request
from openbagel.inference.pipeline import Answer, Bagel
from openbagel.picture_files import open_picture, save_picture

T = TypeVar("T")
AS_THEY_ARE = ImageLimits(max_size=2**16, min_size=1, stride=1, max_pixels=2**32)
RESAMPLES = 400
"""Of the bootstrap that gives the intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One thing to be made. parts: texts, and paths of pictures, in order. frames: how many are filmed. file:
    where a picture made of it goes below outputs/, as the benchmark's own scorers have it; of a clip the
    folder. truth: what the verdict needs.

    problem: why it cannot be asked (a picture that is missing, a broken line); it is counted.
    """

    id: str
    parts: tuple[str | Path, ...] = ()
    group: str = ""
    seed: int = 0
    size: tuple[int, int] | None = None
    frames: int = 0
    file: str = ""
    truth: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a model made: a text, or the file below outputs/ of a picture, the folder of a clip. pixels: the
    SHA-256 of those.
    """

    text: str = ""
    file: str = ""
    pixels: str = ""
    thought: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """All that the model made of a sample, in order; most have one part. asked: SHA-256 of the sample's
    parts. by: the device and the dtype.
    """

    id: str
    parts: tuple[Part, ...] = (Part(),)
    asked: str = ""
    by: str = ""
    problem: str = ""

    @property
    def text(self) -> str:
        return self.parts[0].text

    @property
    def file(self) -> str:
        return self.parts[0].file


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of a conversation as it went: a text, a picture (or its path), or a list of pictures.

    right is None for what was given; what the model made stands beside one right answer, if one is known.
    """

    content: Any
    truth: Any = None
    right: bool | None = None
    reason: str = ""
    thought: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Scores by name; no score where there was a problem, such as a reply that could not be read. reasons: of
    each part of a conversation that the model made, "" where it is right.
    """

    id: str
    group: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    reasons: tuple[str, ...] = ()
    problem: str = ""
    replies: tuple[Reply, ...] = ()


@dataclass(frozen=True, slots=True)
class Desk:
    """What a verdict is made with: the data's folder, the pictures that were made, and perhaps a judge."""

    data: Path
    outputs: Path
    judge: Judge | None = None

    def picture(self, made: Made) -> Image.Image:
        return self.values(made)[0]

    def frames(self, made: Made) -> list[Image.Image]:
        return self.values(made)[0]

    def values(self, made: Made) -> list[Any]:
        """Everything that was made as the model gave it: answers, pictures, lists of frames."""
        found: list[Any] = []
        for part in made.parts:
            if not part.file:
                found.append(Answer(part.text, part.thought))
            elif (path := self.outputs / part.file).is_dir():
                found.append([open_picture(frame) for frame in sorted(path.iterdir())])
            else:
                found.append(open_picture(path))
                found[-1].info["thought"] = part.thought
        return found


Summary = Callable[[Sequence[Verdict]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A benchmark. needs: the files it reads, in the layout in which they were published.

    options: the published settings, by the names of `config.adjusted`. looks: how pictures are brought to a
    ViT of this stride, else as the model has it. unit: verdicts of one unit hang together, such as two
    questions that count when both are right. published: rows of the literature, for comparison. submission:
    writes what a benchmark's own server or scorer takes, and says where.

    converse: a request for everything that a model makes of a sample (thinking or not), where that is not
    one reply to the sample's parts; turns: how it went, to look at; plan: what else the samples depend on.
    spread: the 95 % interval of each value, else a bootstrap finds it.
    """

    name: str
    about: str
    needs: str
    samples: Callable[[Path], Iterable[Sample]]
    score: Callable[[Sample, Made, Desk], Verdict]
    summary: Summary
    reply: Literal["text", "image", "film"] = "text"
    options: Mapping[str, Any] = field(default_factory=dict)
    think_options: Mapping[str, Any] = field(default_factory=dict)
    looks: ImageLimits | None = None
    judged: bool = False
    unit: Callable[[Verdict], str] = lambda verdict: verdict.id
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    submission: Callable[[Sequence[tuple[Sample, Made]], Path], Path] | None = None
    converse: Callable[[Bagel, Sample, bool], Request[list[Any]]] | None = None
    turns: Callable[[Sample, Made, Verdict, Desk], list[Turn]] | None = None
    plan: Any = None
    spread: Callable[[Sequence[Verdict]], dict[str, tuple[float, float]]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a suite is run. threads: verdicts that are made at a time, as judges are waited for."""

    data: Path
    folder: Path
    limit: int | None = None
    think: bool = False
    batch: int = 8
    threads: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_least(self, limit=1, batch=1, threads=1)


def run(
    suite: Suite,
    plan: Plan,
    load: Callable[[], Bagel],
    *,
    model: str,
    judge: Judge | None = None,
    expect: Callable[[int], object] = lambda total: None,
) -> Iterator[Verdict]:
    """Makes and judges what is not there yet, and yields every verdict of this rank; the model is loaded
    only when something is to be made. expect: told how many there will be. ValueError where the folder holds
    another run.
    """
    if suite.judged and judge is None:
        raise ValueError(f"{suite.name} needs a judge: give --judge URL and --judge-model NAME")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    samples = list(suite.samples(plan.data))[: plan.limit]
    if not samples:
        raise ValueError(f"{plan.data} holds no sample of {suite.name}; it needs {suite.needs}")
    _check_same(plan.folder / "run.json", _told(suite, plan, samples, model, judge))
    own = samples[rank::ranks]
    expect(len(own))
    made = _Lines(plan.folder / f"made-{rank}.jsonl", Made)
    verdicts = _Lines(plan.folder / f"verdicts-{rank}.jsonl", Verdict)
    desk = Desk(plan.data, plan.folder / "outputs", judge)
    bagel: Bagel | None = None
    with ThreadPoolExecutor(plan.threads) as pool:
        for first in range(0, len(own), plan.batch):
            some = own[first : first + plan.batch]
            if waiting := [sample for sample in some if sample.id not in made.found]:
                bagel = bagel or preset(load(), suite, plan)
                values = bagel.engine.drive_all([_attempt(bagel, suite, plan, sample) for sample in waiting])
                for sample, value in zip(waiting, values, strict=True):
                    made.add(replace(_kept(sample, value, desk.outputs), by=_machine(bagel)))
            left = [sample for sample in some if sample.id not in verdicts.found]
            for verdict in pool.map(lambda one: _verdict(suite, one, made.found[one.id], desk), left):
                verdicts.add(verdict)
            yield from (verdicts.found[sample.id] for sample in some)
    done = read_lines(plan.folder.glob("verdicts-*.jsonl"), Verdict)
    if len(done) == len(samples):
        everything = read_lines(plan.folder.glob("made-*.jsonl"), Made)
        told = summarised(suite, list(done.values()))
        told["made by"] = Counter(one.by for one in everything.values())
        write_json(plan.folder / "summary.json", told)
        if suite.submission is not None:
            suite.submission([(sample, everything[sample.id]) for sample in samples], plan.folder)


def preset(bagel: Bagel, suite: Suite, plan: Plan) -> Bagel:
    """The model with a suite's published settings, and those that the plan asks for on top."""
    settings, options = bagel.config.settings, _options(suite, plan)
    own = {verb: getattr(settings, verb) for verb in ("draw", "edit", "ask", "film")}
    verbs = {verb: sampling and adjusted(sampling, options) for verb, sampling in own.items()}
    settings = replace(settings, **verbs)
    if suite.looks is not None and suite.looks.stride == settings.vit_limits.stride:
        settings = replace(settings, vit_limits=suite.looks, vae_limits=AS_THEY_ARE)
    return bagel.with_settings(settings)


def _options(suite: Suite, plan: Plan) -> dict[str, Any]:
    return {**suite.options, **(suite.think_options if plan.think else {}), **plan.options}


def _attempt(bagel: Bagel, suite: Suite, plan: Plan, sample: Sample) -> Request[Any]:
    """What the model makes, or the ValueError that kept it from that."""
    try:
        if sample.problem:
            raise ValueError(sample.problem)
        if suite.converse is not None:
            return (yield from suite.converse(bagel, sample, plan.think))
        with retold("broken picture: {error}", ValueError):
            parts = [open_picture(part) if isinstance(part, Path) else part for part in sample.parts]
        if suite.reply == "film":
            options = {"num_frames": sample.frames, "size": sample.size, "seed": sample.seed}
            return [(yield from bagel.film_request(parts, **options))]
        return (
            yield from bagel.chat_request(
                parts, reply=suite.reply, size=sample.size, seed=sample.seed, think=plan.think
            )
        )
    except ValueError as error:
        return error


def _kept(sample: Sample, values: Any, outputs: Path) -> Made:
    """A line for what was made (answers, pictures, clips, or a ValueError), pictures in files first."""
    if isinstance(values, ValueError):
        return Made(id=sample.id, problem=str(values))
    asked = hashlib.sha256()
    for part in sample.parts:
        asked.update(hashlib.sha256(part.read_bytes() if isinstance(part, Path) else part.encode()).digest())
    parts: list[Part] = []
    for place, value in enumerate(values):
        if isinstance(value, Answer):
            parts.append(Part(text=str(value), thought=value.thought))
            continue
        is_clip, pixels = isinstance(value, list), hashlib.sha256()
        name = Path(sample.file or f"{sample.id}{'' if is_clip else '.png'}")
        file = name.with_stem(f"{name.stem}-{place}") if len(values) > 1 else name
        for number, picture in enumerate(value if is_clip else [value]):
            save_picture(picture, outputs / file / f"{number:03}.png" if is_clip else outputs / file)
            pixels.update(picture.tobytes())
        thought = None if is_clip else value.info.get("thought")
        parts.append(Part(file=file.as_posix(), pixels=pixels.hexdigest(), thought=thought))
    return Made(id=sample.id, parts=tuple(parts), asked=asked.hexdigest())


def _machine(bagel: Bagel) -> str:
    weight = next(bagel.engine.model.parameters())
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return f"{name}, {str(weight.dtype).removeprefix('torch.')}"


def _verdict(suite: Suite, sample: Sample, made: Made, desk: Desk) -> Verdict:
    if made.problem:
        return Verdict(id=sample.id, group=sample.group, problem=made.problem)
    try:
        return suite.score(sample, made, desk)
    except Absent:
        raise
    except ValueError as error:
        return Verdict(id=sample.id, group=sample.group, problem=f"broken: {error}")


# the folder of a run --------------------------------------------------------------------------------------


class _Lines(Generic[T]):
    """A JSONL file of one kind that grows by a line at a time."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.found = path, read_lines([path] if path.is_file() else [], kind)
        path.write_text("".join(map(_line, self.found.values())), "utf-8")

    def add(self, one: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(one))
        self.found[one.id] = one


def _line(one: Any) -> str:
    return json.dumps(to_json(one)) + "\n"


def read_lines(paths: Iterable[Path], kind: type[T]) -> dict[str, T]:
    """What ranks wrote, by sample; a last line that a kill cut is left out."""
    found: dict[str, T] = {}
    for path in sorted(paths):
        for line in path.read_text("utf-8").rpartition("\n")[0].splitlines():
            one: Any = from_json(kind, json.loads(line), str(path))
            found[one.id] = one
    return found


def _told(
    suite: Suite, plan: Plan, samples: Sequence[Sample], model: str, judge: Judge | None
) -> dict[str, Any]:
    """All that a figure depends on."""
    asked = hashlib.sha256(repr([(s.id, s.parts, s.seed, s.size, s.problem) for s in samples]).encode())
    return {
        "suite": suite.name,
        "plan": suite.plan,
        "model": model,
        "weights": _fingerprint(model),
        "samples": len(samples),
        "data": asked.hexdigest(),
        "think": plan.think,
        "options": _options(suite, plan),
        "judge": to_json(judge.endpoint) if judge else None,
        "versions": {
            "openbagel": openbagel.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _fingerprint(model: str) -> str | None:
    """Of a model's files: their names, sizes and a piece of each; None where they are not on this machine."""
    with suppress(ValueError, OSError):
        found = find_model(model, cached=True)
        digest = hashlib.sha256()
        for path in sorted(found.iterdir()) if found.is_dir() else [found]:
            if path.suffix in (".safetensors", ".gguf"):
                with path.open("rb") as file:
                    file.seek((size := path.stat().st_size) // 2)
                    digest.update(f"{path.name} {size} ".encode() + file.read(2**16))
        return digest.hexdigest()
    return None


def _check_same(path: Path, told: dict[str, Any]) -> None:
    """Writes what is run, or compares it with what was; versions may differ."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, told)
    before = read_json(path)
    for key, value in json.loads(json.dumps(told)).items():
        free = key == "versions" or (key == "weights" and None in (before.get(key), value))
        if not free and before.get(key) != value:
            was = f"{key} {before.get(key)!r}, not {value!r}"
            raise ValueError(f"{path.parent} holds a run with {was}; name another folder")


# scores -----------------------------------------------------------------------------------------------------


def mean(verdicts: Sequence[Verdict], score: str, group: str | None = None) -> float:
    """Of one score, over a group or all; NaN where there is none."""
    values = [v.scores[score] for v in verdicts if score in v.scores and group in (None, v.group)]
    return sum(values) / len(values) if values else math.nan


def summarised(suite: Suite, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Each value with its 95 % interval, and what went wrong."""
    scored = sorted((v for v in verdicts if v.scores), key=lambda v: v.id)
    values = {name: value for name, value in suite.summary(scored).items() if not math.isnan(value)}
    spread = suite.spread(scored) if suite.spread else _bootstrap(suite, scored, values)
    told = {
        name: {"value": value, "low": spread[name][0], "high": spread[name][1]}
        for name, value in values.items()
    }
    problems = Counter(sorted(v.problem.partition(":")[0] for v in verdicts if v.problem))
    return {
        "suite": suite.name,
        "samples": len(verdicts),
        "scored": len(scored),
        "values": told,
        "problems": problems,
    }


def _bootstrap(
    suite: Suite, scored: Sequence[Verdict], values: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """95 % intervals of values, over the units of each group."""
    groups: dict[str, dict[str, list[Verdict]]] = {}
    for verdict in scored:
        groups.setdefault(verdict.group, {}).setdefault(suite.unit(verdict), []).append(verdict)
    rng, draws = random.Random(0), dict[str, list[float]]()
    for _ in range(RESAMPLES):
        drawn = [rng.choices(list(units.values()), k=len(units)) for units in groups.values()]
        again = suite.summary([verdict for some in drawn for unit in some for verdict in unit])
        for name, value in again.items():
            draws.setdefault(name, []).append(value)
    found: dict[str, tuple[float, float]] = {}
    for name, value in values.items():
        ordered = sorted(x for x in draws.get(name, ()) if not math.isnan(x)) or [value]
        found[name] = (ordered[int(len(ordered) * 0.025)], ordered[int(len(ordered) * 0.975)])
    return found
