"""Files of others, which may be broken or hostile: read strictly, bounded, and never run."""

import json
import math
from pathlib import Path
from typing import Any

from openbagel.checks import retold

MOST_BYTES = 2**24
"""Of a JSON file."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError for anything else, and for what readers take differently: a key
    that stands twice, numbers that are not finite.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is no finite number")
        return value

    with retold(f"{path} is no valid JSON ({{error}})", ValueError, RecursionError):
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"longer than {MOST_BYTES} bytes")
        text = path.read_text("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def check_tensor_file(path: Path) -> None:
    """ValueError for what must not be opened as safetensors. Its library checks the header against the file
    before it maps anything: lengths, offsets without gaps or overlaps, shapes, types.
    """
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code and is never opened: convert it to safetensors"
        )
    with path.open("rb") as file:
        if file.read(8) == b"version ":
            raise ValueError(f"{path} is a pointer of Git LFS, no tensors: run `git lfs pull` in its folder")
