"""Timing on a shared machine: CPU time, the least of several runs, things that are compared taking turns."""

import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]


def milliseconds(runs: Sequence[Run], repeats: int) -> list[float]:
    """CPU time of each run, the least of `repeats`, after one that does not count; the runs take turns."""
    best = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            start = time.process_time()
            run()
            if repeat:
                best[index] = min(best[index], 1e3 * (time.process_time() - start))
    return best


def fitted(xs: Sequence[float], ys: Sequence[float], degree: int, name: str) -> str:
    """The polynomial of least squared relative error through milliseconds, and how far off it is at most."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    powers = torch.stack([x**power for power in range(degree + 1)], dim=1)
    weights = torch.linalg.lstsq(powers / y[:, None], torch.ones_like(y)[:, None]).solution[:, 0]
    off = ((powers @ weights - y) / y).abs().max().item()
    names = ("", f"·{name}", f"·{name}²")
    terms = " + ".join(f"{weight:.3g}{x}" for weight, x in zip(weights.tolist(), names, strict=False))
    return f"\nms = {terms.replace('+ -', '- ')}, off by at most {off:.0%}"


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers with a fraction get three significant digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [" | ".join(row) for row in (headers, ["---:"] * len(headers), *shown)]
    return f"\n**{title}**\n\n" + "\n".join(f"| {line} |" for line in lines)
