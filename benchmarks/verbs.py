"""How long verbs of the command line take from start to end, here and in other checkouts.

    python -m benchmarks.verbs --others ../before --repeats 8

Wall time of processes of their own, with nano, the checkouts taking turns; the least, the median, the most.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.clock import table

COMMAND = "import sys; from openbagel.cli import main; sys.exit(main())"
VERBS = (["generate", "a red circle", "-o", "drawn.png"], ["ask", "drawn.png", "what colour is the circle?"])


def seconds(checkout: Path, verb: list[str], folder: str) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, *verb], cwd=folder, env=environment, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--others", type=Path, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=8)
    asked = parser.parse_args()
    checkouts = [Path(__file__).parents[1], *asked.others]
    took: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(asked.repeats):
            for checkout in checkouts:
                for verb in VERBS:
                    took.setdefault((checkout.name, verb[0]), []).append(seconds(checkout, verb, folder))
    rows = [[*which, min(times), statistics.median(times), max(times)] for which, times in took.items()]
    print(table("Seconds from start to end", ["checkout", "verb", "least", "median", "most"], rows))


if __name__ == "__main__":
    main()
