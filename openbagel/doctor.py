"""What of this machine, and of a model, is in order, and the one command that repairs what is not.

Nothing is imported before it is known to be there: `python -m openbagel.doctor` answers even where a broken
package keeps the other verbs from starting.
"""

import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

PURPOSES = {
    "data": "Parquet data sets",
    "video": "video files",
    "quant": "weights in 4 bits, 8-bit optimisers",
    "plot": "curves",
    "track": "TensorBoard, Weights & Biases",
    "gguf": "GGUF files",
    "dfloat11": "fast DFloat11 weights on CUDA",
    "hf": "the transformers classes",
    "serve": "HTTP server",
    "ui": "web interface",
    "ray": "Ray actors",
}
"""What each extra is for."""
REQUIREMENT = r"([\w.-]+)[^>;]*(?:>=([\d.]+))?(?:.*extra == .(\w+))?"
"""A package, its least version and the extra it belongs to, as metadata writes them."""
OFFICIAL, LARGE = "ByteDance-Seed/BAGEL-7B-MoT", 30e9
"""The released model and the bytes of its folder."""
Finding = tuple[Literal["ok", "warn", "bad"], str]


def examine(model: str | None = None) -> Iterator[Finding]:
    """Findings about this machine, then about a model: "nano", a path, or a Hugging Face id in the cache."""
    yield from (packages := list(_packages()))
    if all(level != "bad" for level, _ in packages):  # else what follows may not even start
        yield from _device()
        yield from _room()
        yield from _model(model) if model else ()


def _packages() -> Iterator[Finding]:
    """What this package's own metadata requires; extras are needed only by those who use them."""
    present, lacking = [f"Python {sys.version.split()[0]}"], defaultdict[str, list[str]](list)
    for text in metadata.requires("openbagel") or ():
        name, least, extra = re.findall(REQUIREMENT, text)[0]
        try:
            told = f"{name} {(found := metadata.version(name))}"
            fault = f"{told} is too old" if _numbers(found) < _numbers(least) else ""
        except metadata.PackageNotFoundError:
            told = fault = f"{name} is missing"
        lacking[extra] += [fault] if fault else []
        if fault and not extra:
            yield "bad", f"{fault}: pip install -U '{name}{least and f'>={least}'}'"
        present += [] if fault or extra else [told]
    yield "ok", ", ".join(present)
    for extra in (extra for extra in PURPOSES if extra in lacking):
        if told := ", ".join(lacking[extra]):
            yield "warn", f"{told}, so no {PURPOSES[extra]}: pip install -U 'openbagel[{extra}]'"
        else:
            yield "ok", f"extra {extra}: {PURPOSES[extra]}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _device() -> Iterator[Finding]:
    import torch

    from openbagel.weights import default_dtype

    kernel = "torch's own kernel for CPUs"
    if torch.cuda.is_available():
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        yield "ok", f"{name}, {free:.1f} of {total:.1f} GB free; torch has CUDA {torch.version.cuda}"
        if default_dtype("cuda") is torch.bfloat16:
            yield "ok", "bfloat16, in which the card computes"
        else:
            lacks = f"float32, for a card of compute capability {major}.{minor} has no bfloat16"
            yield "warn", f"{lacks}: --dtype float16 takes half the memory"
        kernel = f"torch's {'flash' if major >= 8 else 'memory-efficient'} kernel in 16 bits"
    else:
        yield _without_cuda()
        yield "ok", "float32, in which a CPU is fastest; --dtype bfloat16 takes half the memory"
        if torch.backends.mps.is_available():
            yield "ok", "Apple GPU: taken with --device mps"
    yield "ok", f"attention split by split, which needs no mask, by {kernel}; flash-attn is never needed"


def _without_cuda() -> Finding:
    import torch

    build, driver = torch.version.cuda or torch.version.hip, shutil.which("nvidia-smi")
    if build is None:
        wheels = "--force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        told = f"torch has no CUDA, but this machine has an NVIDIA driver: pip install {wheels}"
        return ("bad", told) if driver else ("ok", "CPU, and torch for it")
    try:
        torch.cuda.init()
        reason = "CUDA finds no card"
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
    if "too old" in reason:
        return "bad", f"torch is built for CUDA {build}, and {reason}: update the NVIDIA driver"
    return "warn", f"the CPU is taken, for torch has CUDA {build}, but {reason}: install the NVIDIA driver"


def _room() -> Iterator[Finding]:
    import torch
    from huggingface_hub import constants

    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores, threads = len(affinity(0)), torch.get_num_threads()
    told = f"{threads} threads on {cores} cores"
    yield ("warn", f"{told}: unset OMP_NUM_THREADS") if 2 * threads < cores else ("ok", told)
    yield "ok", f"{_memory('cpu') / 1e9:.1f} GB of memory"
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    told = f"{free / 1e9:.1f} GB of disk free in {cache}"
    lacks = f"{told}, {(LARGE - free) / 1e9:.1f} GB less than {OFFICIAL} takes: set HF_HOME to another disk"
    yield ("warn", lacks) if free < LARGE else ("ok", told)
    if constants.HF_HUB_OFFLINE:
        yield "warn", "models come from the cache alone, for HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE"


def _memory(device: str) -> int:
    """Bytes that a model may take: free ones of a card, else all of the machine."""
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _model(model: str) -> Iterator[Finding]:
    import torch

    from openbagel.hub import find_model
    from openbagel.weights import default_device, default_dtype, load_checkpoint

    device, again = default_device().type, f"download {OFFICIAL} --to {model}"
    try:
        folder = find_model(model, cached=True)
        checkpoint = load_checkpoint(folder, dtype=default_dtype(device), device="meta")
    except (ValueError, OSError) as error:
        has_remedy = re.search("`|pip install|convert it", str(error))
        yield "bad", f"{error}" if has_remedy else f"{error}: openbagel {again}"
        return
    if checkpoint.config.vae and checkpoint.autoencoder is None:
        yield "bad", f"{folder} has no ae.safetensors, so it cannot draw: openbagel {again}"
    parts = (checkpoint.model, checkpoint.autoencoder or torch.nn.Module())
    size, room = sum(p.nbytes for part in parts for p in part.parameters()), _memory(device)
    told = f"{model} takes {size / 1e9:.2f} of the {room / 1e9:.2f} GB of {device}"
    fitting = f"{told}; what fits: openbagel info {model} --fit {room / 1e9:.1f}GB"
    yield ("bad", fitting) if size > room else ("ok", told)


def main(model: str | None = None) -> int:
    """Writes what `examine` finds; 1 if anything of it is bad."""
    code = 0
    for level, text in examine(model):
        sys.stdout.write(f"{level:<5}{text}\n")
        code |= level == "bad"
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
