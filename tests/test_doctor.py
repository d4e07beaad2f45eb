"""Broken set-ups, each really made or simulated: one right line each, with the command that repairs it."""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from openbagel import cli, doctor
from openbagel.quantize import Precision, quantize
from openbagel.weights import load_checkpoint, save_checkpoint
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
REQUIREMENTS = PROJECT["dependencies"] + [
    f"{requirement}; extra == '{extra}'" for extra, listed in EXTRAS.items() for requirement in listed
]
OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NONE = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
)
Break = Callable[[pytest.MonkeyPatch, Path], object]


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with everything: all packages, a torch for CPUs, no driver, room, the network."""
    versions = {name: metadata.version(name) for name in ("torch", "pillow", "safetensors")}
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name, "99.0"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(1e12)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    return tmp_path / "model"


def lines(*levels: str, model: object = None) -> list[str]:
    found = list(doctor.examine(None if model is None else str(model)))
    assert all("\n" not in text for _, text in found)
    return [text for level, text in found if level in levels]


def test_a_sound_machine_has_nothing_to_say(folder: Path) -> None:
    assert lines("warn", "bad", model=folder) == []
    told = "\n".join(lines("ok", model=folder))
    for words in (
        "Python 3.",
        "torch 2.",
        "float32, in which a CPU",
        "extra video",
        "attention split by",
        "GB",
    ):
        assert words in told
    assert sum(text.startswith("extra ") for text in told.splitlines()) == len(
        doctor.PURPOSES.keys() & EXTRAS
    )


def test_every_extra_has_a_purpose() -> None:
    assert EXTRAS.keys() - {"train", "dev"} <= doctor.PURPOSES.keys()


# the machine ------------------------------------------------------------------------------------------------


def package(name: str, version: str | None) -> Break:
    def broken(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
        before = metadata.version

        def found(asked: str) -> str:
            if asked != name:
                return before(asked)
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", found)

    return broken


def built_for_cuda(error: Exception | None) -> Break:
    def broken(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
        def init() -> None:
            if error:
                raise error

        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "init", init)

    return broken


def card(capability: tuple[int, int], free: float = 23.6e9) -> Break:
    def broken(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
        facts: dict[str, Any] = {
            "is_available": True,
            "mem_get_info": (int(free), int(24e9)),
            "get_device_name": "NVIDIA Card",
            "get_device_capability": capability,
            "is_bf16_supported": capability >= (8, 0),
        }
        for name, value in facts.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(torch.version, "cuda", "12.8")

    return broken


def free_disk(size: float) -> Break:
    return lambda monkeypatch, _: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size))
    )


def patched(owner: object, name: str, value: object) -> Break:
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, value)


MACHINES: dict[str, tuple[Break, str, str]] = {
    "old pillow": (package("pillow", "9.5.0"), "bad", "pillow 9.5.0 is too old: pip install -U 'pillow>="),
    "old torch": (package("torch", "2.4.1+cu121"), "bad", "torch 2.4.1+cu121 is too old: pip install -U"),
    "no tokenizers": (package("tokenizers", None), "bad", "tokenizers is missing: pip install -U"),
    "no extra": (package("av", None), "warn", "av is missing, so no video files: pip install"),
    "old extra": (package("bitsandbytes", "0.40.0"), "warn", "bitsandbytes 0.40.0 is too old, so no"),
    "no driver": (built_for_cuda(RuntimeError(NONE)), "warn", "no NVIDIA driver on your system: install"),
    "old driver": (built_for_cuda(RuntimeError(OLD)), "bad", "(found version 11040): update the NVIDIA"),
    "no card": (built_for_cuda(None), "warn", "CUDA finds no card: install the NVIDIA driver"),
    "torch without CUDA": (
        patched(shutil, "which", lambda name: "/usr/bin/nvidia-smi"),
        "bad",
        "has an NVIDIA driver: pip install --force-reinstall torch --index-url",
    ),
    "a card without bfloat16": (card((7, 5)), "warn", "7.5 has no bfloat16: --dtype float16"),
    "a full disk": (free_disk(3e9), "warn", "27.0 GB less than ByteDance-Seed/BAGEL-7B"),
    "offline": (patched(constants, "HF_HUB_OFFLINE", True), "warn", "unset HF_HUB_OFFLINE"),
    "idle cores": (
        patched(doctor.os, "sched_getaffinity", lambda _: range(64)),
        "warn",
        "1 threads on 64 cores: unset OMP_NUM_THREADS",
    ),
}


@pytest.mark.parametrize("case", MACHINES)
def test_machines(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken, level, words = MACHINES[case]
    broken(monkeypatch, tmp_path)
    (line,) = lines("warn", "bad")
    assert words in line and line in lines(level)
    assert cli.main(["doctor"]) == (1 if level == "bad" else 0)


def test_a_good_card_is_told_with_what_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card((8, 9))(monkeypatch, tmp_path)
    assert lines("warn", "bad") == []
    told = "\n".join(lines("ok"))
    for words in (
        "NVIDIA Card, 23.6 of 24.0 GB free",
        "bfloat16, in which the card computes",
        "flash kernel",
    ):
        assert words in told


# a model ----------------------------------------------------------------------------------------------------


def without(name: str) -> Break:
    return lambda _, folder: (folder / name).unlink()


def emptied(_: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_shard_short(_: pytest.MonkeyPatch, folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    emptied(_, folder)
    save_checkpoint(folder, checkpoint, shard_bytes=100_000)
    next(folder.glob("model-00002-*")).unlink()


def cut(_: pytest.MonkeyPatch, folder: Path) -> None:
    content = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(content[: len(content) // 2])


def pointer(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "ema.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def of_another_size(_: pytest.MonkeyPatch, folder: Path) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    tree["llm_config"]["intermediate_size"] = 128
    path.write_text(json.dumps(tree))


def pickled(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "ema.safetensors").rename(folder / "pytorch_model.bin")


def packed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint = load_checkpoint(folder)
    quantize(checkpoint.model, Precision.NF4)
    save_checkpoint(folder, checkpoint)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


DOWNLOAD = "openbagel download ByteDance-Seed/BAGEL-7B-MoT --to "
FOLDERS: dict[str, tuple[Break, str]] = {
    "nothing in it": (emptied, f"holds no weights.*: {DOWNLOAD}"),
    "no folder": (lambda _, folder: shutil.rmtree(folder), f"no such model folder.*: {DOWNLOAD}"),
    "a missing shard": (a_shard_short, f"model-00002-of-.*: {DOWNLOAD}"),
    "half a download": (cut, f"no complete safetensors file.*: {DOWNLOAD}"),
    "a pointer of Git LFS": (pointer, "pointer of Git LFS, no tensors: run `git lfs pull` in its folder$"),
    "no tokenizer": (without("tokenizer.json"), f"holds no tokenizer.*: {DOWNLOAD}"),
    "no autoencoder": (without("ae.safetensors"), f"has no ae.safetensors, so it cannot draw: {DOWNLOAD}"),
    "another configuration": (of_another_size, f"does not fit its configuration.*misshapen.*: {DOWNLOAD}"),
    "pickles": (pickled, "is a pickle.*convert it to safetensors$"),
    "packed, no unpacker": (packed, r"precision nf4 needs bitsandbytes: pip install 'openbagel\[quant\]'$"),
    "more than the card": (card((8, 0), 1e5), "GB of cuda; what fits: openbagel info .* --fit"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    broken, words = FOLDERS[case]
    broken(monkeypatch, folder)
    (line,) = lines("bad", model=folder)
    assert doctor.re.search(words, line), line
    assert cli.main(["doctor", str(folder)]) == 1


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_that_is_not_in_the_cache(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nor is it asked for there
    (line,) = lines("bad", model="some/model")
    wanted = "run `openbagel download some/model`"
    assert line.endswith(f"; unset HF_HUB_OFFLINE and {wanted}" if offline else f"; {wanted}")


def test_it_answers_where_torch_is_missing(tmp_path: Path) -> None:
    """As `python -m openbagel.doctor`, which imports nothing that may be broken."""
    script = (
        "import sys, importlib.metadata as m\n"
        "sys.modules.update(dict.fromkeys(('torch', 'PIL', 'huggingface_hub')))\n"
        "version = m.version\n"
        "m.version = lambda name: m.Distribution.from_name('no-such') if name == 'torch' else version(name)\n"
        "from openbagel import doctor\n"
        "sys.exit(doctor.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    assert "bad  torch is missing: pip install -U 'torch>=" in done.stdout
