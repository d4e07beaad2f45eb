"""What writing text costs: milliseconds a token against the context's length and against the batch.

    python -m benchmarks.text --width 256 --layers 4

Random weights, one thread, CPU time. Theory: a token costs a constant (the weights) plus its context's keys
and values, so a straight line; the bytes allocated do not grow at all.
"""

import argparse
from functools import partial

import torch

from benchmarks.clock import fitted, milliseconds, table
from benchmarks.counters import operations, token_bytes
from benchmarks.model import Rig, add_options, numbers

TOKENS = 16
"""Tokens that one timed run decodes; the context is trimmed afterwards."""


def decode(rig: Rig, length: int, batch: int, *, packed: bool) -> partial[None]:
    """A run that decodes TOKENS tokens of each of several contexts and forgets them again."""
    contexts = [rig.context(length, spare=TOKENS) for _ in range(batch)]
    places = [context.position for context in contexts]
    packs = [contexts] if packed else [[context] for context in contexts]

    def run() -> None:
        for pack in packs:
            for _ in range(TOKENS):
                rig.write(*pack)
        for context, position in zip(contexts, places, strict=True):
            context.trim(length, position)

    return partial(run)


def context_table(rig: Rig, lengths: list[int], repeats: int) -> str:
    runs = [decode(rig, length, 1, packed=True) for length in lengths]
    times = [time / TOKENS for time in milliseconds(runs, repeats)]
    rows = []
    for length, time in zip(lengths, times, strict=True):
        context = rig.context(length, spare=1)
        counted = operations(partial(rig.write, context)).work.total()
        rows.append([length, time, token_bytes(rig, length), counted])
    headers = ["context", "ms/token", "bytes/token", "operations/token"]
    return table("Decoding against context", headers, rows) + "\n" + fitted(lengths, times, 1, "context")


def batch_table(rig: Rig, batches: list[int], length: int, repeats: int) -> str:
    rows = []
    for batch in batches:
        runs = [decode(rig, length, batch, packed=packed) for packed in (False, True)]
        alone, packed = (time / TOKENS / batch for time in milliseconds(runs, repeats))
        rows.append([batch, alone, packed, alone / packed])
    headers = ["batch", "ms/token one by one", "ms/token packed", "gain"]
    return table(f"Decoding in batches, contexts of {length}", headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--contexts", type=numbers, default=[64, 256, 1024, 4096])
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--batch-context", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rig = Rig.of(options.width, options.layers)
    print(context_table(rig, options.contexts, options.repeats))
    print(batch_table(rig, options.batches, options.batch_context, options.repeats))


if __name__ == "__main__":
    main()
