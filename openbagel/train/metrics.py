"""What a run says about itself: the console line, metrics.jsonl, TensorBoard, Weights & Biases, and plots."""

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from openbagel.checks import check_least, extra, retold
from openbagel.config import BagelConfig
from openbagel.data.samples import visible_pairs
from openbagel.sequence import PackedSequence

Row = dict[str, Any]
METRICS_FILE = "metrics.jsonl"
PANELS = ("loss", "ce", "mse", "grad_norm", "lr")
PEAK_TFLOPS = dict.fromkeys(("H100", "H800", "H200"), 989.0) | dict.fromkeys(("A100", "A800"), 312.0)
PEAK_TFLOPS |= {"H20": 148.0, "L40": 181.0, "L20": 119.5, "Ascend910B": 354.0, "MI300X": 1336.0}
"""Dense bfloat16 peaks of the reference's logger, by a word of the device's name."""


# operations -------------------------------------------------------------------------------------------------


def peak_flops(device_name: str, peak_device_tflops: float = 0.0) -> float | None:
    """Operations a second of one device at best: as given, else from the table, else None."""
    known = [PEAK_TFLOPS[word] for word in re.findall(r"\w+", device_name) if word in PEAK_TFLOPS]
    return (peak_device_tflops or sum(known[:1])) * 1e12 or None


def train_flops(config: BagelConfig, pack: PackedSequence, frozen: Collection[str] = ()) -> float:
    """Operations of a pack's forward and backward, nothing recomputed, two a multiply-add.

    Counts the expert that owns each token, visible attention pairs, logits of labels only, and the ViT with
    its connector. Leaves out the latent projections (below 0.1 %) and the autoencoder. frozen: "llm" computes
    no weight gradients (as with adapters), "vit" no gradients at all.
    """
    llm, vit = config.llm, config.vit
    linear = len(pack) * llm.block_weights * llm.num_hidden_layers
    linear += len(pack.labels) * llm.vocab_size * llm.hidden_size
    attention = 2 * sum(map(visible_pairs, pack.spans)) * llm.hidden_size * llm.num_hidden_layers
    products = linear * (2 if "llm" in frozen else 3) + attention * 3
    if vit is not None:
        width, patches = vit.hidden_size, len(pack.patches)
        layer = patches * (4 * width**2 + 2 * width * vit.intermediate_size)
        layer += 2 * width * sum(count**2 for count in pack.patch_counts)
        looking = vit.num_used_layers * layer + patches * 3 * vit.patch_size**2 * width
        connector = patches * (width + llm.hidden_size) * llm.hidden_size
        products += looking * (1 if "vit" in frozen else 3) + connector * 3
    return 2.0 * products


