"""How much host memory the ranks of a run take at their start: each reads its rows of one stored model.

    python -m benchmarks.start --ranks 1 2 4 8

Processes of their own join over gloo, build the model without memory, shard it and copy their rows from the
memory-mapped file, as `openbagel train` does. `own` is anonymous memory beyond that of a rank before it, its
highest value; random weights, float32.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from benchmarks.clock import table
from benchmarks.model import Rig
from openbagel.model.bagel import BagelModel
from openbagel.train.parallel import Parallel, Ranks, materialise, shard, stored_weights
from openbagel.weights import Checkpoint, TensorFiles, load_checkpoint, save_checkpoint, weight_files

PORT = 29517


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def start(folder: str) -> None:
    """One rank: prints by how many MB its own memory grew at most, and at the end."""
    torch.set_num_threads(1)
    ranks = Ranks("cpu")
    try:
        ranks.barrier()
        before, highest, done = anonymous_mb(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                highest[0] = max(highest[0], anonymous_mb())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = rows_of_this_rank(folder, ranks)
        done.set()
        watcher.join()
        print(max(highest[0], anonymous_mb()) - before, anonymous_mb() - before)
        ranks.barrier()
        assert isinstance(model, BagelModel)
    finally:
        ranks.close()


def rows_of_this_rank(folder: str, ranks: Ranks) -> BagelModel:
    if ranks.size == 1:
        return shard(load_checkpoint(folder, dtype=torch.float32).model.train(), Parallel(), ranks)
    model = load_checkpoint(folder, dtype=torch.float32, device="meta").model.train()
    shard(model, Parallel(), ranks)
    read = stored_weights(TensorFiles(weight_files(Path(folder))), model.config)
    materialise(model, read, ranks.device)
    return model


def measured(folder: str, ranks: int) -> list[tuple[float, float]]:
    """(highest, final) MB of each rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "benchmarks.start", "--of", folder]
    processes = [
        subprocess.Popen(
            command, env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), "a rank failed"
    return [(float(highest), float(final)) for highest, final in (text.split() for text in outputs)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        start(options.of)
        return
    with tempfile.TemporaryDirectory(prefix="openbagel-") as folder:
        rig = Rig.of(options.width, options.layers)
        save_checkpoint(folder, Checkpoint(rig.config, rig.engine.model, None, rig.engine.packer.codec))
        size = weight_files(Path(folder))[0].stat().st_size / 2**20
        rows: list[list[object]] = []
        for ranks in options.ranks:
            own = measured(folder, ranks)
            most, final = (sum(kind) for kind in zip(*own, strict=True))
            rows.append([ranks, max(highest for highest, _ in own), most, final, final / size])
    print(
        table(
            f"A stored model of {size:.0f} MB", ["ranks", "own MB, most", "all", "at the end", "models"], rows
        )
    )


if __name__ == "__main__":
    main()
