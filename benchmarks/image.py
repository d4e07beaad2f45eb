"""What drawing costs: against resolution, batch, pictures in the context, steps and guidance branches.

    python -m benchmarks.image --width 256 --layers 4

Random weights, one thread, CPU time. Theory: a pass costs a line in its latent tokens plus their square,
and a line in the context; a drawing costs a line in its passes: one for every distinct branch of a step.
"""

import argparse
from functools import partial

import torch

from benchmarks.clock import fitted, milliseconds, table
from benchmarks.counters import drawn, listened, operations, separated
from benchmarks.model import Rig, add_options, numbers
from openbagel.flow import OFFICIAL_APP, Guidance
from openbagel.inference.context import Context

PROMPT = 16
"""Tokens of a prompt."""


def resolution_table(rig: Rig, sides: list[int], repeats: int) -> str:
    runs = [partial(rig.denoise_once, side, rig.context(PROMPT)) for side in sides]
    times = milliseconds(runs, repeats)
    counts = [side * side for side in sides]
    rows = [
        [count, f"{side * rig.config.latent_stride}²", time, operations(run).work.total()]
        for count, side, time, run in zip(counts, sides, times, runs, strict=True)
    ]
    headers = ["latent tokens", "pixels", "ms/pass", "operations/pass"]
    return table("A pass against resolution", headers, rows) + "\n" + fitted(counts, times, 2, "tokens")


def batch_table(rig: Rig, batches: list[int], side: int, repeats: int) -> str:
    rows: list[list[object]] = []
    for batch in batches:
        contexts = [rig.context(PROMPT) for _ in range(batch)]

        def one_by_one(contexts: list[Context] = contexts) -> None:
            for context in contexts:
                rig.denoise_once(side, context)

        runs = [one_by_one, partial(rig.denoise_once, side, *contexts)]
        alone, packed = (time / batch for time in milliseconds(runs, repeats))
        counts = (operations(run).work.total() for run in runs)
        rows.append([batch, alone, packed, alone / packed, *counts])
    headers = ["batch", "ms one by one", "ms packed", "gain", "operations one by one", "operations packed"]
    return table(f"Passes in batches, {side * side} latent tokens each, ms a picture", headers, rows)


def pictures_table(rig: Rig, counts: list[int], side: int, repeats: int) -> str:
    shown = rig.shown(side)
    room = 2 * (side * side + 2) * (max(counts) + 1)
    contexts = [rig.context(PROMPT, spare=room) for _ in counts]
    for count, context in zip(counts, contexts, strict=True):
        for _ in range(count):
            rig.read(context, *shown)

    def read_one_more(context: Context) -> None:
        rig.read(context.fork(), *shown)

    passes = milliseconds([partial(rig.denoise_once, side, context) for context in contexts], repeats)
    reads = milliseconds([partial(read_one_more, context) for context in contexts], repeats)
    tokens = [len(context) for context in contexts]
    rows = list(zip(counts, tokens, passes, reads, strict=True))
    title = f"Pictures in the context, each {side * side} latent and as many ViT tokens"
    headers = ["pictures", "context", "ms/pass", "ms to read one more"]
    fits = fitted(tokens, passes, 1, "context"), fitted(tokens, reads, 1, "context")
    return table(title, headers, rows) + f"\n{fits[0]} (pass){fits[1]} (reading)"


def steps_table(rig: Rig, points: list[int], side: int, repeats: int) -> str:
    guidance = Guidance(text=4.0)
    prompt = [rig.text(PROMPT)]
    runs = [
        partial(lambda n: drawn(rig, listened(rig, prompt), guidance, num_timesteps=n, side=side), n)
        for n in points
    ]
    times = milliseconds(runs, repeats)
    passes = [run()[1] for run in runs]
    rows = [[n - 1, count, time, time / count] for n, count, time in zip(points, passes, times, strict=True)]
    headers = ["steps", "passes", "ms", "ms/pass"]
    title = f"A drawing against steps, {side * side} latent tokens, text guidance 4 in [0.4, 1]"
    return table(title, headers, rows) + "\n" + fitted(passes, times, 1, "passes")


def branches_table(rig: Rig, side: int, num_timesteps: int, repeats: int) -> str:
    prompt, edit = [[rig.text(PROMPT)]], [rig.shown(min(side, 8)), [rig.text(PROMPT)]]
    cases = {
        "none": (Guidance(text=1.0), listened(rig, *prompt)),
        "text": (Guidance(text=4.0), listened(rig, *prompt)),
        "text and image, same context": (OFFICIAL_APP, listened(rig, *prompt)),
        "the same, computed all the same": (OFFICIAL_APP, separated(listened(rig, *prompt))),
        "text and image of an edit": (OFFICIAL_APP, listened(rig, *edit)),
    }
    runs = [
        partial(drawn, rig, branches, guidance, num_timesteps=num_timesteps, side=side)
        for guidance, branches in cases.values()
    ]
    times = milliseconds(runs, repeats)
    passes = [run()[1] for run in runs]
    rows = [
        [name, count, time, time / count, time / times[0]]
        for name, count, time in zip(cases, passes, times, strict=True)
    ]
    title = f"A drawing against guidance, {num_timesteps - 1} steps, {side * side} latent tokens"
    return table(title, ["branches", "passes", "ms", "ms/pass", "against none"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--sides", type=numbers, default=[4, 8, 16, 32], help="of a picture, latent tokens")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--pictures", type=numbers, default=[0, 1, 2, 4, 8], help="in the context")
    parser.add_argument("--points", type=numbers, default=[6, 11, 26, 50], help="of the schedule")
    parser.add_argument("--side", type=int, default=8, help="of the picture where it does not vary")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rig, repeats, side = Rig.of(options.width, options.layers), options.repeats, options.side
    print(resolution_table(rig, options.sides, repeats))
    print(batch_table(rig, options.batches, side, repeats))
    print(pictures_table(rig, options.pictures, min(side, 8), repeats))
    print(steps_table(rig, options.points, side, repeats))
    print(branches_table(rig, side, max(options.points), repeats))


if __name__ == "__main__":
    main()
