"""How long one request's text keeps the model from others, taken in whole and in pieces.

    python -m benchmarks.prompt --model nano --tokens 2000 4000 8000

One core, wall time of the forwards of one prompt: all of them, and the longest, which others wait for.
"""

import argparse
import time

import torch

from benchmarks.clock import table
from openbagel import Bagel
from openbagel.inference import engine

PIECES = (512, engine.PIECE, 2048, 10**9)
WORDS = "a red circle and a blue square left of it. " * 4000


def forwards(bagel: Bagel, text: str) -> list[float]:
    """Seconds of each forward until the first token is asked for."""
    request, results, seconds = bagel.write_request([text], seed=0, think=False), None, list[float]()
    while (forward := engine.advance(request, results)).rows[0].read is engine.Read.NOTHING:
        start = time.perf_counter()
        (results,) = bagel.engine.step([forward])
        seconds.append(time.perf_counter() - start)
    request.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000, 8000])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bagel, rows = Bagel.load(asked.model), list[list[object]]()
    for tokens in asked.tokens:
        text = bagel.codec.decode(bagel.codec.encode(WORDS)[:tokens])
        for piece in PIECES:
            engine.PIECE = piece
            took = forwards(bagel, text)
            rows.append([tokens, piece if len(took) > 1 else "whole", sum(took), max(took)])
    print(table("Taking in a text", ["tokens", "piece", "all, s", "longest, s"], rows))


if __name__ == "__main__":
    main()
