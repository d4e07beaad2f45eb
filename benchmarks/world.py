"""How fast the toy world is: scenes sampled, pictures rendered and judged in a second.

python -m benchmarks.world --world full --device cuda
"""

import argparse
import random
import time
from collections.abc import Callable

import torch

from openbagel.world.judge import parse
from openbagel.world.render import render
from openbagel.world.scene import WORLDS, Scene


def rate(count: int, run: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Things a second, the best of some repeats after one that does not count: CPU time, or a GPU's time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = float("inf")
    for repeat in range(repeats + 1):
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if repeat:
            best = min(best, clock() - start)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=WORLDS, default="full")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = WORLDS[options.world]()

    def sample() -> list[Scene]:
        rng = random.Random(0)
        return [world.sample_scene(rng, 1 + i % world.max_things) for i in range(options.pictures)]

    scenes = sample()
    pictures = render(scenes[:200], world.side)
    rows = {
        "scenes sampled": rate(len(scenes), sample, "cpu"),
        f"pictures rendered on {options.device}": rate(
            len(scenes), lambda: render(scenes, world.side, options.device), options.device
        ),
        "pictures judged": rate(len(pictures), lambda: [parse(one, world) for one in pictures], "cpu"),
    }
    print(
        "\n".join(
            f"| {name} a second, {options.world} world | {number:.0f} |" for name, number in rows.items()
        )
    )


if __name__ == "__main__":
    main()
