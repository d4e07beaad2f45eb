"""Checkpoints made to break, mislead or take over: each is one clear ValueError, quickly, in little memory,
and nothing in them runs.
"""

import json
import pickle
import random
import resource
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openbagel import cli
from openbagel.inference.pipeline import Bagel
from openbagel.lora import Adapter, bind, bound, load_adapter, save_adapter
from openbagel.weights import INDEX_FILE, describe, load_checkpoint, save_checkpoint
from tests import tiny

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")

EMA, VAE = "ema.safetensors", "ae.safetensors"
ROOM = 2**28
"""Bytes that a load of these tiny folders may take at its peak."""
SECONDS = 10.0
Change = Callable[[Path], object]


class Bomb:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """An allocation beyond ROOM fails, with another error than the expected one."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    return tmp_path / "model"


# ways to spoil a folder -------------------------------------------------------------------------------------


def pickled(name: str, instead: str = EMA) -> Change:
    def change(folder: Path) -> None:
        (folder / instead).unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(folder / "ran")))

    return change


def header(change: Callable[[dict[str, Any]], object], name: str = EMA) -> Change:
    """Rewrites what the head of a tensor file says; its data stay."""

    def rewrite(folder: Path) -> None:
        content = (folder / name).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        entries.pop("__metadata__", None)
        changed = change(entries)
        head = changed if isinstance(changed, bytes) else json.dumps(entries).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])

    return rewrite


def first(**entries: Any) -> Change:
    return header(lambda h: next(iter(h.values())).update(entries))


def overlapping(entries: dict[str, Any]) -> None:
    one, other, *_ = (e for e in entries.values() if e["shape"] == [64])
    one["data_offsets"] = other["data_offsets"]


def raw(content: bytes, name: str = EMA) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = EMA) -> Change:
    def rewrite(folder: Path) -> None:
        stored = {key: value.clone() for key, value in load_file(folder / name).items()}
        change(stored)
        save_file(stored, folder / name)

    return rewrite


def config(path: str, value: Any) -> Change:
    """Sets an entry of config.json, by its dotted path."""

    def rewrite(folder: Path) -> None:
        file = folder / "config.json"
        tree = part = json.loads(file.read_text())
        *above, leaf = path.split(".")
        for key in above:
            part = part[key]
        part[leaf] = value
        file.write_text(json.dumps(tree))

    return rewrite


def spoilt_config(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / "config.json").write_bytes(change((folder / "config.json").read_bytes()))


def shards(weight_map: Any) -> Change:
    def rewrite(folder: Path) -> None:
        (folder / EMA).rename(folder.parent / EMA)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    return rewrite


def twice(folder: Path) -> None:
    content = (folder / EMA).read_bytes()
    shards({"a": "a.safetensors", "b": "b.safetensors"})(folder)
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(content)


def long(name: str, size: int = 2**31) -> Change:
    """A file of 2 GB that takes no disk."""

    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        file = folder / "tokenizer.json"
        tree = json.loads(file.read_text())
        change(tree)
        file.write_text(json.dumps(tree))

    return rewrite


FOREVER = b'{"a":' * 100_000
Q = "language_model.model.layers.0.self_attn.q_proj.weight"
HOSTILE: dict[str, tuple[Change, str]] = {
    "a pickle alone": (pickled("pytorch_model.bin"), "bin is a pickle, which can run code"),
    "a pickled checkpoint": (pickled("model.ckpt"), "ckpt is a pickle.*convert it to safetensors"),
    "a pickle under a tensor file's name": (pickled(EMA), "ema.safetensors is no complete safetensors file"),
    "a pickled autoencoder": (pickled(VAE, VAE), "ae.safetensors is no complete safetensors file"),
    "a pickle among the shards": (shards({"a": "x.pt"}), "x.pt is a pickle"),
    "an empty file": (raw(b""), "no complete safetensors file"),
    "a pointer of Git LFS": (
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "Git LFS.*pull",
    ),
    "a head beyond the file": (raw(struct.pack("<Q", 10**6) + b"{}"), "no complete safetensors file"),
    "a head of 2^63 bytes": (raw(struct.pack("<Q", 2**63) + b"{}"), "no complete safetensors file"),
    "nothing but zeros": (long(EMA, 2**27), "no complete safetensors file"),
    "a head that nests": (header(lambda h: FOREVER), "no complete safetensors file"),
    "a head in another encoding": (header(lambda h: b'{"\xff": 1}'), "no complete safetensors file"),
    "overlapping tensors": (header(overlapping), "no complete safetensors file"),
    "tensors beyond the file": (first(data_offsets=[0, 2**40]), "no complete safetensors file"),
    "offsets that turn round": (first(data_offsets=[4, 0]), "no complete safetensors file"),
    "a negative size": (first(shape=[-1, 64]), "no complete safetensors file"),
    "a size beyond 2^64": (first(shape=[2**62, 64]), "no complete safetensors file"),
    "a type that is none": (first(dtype="object"), "no complete safetensors file"),
    "whole numbers": (tensors(lambda t: t.update({Q: t[Q].long()})), "stored as torch.int64"),
    "a table without sides": (
        tensors(lambda t: t.update({"latent_pos_embed.pos_embed": torch.tensor(1.0)})),
        "make no sense",
    ),
    "a projection without sides": (
        tensors(lambda t: t.update({"vae2llm.weight": torch.ones(3)})),
        "make no sense",
    ),
    "an autoencoder of nothing": (
        tensors(lambda t: t.update({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}), VAE),
        "make no sense",
    ),
    "an autoencoder without its first part": (
        tensors(lambda t: t.pop("encoder.conv_in.weight"), VAE),
        "make no sense.*encoder.conv_in.weight",
    ),
    "a shard above": (shards({"a": "../ema.safetensors"}), r"names no files of its own.*\.\./ema"),
    "a shard elsewhere": (shards({"a": "/etc/passwd"}), "names no files of its own.*/etc/passwd"),
    "shards that are numbers": (shards({"a": 7}), "7 is no complete safetensors file"),
    "a list of shards": (shards(["a.safetensors"]), "names no files of its own"),
    "a tensor in two shards": (twice, "another shard holds too"),
    "a width of 10^9": (config("llm_config.hidden_size", 10**9), "hidden_size=1000000000 is not possible"),
    "a width of another model": (config("llm_config.hidden_size", 2**18), "misshapen"),
    "a negative width": (config("vit_config.intermediate_size", -5), "intermediate_size=-5 is not possible"),
    "10^9 layers": (config("llm_config.num_hidden_layers", 10**9), "num_hidden_layers=1000000000"),
    "999 layers": (config("llm_config.num_hidden_layers", 999), "does not fit the 2 stored layers"),
    "10^30 words": (config("llm_config.vocab_size", 10**30), "vocab_size=10{30} is not possible"),
    "no heads": (config("llm_config.num_attention_heads", 0), "num_attention_heads=0"),
    "heads that do not fit": (config("vit_config.num_attention_heads", 5), "num_attention_heads=5"),
    "a table of 10^12 places": (config("max_latent_size", 10**6), "max_latent_size=1000000 is not possible"),
    "an autoencoder of 99 levels": (config("vae_config.ch_mult", [1] * 99), "ch_mult=.* is not possible"),
    "channels of a text": (config("vae_config.z_channels", "4"), "make no sense|z_channels"),
    "a width in words": (config("llm_config.hidden_size", "64"), "hidden_size: expected int, got '64'"),
    "a part that is a list": (config("llm_config", [1]), "make no sense"),
    "settings that are a text": (config("openbagel", "__import__('os')"), "expected an object"),
    "sampling without end": (config("openbagel.draw.max_tokens", -1), "max_tokens -1"),
    "not a number": (spoilt_config(lambda c: c.replace(b"1e-06", b"NaN")), "NaN is no finite number"),
    "infinity": (spoilt_config(lambda c: c.replace(b"1e-06", b"1e999")), "1e999 is no finite number"),
    "a key twice": (spoilt_config(lambda c: c.replace(b"{", b'{"llm_config": {},', 1)), "a key stands twice"),
    "JSON that nests": (spoilt_config(lambda c: FOREVER), "config.json is no valid JSON"),
    "JSON of 2 GB": (long("config.json"), "longer than"),
    "JSON in another encoding": (spoilt_config(lambda c: b"\xff\xfe" + c), "config.json is no valid JSON"),
    "a list for an object": (spoilt_config(lambda c: b"[]"), "config.json is no valid JSON"),
    "a number of 10^6 digits": (spoilt_config(lambda c: c.replace(b"1e-06", b"9" * 10**6)), "no valid JSON"),
    "a tokenizer of nothing": (tokenizer(lambda t: t.clear()), "the tokenizer of .* is broken"),
    "a tokenizer that nests": (raw(FOREVER, "tokenizer.json"), "the tokenizer of .* is broken"),
    "a tokenizer of 2 GB": (long("tokenizer.json"), "the tokenizer of .* is larger"),
    "a tokenizer of a larger model": (
        tokenizer(lambda t: t["model"]["vocab"].update({"far": 2**31})),
        "its tokenizer has id 2147483648",
    ),
}
UNREAD = ("whole numbers", "a width of another model")
"""What `openbagel info` cannot see, for it builds nothing. Nor does it read tokenizers."""


@pytest.mark.parametrize("case", HOSTILE)
def test_one_clear_error(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = HOSTILE[case]
    change(folder)
    start = time.monotonic()
    with pytest.raises(ValueError, match=words) as caught:
        Bagel.load(folder, device="cpu")
    assert time.monotonic() - start < SECONDS
    assert len(str(caught.value)) < 6000
    code = cli.main(["info", str(folder)])
    told = capsys.readouterr().err
    assert "Traceback" not in told and len(told.splitlines()) <= 1
    assert code == (0 if case in UNREAD or "tokenizer" in case else 2), told
    assert not (folder / "ran").exists()


def test_files_are_no_better_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.pt"
    path.write_bytes(pickle.dumps(Bomb(folder / "ran")))
    with pytest.raises(ValueError, match="pickle"):
        Bagel.load(path, device="cpu")
    assert cli.main(["info", str(path)]) == 2
    assert "pickle" in capsys.readouterr().err and not (folder / "ran").exists()


def test_links_are_followed(folder: Path) -> None:
    """Into the Hub's cache, and to wherever a user keeps large files."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / f"{path.name}-hash")
        path.symlink_to(f"../blobs/{path.name}-hash")
    assert load_checkpoint(folder).config == tiny.config()


