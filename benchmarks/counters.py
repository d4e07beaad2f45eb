"""What a forward costs, in numbers that do not depend on the machine: operations, bytes, passes.

    python -m benchmarks.counters

The same numbers are asserted in tests/test_cost.py.
"""

import argparse
import inspect
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.clock import table
from benchmarks.model import Rig, numbers
from openbagel.config import Sampling
from openbagel.flow import OFFICIAL_APP, Guidance
from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Read, Result, Row
from openbagel.inference.image import Branches, denoise
from openbagel.sequence import Segment, VaeImage

VIEWS = {"aten._unsafe_view.default", "aten.detach.default", "aten.lift_fresh.default"}
"""Operators that move no data although their schema does not say so."""
SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "tolist"}
"""Operators after which the host must wait for the device, because it needs a value."""


class Operations(TorchDispatchMode):
    """Counts the tensor operations that run below it; `views` are those that move no data."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        (self.views if func.is_view or str(func) in VIEWS else self.work)[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> list[str]:
        return [name for name in self.work if name.split(".")[1] in SYNCS]


def operations(run: Callable[[], object]) -> Operations:
    """What a run does; under inference mode composite operators such as `linear` or `rms_norm` count once."""
    with Operations() as counted:
        run()
    return counted


def pass_operations(layers: int, *, branches: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Non-view operations of one denoising step.

    Gradients are off by no_grad: the inference mode of `Engine.step` would show composite operators as one.
    """
    rig = Rig.of(64, layers, dtype=dtype)
    contexts = [Context(rig.config.llm) for _ in range(branches)]
    picture = VaeImage.noised(rig.noise(4), (4, 4), 0.5)
    step = partial(inspect.unwrap(Engine.step), rig.engine)
    with torch.no_grad():
        step([Forward(tuple(Row(context, (rig.text(20),), keep=True) for context in contexts))])
        forward = Forward(tuple(Row(context, (picture,), read=Read.VELOCITY) for context in contexts))
        return operations(lambda: step([forward])).work.total()


def layer_operations(*, branches: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Non-view operations that one more layer adds to a denoising forward."""
    few, more = (pass_operations(layers, branches=branches, dtype=dtype) for layers in (1, 2))
    return more - few


def allocated_bytes(run: Callable[[], object]) -> int:
    """Everything that the CPU allocator hands out during a run, buffers inside kernels included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        recorded = json.loads(path.read_text())["traceEvents"]
    return sum(max(0, event["args"]["Bytes"]) for event in recorded if event.get("name") == "[memory]")


def token_bytes(rig: Rig, context_tokens: int) -> int:
    """Bytes allocated to decode one token at the end of a context."""
    context = rig.context(context_tokens, spare=16)
    rig.write(context)
    return allocated_bytes(lambda: rig.write(context))


def step_bytes(rig: Rig, context_tokens: int) -> int:
    """Bytes allocated in one guided denoising step; the first step, which takes the scratch buffer, is over.

    One branch is the longest on its storage, the other one a shorter fork.
    """
    text = rig.context(context_tokens, spare=64)
    cond = text.fork()
    rig.read(cond, rig.text(8))
    rig.denoise_once(4, cond, text)
    return allocated_bytes(lambda: rig.denoise_once(4, cond, text))


def fork_bytes(rig: Rig, context_tokens: int) -> int:
    context = rig.context(context_tokens)
    return allocated_bytes(context.fork)


# passes ----------------------------------------------------------------------------------------------------


def listened(rig: Rig, *parts: Sequence[Segment]) -> Branches:
    """The contexts of a drawing that has taken in these parts."""
    branches = Branches.of(Context(rig.config.llm))
    rig.engine.drive(branches.hear(parts))
    return branches


def separated(branches: Branches) -> Branches:
    """The same contents, but no longer known to be the same: every branch is computed."""
    for context in (branches.text, branches.image):
        context.trim(len(context), context.position)
    return branches


def drawn(
    rig: Rig, branches: Branches, guidance: Guidance, *, num_timesteps: int = 50, side: int = 2
) -> tuple[Tensor, int]:
    """A drawing's latents, and the passes that it took."""
    before = rig.engine.passes
    sampling = Sampling(guidance=guidance, num_timesteps=num_timesteps, timestep_shift=3.0)
    latents = rig.engine.drive(denoise(branches, rig.noise(side), (side, side), sampling, torch.Generator()))
    return latents, rig.engine.passes - before


class OneByOne(Engine):
    """Runs each row of a forward on its own, so that matrices have the same sizes whatever else runs."""

    def step(self, forwards: Sequence[Forward]) -> list[tuple[Result, ...]]:
        run = partial(Engine.step, self)
        return [tuple(run([Forward((row,))])[0][0] for row in forward.rows) for forward in forwards]


def pass_table(rig: Rig) -> list[list[object]]:
    """Rows of (what is drawn, guided interval, passes, passes if every branch were computed)."""
    rows: list[list[object]] = []
    drawing, editing = [rig.text(9)], [rig.shown(2), [rig.text(9)]]
    cases = (
        ("text to image, official app", OFFICIAL_APP, [drawing]),
        ("text to image, image guidance off", replace(OFFICIAL_APP, image=1.0), [drawing]),
        ("edit", Guidance(text=4.0, image=2.0), editing),
    )
    for name, guidance, parts in cases:
        for interval in ((0.4, 1.0), (0.0, 1.0)):
            wanted = replace(guidance, interval=interval)
            _, passes = drawn(rig, listened(rig, *parts), wanted)
            _, every = drawn(rig, separated(listened(rig, *parts)), wanted)
            rows.append([name, str(list(interval)), passes, every])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=numbers, default=[64, 512, 2048, 4096], help="lengths in tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    types = (torch.float32, torch.bfloat16)
    rows = [[n, *(layer_operations(branches=n, dtype=dtype) for dtype in types)] for n in (1, 2, 3)]
    print(table("Operations of a layer in a denoising forward", ["branches packed", *map(str, types)], rows))
    headers = ["task", "guided interval", "passes", "passes if no branch is shared"]
    print(table("Passes of 50 timesteps", headers, pass_table(Rig.of(64, 1))))
    rig = Rig.of(64, 2)
    rows = [[n, token_bytes(rig, n), step_bytes(rig, n), fork_bytes(rig, n)] for n in options.contexts]
    headers = ["context", "decoded token", "denoising step", "fork"]
    print(table("Bytes allocated, width 64, 2 layers", headers, rows))


if __name__ == "__main__":
    main()
