"""Verbs that score models."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openbagel.evals import base, curve, world
from openbagel.evals.base import Suite
from openbagel.evals.judges import Endpoint, Judge
from openbagel.evals.page import page
from openbagel.evals.report import compared
from openbagel.evals.suites import SUITES
from openbagel.inference.pipeline import Bagel
from openbagel.train.stages import open_run
from openbagel.verbs.options import ModelOptions, option, progress, setting_of
from openbagel.weights import default_device


@dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """score a model on benchmarks"""

    suites: list[str] = option(
        positional=True,
        help=f"world (the toy world), or of {', '.join(SUITES)}",
        nargs="+",
        metavar="SUITE",
        choices=("world", *SUITES),
    )
    data: Path | None = option("the benchmark's published files; of several: folders named as they are")
    output: Path | None = option(
        "the folder of the run, of several: of the runs; default: runs/SUITE, for the world none", short="-o"
    )
    limit: int | None = option("only so many samples, the first ones")
    think: bool = option("let the model think first", False)
    settings: list[tuple[str, Any]] | None = option(
        "in place of the published ones, for example num_timesteps=20",
        nargs="+",
        type=setting_of,
        metavar="KEY=VALUE",
    )
    batch: int = option("samples that share the model at a time", 8)
    judge: str | None = option("the URL of an OpenAI-shaped endpoint, for example http://localhost:8000/v1")
    judge_model: str | None = option("the judge's name there; its key: the variable OPENAI_API_KEY")
    judge_votes: int = option("how often each question is put; most replies decide", 1)
    judge_price: tuple[float, float] | None = option("of a million tokens", metavar=("IN", "OUT"))
    judge_budget: float | None = option("no call is made once so much is spent; it needs the price")
    judge_cache: Path = option("where replies are kept; none is asked for twice", Path("runs/replies"))
    kinds: list[str] | None = option("world: kinds of tasks; default: all that the model knows", nargs="+")
    samples: int = option("world: examples of each kind", 50)
    world: str | None = option("world: nano or full; default: the one that the model was trained on")
    held_out: bool = option("world: only examples with something held out", False)

    def run(self) -> None:
        several = len(self.suites) > 1
        for name in self.suites:
            folder = (self.output or Path("runs")) / name if several or not self.output else self.output
            if name == "world":
                self.play(folder)
            elif self.data is None:
                raise ValueError(f"{name} needs --data DIR with {SUITES[name].needs}")
            else:
                data = self.data / name if several else self.data
                self.measure(SUITES[name], folder, load=self.load, data=data)

    def play(self, folder: Path) -> None:
        """The toy world; nothing is kept unless it was said where."""
        bagel = self.load()
        plan = world.Plan(
            kinds=tuple(self.kinds or ()),
            samples=self.samples,
            world=self.world,
            held_out=self.held_out,
            think=self.think,
        )
        suite = world.suite(plan.for_model(bagel))
        with TemporaryDirectory() as away:
            kept = self.output is not None
            self.measure(suite, folder if kept else Path(away), load=lambda: bagel, kept=kept)

    def measure(
        self, suite: Suite, folder: Path, *, load: Callable[[], Bagel], data: Path = Path(), kept: bool = True
    ) -> None:
        """Runs a suite, shows its table and writes its page."""
        plan = base.Plan(
            data=data,
            folder=folder,
            limit=self.limit,
            think=self.think,
            batch=self.batch,
            options=dict(self.settings or ()),
        )
        with progress(0, unit="sample") as bar:
            for _ in base.run(suite, plan, load, model=self.model, judge=self.judged(), expect=bar.reset):
                bar.update()
        if (folder / "summary.json").is_file():  # else other ranks go on
            print(compared([folder], {suite.name: suite.published}, label="" if kept else self.model))
            if kept:
                (folder / "index.html").write_text(page(suite, plan), "utf-8")
                print(folder / "index.html")

    def judged(self) -> Judge | None:
        if self.judge is None or self.judge_model is None:
            return None
        endpoint = Endpoint(
            url=self.judge,
            model=self.judge_model,
            votes=self.judge_votes,
            price=self.judge_price or (0.0, 0.0),
            most_cost=1e9 if self.judge_budget is None else self.judge_budget,
        )
        return Judge(endpoint, self.judge_cache)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """compare runs of benchmarks with each other and with published rows"""

    runs: list[Path] = option(
        positional=True, help="folders that `openbagel eval` wrote", nargs="+", metavar="RUN"
    )

    def run(self) -> None:
        print(compared(self.runs, {name: suite.published for name, suite in SUITES.items()}))


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
        plan = world.Plan(kinds=tuple(self.kinds or ()), samples=self.samples)
        points = curve.score(self.run_folder, plan, self.load, output.with_suffix(".json"), print)
        print(curve.table(points))
        print(curve.draw(points, output))

    def load(self, folder: Path) -> Bagel:
        checkpoint = open_run(folder, self.weights)
        assert checkpoint is not None
        device = default_device(self.device)
        for part in filter(None, (checkpoint.model, checkpoint.autoencoder)):
            part.to(device)
        return Bagel(checkpoint)