LEAVES = (None, -1, 0, 1, 10**9, 2.5, True, "x", "", [], [[]], {}, {"a": {}}, [10**9], 1e308)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value of a JSON tree, objects and lists themselves included."""
    yield path
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def test_no_value_of_a_configuration_does_worse(folder: Path) -> None:
    """Every value of config.json, replaced: the folder loads, or it is a ValueError."""
    file, rng = folder / "config.json", random.Random(0)
    whole = file.read_text()
    refused = 0
    for path in [path for path in places(json.loads(whole)) if path]:
        for value in rng.sample(LEAVES, 5):
            tree = part = json.loads(whole)
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = value
            file.write_text(json.dumps(tree))
            try:
                (load_checkpoint if rng.random() < 0.1 else describe)(folder)
            except ValueError:
                refused += 1
    assert refused > 300


def test_adapters_are_checked_before_they_are_bound(tmp_path: Path) -> None:
    model = load_checkpoint_copy(tmp_path)
    bind(model, Adapter(rank=2), generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter")
    spoilt: dict[str, tuple[Change, str]] = {
        "rank": (adapter_config(r=10**9), "misshapen"),
        "dropout": (adapter_config(lora_dropout=float("inf")), "no valid JSON"),
        "head": (raw(struct.pack("<Q", 2**40), "adapter_model.safetensors"), "no complete safetensors"),
        "pickle": (pickled("adapter_model.bin", "adapter_model.safetensors"), "it has no adapter_model"),
        "nested": (raw(FOREVER, "adapter_config.json"), "no valid JSON"),
    }
    for name, (change, words) in spoilt.items():
        target = tmp_path / name
        save_adapter(model, target)
        change(target)
        fresh = load_checkpoint(tmp_path / "model").model
        with pytest.raises(ValueError, match=words), warnings.catch_warnings():
            load_adapter(fresh, target)
        assert not bound(fresh) and not (target / "ran").exists()


def load_checkpoint_copy(tmp_path: Path) -> torch.nn.Module:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    return load_checkpoint(tmp_path / "model").model


def adapter_config(**entries: Any) -> Change:
    def rewrite(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return rewrite