# the log ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Where numbers go and how often; wandb_project None leaves Weights & Biases out."""

    log_every: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_name: str = "run"
    wandb_run_id: str = "0"
    wandb_resume: str = "allow"
    wandb_offline: bool = False
    peak_device_tflops: float = 0.0
    """Of one device, for the MFU; 0: that of the table, if it is there."""

    def __post_init__(self) -> None:
        check_least(self, log_every=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimiser step, summed over its packs and all ranks; steps count from 0, as in the reference's log.

    losses: unweighted means over labels and latents; left out, or NaN, where the step had none. sums: tokens;
    room, the tokens that its packs could hold; samples; flops; seconds of wall time, data included. more:
    what else to log as it stands now, such as counters of what was skipped.
    """

    step: int
    losses: Mapping[str, float]
    lr: float
    grad_norm: float
    sums: Mapping[str, float]
    more: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[str], None]


def say(line: str) -> None:
    """Prints above the progress bar, if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


class Metrics(ExitStack):
    """Logs a row every `log_every` steps, from step 0 on, and for the last. Only the first rank makes one.

    A row covers the steps since the one before: finite losses and norms are averaged; tokens, samples and
    seconds count from the start of the run. With its state restored, a resumed run writes the rows of an
    uninterrupted one, but for what depends on the clock. start: the first step of this life; rows from there
    on are dropped. peak: operations a second of all devices together, for the MFU.
    """

    def __init__(
        self, folder: Path, *, track: Track, total_steps: int, start: int = 0, peak: float | None = None
    ) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.track, self.total_steps, self.peak, self.report = track, total_steps, peak, say
        self.window: dict[str, list[float]] = {}
        self.totals: dict[str, float] = {"tokens": 0, "samples": 0, "seconds": 0.0}
        self.bar = self.enter_context(tqdm(total=total_steps, initial=start, unit="step", disable=None))
        self.sinks = [_json_lines(folder / METRICS_FILE, start, self)]
        if track.tensorboard:
            self.sinks.append(_tensorboard(folder / "tensorboard", start, self))
        if track.wandb_project is not None:
            self.sinks.append(_wandb(folder, track, self))

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"window": {k: list(v) for k, v in self.window.items()}, "totals": dict(self.totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.window = {name: list(values) for name, values in state["window"].items()}
        self.totals = dict(state["totals"])

    def step(self, record: StepRecord) -> None:
        """Takes in one step."""
        for name, value in {**record.losses, "grad_norm": record.grad_norm, **record.sums}.items():
            self.window.setdefault(name, []).extend([value] if math.isfinite(value) else [])
        for name in self.totals:
            self.totals[name] += record.sums[name]
        self.bar.update()
        if record.step % self.track.log_every == 0 or record.step + 1 == self.total_steps:
            row = self._row(record)
            self.report(console_line(row, [name for name, value in record.more.items() if value]))
            for write in self.sinks:
                try:
                    write(row)
                except OSError as error:  # a full disk costs rows, not the run
                    self.report(f"this row of the metrics is lost: {error}")
            self.window = {}

    def _row(self, record: StepRecord) -> Row:
        sums = {name: sum(self.window.pop(name)) for name in ("tokens", "room", "samples", "flops")}
        steps, seconds = len(self.window["seconds"]), sum(self.window.pop("seconds"))
        names = sorted(self.window, key=lambda name: (name == "grad_norm", name != "mse", name))
        means = {name: fmean(self.window[name]) if self.window[name] else None for name in names}
        row: Row = {"step": record.step, **means, "lr": record.lr, "fill": sums["tokens"] / sums["room"]}
        row |= {"steps_per_second": steps / seconds, "tokens_per_second": sums["tokens"] / seconds}
        row["mfu"] = sums["flops"] / (seconds * self.peak) if self.peak else None
        return row | self.totals | dict(record.more)


def console_line(row: Row, more: Sequence[str] = ()) -> str:
    """A row in the reference's format; the named values follow."""
    losses = list(row)[1 : list(row).index("grad_norm")]
    parts = [f"Train Loss {n}: {math.nan if row[n] is None else row[n]:.4f}" for n in losses]
    parts.append(f"Train Steps/Sec: {row['steps_per_second']:.2f}")
    parts.append(f"Tokens/Sec: {row['tokens_per_second'] / 1000:.2f}k")
    parts += [f"MFU: {row['mfu']:.1%}"] if row["mfu"] is not None else []
    parts += [f"{name}: {row[name]:g}" for name in more]
    return f"[{datetime.now():%Y-%m-%d %H:%M:%S}] (step={row['step']:07d}) {', '.join(parts)}"


def _json_lines(path: Path, start: int, closing: ExitStack) -> Callable[[Row], object]:
    kept = [row for row in read_rows(path) if row["step"] < start] if path.is_file() else []
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    fresh.replace(path)
    file = closing.enter_context(path.open("a", encoding="utf-8", buffering=1))  # flushed at each line
    return lambda row: file.write(json.dumps(row) + "\n")


def _tensorboard(folder: Path, start: int, closing: ExitStack) -> Callable[[Row], object]:
    tensorboard = extra("torch.utils.tensorboard", "track", "track.tensorboard")
    writer = tensorboard.SummaryWriter(folder, purge_step=start)
    closing.callback(writer.close)

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def _wandb(folder: Path, track: Track, closing: ExitStack) -> Callable[[Row], object]:
    name, mode = track.wandb_name, "offline" if track.wandb_offline else None
    known = {"project": track.wandb_project, "name": name, "id": f"{name}-run{track.wandb_run_id}"}
    wandb = extra("wandb", "track", "track.wandb_project")
    remedy = "run `wandb login`, or set track.wandb_offline=true or track.wandb_project=null"
    with retold(f"Weights & Biases does not begin ({{error}}); {remedy}", wandb.Error):
        run = wandb.init(dir=folder, resume=track.wandb_resume, mode=mode, **known)
    closing.callback(run.finish)
    return lambda row: run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


# plots ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a log; what is no row, such as the torn last line of a killed run, is left out."""
    rows: list[Any] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def plot(runs: Sequence[str | Path], output: str | Path, *, smoothing: float = 0.6) -> Path:
    """Draws losses, gradient norm and learning rate of runs (folders or .jsonl files) into one PNG.

    smoothing: weight of the past in [0, 1); the curve as it was stays visible behind. ValueError when a run
    has no rows.
    """
    if not runs or not 0 <= smoothing < 1:
        raise ValueError(f"smoothing {smoothing} must lie in [0, 1)" if runs else "name at least one run")
    logs = {str(run): _points(Path(run)) for run in runs}
    panels = [name for name in PANELS if any(points[name] for points in logs.values())]
    lines = -(-len(panels) // 2)
    figures = extra("matplotlib.figure", "plot", "a plot")
    figure = figures.Figure(figsize=(11, 3.2 * lines), layout="constrained")
    for place, name in enumerate(panels, 1):
        axes = figure.add_subplot(lines, 2, place, title=name, xlabel="step")
        axes.grid(alpha=0.3)
        for number, (run, points) in enumerate(logs.items()):
            steps, values = [step for step, _ in points[name]], [value for _, value in points[name]]
            axes.plot(steps, values, color=f"C{number}", alpha=0.25)
            smooth = smoothed(values, 0.0 if name == "lr" else smoothing)
            axes.plot(steps, smooth, color=f"C{number}", label=run)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    return Path(output)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the bias of its start."""
    averages = itertools.accumulate(values, lambda old, new: weight * old + (1 - weight) * new, initial=0.0)
    return [average / (1 - weight**count) for count, average in enumerate(averages) if count]


def _points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) points of each panel that a run has numbers for."""
    paths = [run / METRICS_FILE, run / "log.jsonl"] if run.is_dir() else [run]
    rows = [row for path in paths if path.is_file() for row in read_rows(path)]
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in PANELS}
    for name, row in itertools.product(PANELS, rows):
        if row.get(name) is not None and math.isfinite(row[name]):
            points[name].append((row["step"], row[name]))
    if not any(points.values()):
        raise ValueError(f"{run} has no {METRICS_FILE} with losses; name a folder of `openbagel train`")
    return points
