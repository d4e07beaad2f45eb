"""Loading takes no memory of its own: weights stay in the file's pages, unless another type is asked for."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from openbagel.model.bagel import BagelModel
from openbagel.weights import Checkpoint, save_checkpoint
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, sys, torch
from openbagel.weights import load_checkpoint

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

small, large, dtype = sys.argv[1:]
torch.set_num_threads(1)
load_checkpoint(small)  # whatever a first load imports and allocates
before = anonymous()
model = load_checkpoint(large, dtype=getattr(torch, dtype)).model
sums = {name: parameter.sum().item() for name, parameter in model.named_parameters()}
size = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"grown": anonymous() - before, "size": size, "sums": sums}))
"""


@pytest.fixture(scope="module")
def large() -> Iterator[tuple[Path, dict[str, float]]]:
    """A random checkpoint of more than 1 GB in float32, and the sum of each of its tensors."""
    wide = replace(
        tiny.config().llm,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    config = replace(tiny.config(), llm=wide)
    model = tiny.randomised(BagelModel(config))
    with tempfile.TemporaryDirectory(prefix="openbagel-") as folder:
        save_checkpoint(folder, Checkpoint(config, model, None, tiny.codec()))
        assert (Path(folder) / "ema.safetensors").stat().st_size >= 1e9
        yield Path(folder), {name: parameter.sum().item() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.10), ("bfloat16", 1.10)])
def test_anonymous_memory(
    large: tuple[Path, dict[str, float]], tmp_path: Path, dtype: str, share: float
) -> None:
    """Of the size of the loaded weights: a tenth for bookkeeping, and all of it where they are cast."""
    folder, sums = large
    save_checkpoint(tmp_path, tiny.checkpoint())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(folder), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["size"] >= 1e9 * (1 if dtype == "float32" else 0.5)
    assert seen["grown"] <= share * seen["size"]
    assert seen["sums"] == sums if dtype == "float32" else set(seen["sums"]) == set(sums)
