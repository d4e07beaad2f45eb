"""GGUF: what each kind keeps, every type that is read, and files that lie."""

import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from openbagel.gguf_files import KINDS, GGUFFile, write_gguf
from openbagel.inference.pipeline import Bagel
from openbagel.model.bagel import BagelModel
from openbagel.weights import describe, load_checkpoint
from tests import tiny
from tests.test_weights import same, starts_alike

LAYERS = "language_model.model.layers."
ERRORS = {"q8_0": 0.01, "q5_1": 0.06, "q4_0": 0.13, "bf16": 0.003}
"""Relative to a weight's norm, for normally distributed values."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        write_gguf(folder, tiny.checkpoint(), kind)
    return made


def quantised(name: str, tensor: Tensor) -> bool:
    return name.startswith(LAYERS) and tensor.dim() == 2


# kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_what_it_promises(folders: dict[str, Path], kind: str) -> None:
    loaded = load_checkpoint(folders[kind])
    assert same(loaded.autoencoder, tiny.checkpoint().autoencoder)
    assert loaded.config == tiny.config()
    before, after = tiny.model().state_dict(), loaded.model.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        if quantised(name, tensor):
            error = float((after[name].float() - tensor).norm() / tensor.norm())
            assert 0 < error < ERRORS[kind], name
        else:
            assert after[name].dtype is tensor.dtype
            assert torch.equal(after[name], tensor), name
    assert describe(folders[kind])["dtypes"] == sorted(["F32", kind.upper()])


def test_kinds_are_of_different_size(folders: dict[str, Path]) -> None:
    sizes = [
        (folders[kind] / f"model-{kind}.gguf").stat().st_size for kind in ("q4_0", "q5_1", "q8_0", "bf16")
    ]
    linears = sum(t.numel() for name, t in tiny.model().state_dict().items() if quantised(name, t))
    bits = [4.5, 6, 8.5, 16]
    for (small, few), (large, many) in zip(zip(sizes, bits), list(zip(sizes, bits))[1:], strict=False):  # noqa: B905
        assert large - small == linears * (many - few) / 8


def test_bf16_is_the_nearest_bfloat16(folders: dict[str, Path]) -> None:
    loaded = load_checkpoint(folders["bf16"], dtype=torch.bfloat16).model.state_dict()
    assert all(torch.equal(loaded[name], t.bfloat16()) for name, t in tiny.model().state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_what_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = BagelModel(tiny.config()).to(dtype).eval()
    model.load_state_dict(tiny.model().state_dict())
    write_gguf(tmp_path, replace(tiny.checkpoint(), model=model), "q8_0")
    stored = GGUFFile(tmp_path / "model-q8_0.gguf")
    for name, tensor in model.state_dict().items():
        assert quantised(name, tensor) or (torch.equal(stored[name], tensor) and stored[name].dtype is dtype)
    assert {p.dtype for p in load_checkpoint(tmp_path, dtype=dtype).model.parameters()} == {dtype}


def test_rows_that_are_no_whole_blocks_keep_their_values(tmp_path: Path) -> None:
    llm = replace(tiny.config().llm, intermediate_size=80)
    config = replace(tiny.config(), llm=llm)
    odd = replace(tiny.checkpoint(), config=config, model=tiny.randomised(BagelModel(config)))
    write_gguf(tmp_path, odd, "q4_0")
    loaded = load_checkpoint(tmp_path).model.state_dict()
    for name, tensor in odd.model.state_dict().items():
        assert torch.equal(loaded[name], tensor) == (not quantised(name, tensor) or "down_proj" in name), name


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'q8' is none of q8_0, q5_1, q4_0, bf16.*q8_0"):
        write_gguf(tmp_path, tiny.checkpoint(), "q8")


def test_the_package_reads_our_files(folders: dict[str, Path]) -> None:
    path = folders["q5_1"] / "model-q5_1.gguf"
    ours, theirs = GGUFFile(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(ours.shapes()) == list(theirs)
    for name, shape in ours.shapes().items():
        values = gguf.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert values.shape == shape
        assert np.array_equal(ours[name].numpy(), values)


# loading ----------------------------------------------------------------------------------------------------


def test_loaded_by_folder_or_by_file(folders: dict[str, Path]) -> None:
    folder = folders["q8_0"]
    by_folder, by_file = Bagel.load(folder), Bagel.load(folder / "model-q8_0.gguf")
    assert by_folder.ask([], "how many?") == by_file.ask([], "how many?")
    assert by_folder.generate("a", seed=1).tobytes() == by_file.generate("a", seed=1).tobytes()
    half = load_checkpoint(folder, dtype=torch.bfloat16, understanding_only=True)
    assert not any("moe_gen" in name for name, _ in half.model.named_parameters())


def test_two_files_in_a_folder(tmp_path: Path) -> None:
    for kind in ("q8_0", "q4_0"):
        write_gguf(tmp_path, tiny.checkpoint(), kind)
    with pytest.raises(ValueError, match=r"holds model-q4_0.gguf, model-q8_0.gguf; give the path of one"):
        load_checkpoint(tmp_path)
    assert describe(tmp_path / "model-q4_0.gguf")["dtypes"] == ["F32", "Q4_0"]


def test_without_the_package(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'openbagel\[gguf\]'"):
        load_checkpoint(folders["q8_0"])


def test_names_of_others_are_the_usual_error(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = {name: (Type.F32, tensor.numpy()) for name, tensor in tiny.model().state_dict().items()}
    tensors["blk.0.attn_q.weight"] = tensors.pop(LAYERS + "0.self_attn.q_proj.weight")
    path = write(tmp_path, tensors)
    with pytest.raises(
        ValueError, match="does not fit its configuration; .*missing.*1 unexpected: blk.0.attn_q.weight"
    ):
        load_checkpoint(folders["q8_0"], weights=path)


@pytest.mark.parametrize("place", ["", "model-q8_0.gguf"], ids=["folder", "file"])
def test_training_begins_from_one(folders: dict[str, Path], tmp_path: Path, place: str) -> None:
    assert starts_alike(folders["q8_0"] / place, tmp_path)


# types ------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: dict[str, tuple[Type, np.ndarray]], **facts: Any) -> Path:
    """A file by the package; quantised tensors are given as bytes."""
    writer = gguf.GGUFWriter(folder / "made.gguf", "bagel")
    writer.add_array("tokens", ["a", "b" * 300])
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_string("note", "ä")
    writer.add_bool("yes", True)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    if "alignment" in facts:
        writer.add_custom_alignment(facts["alignment"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "made.gguf"


READ = [t for t in Type if hasattr(gguf.quants, t.name) or t.name in ("F32", "F16", "BF16")]


@pytest.mark.parametrize("kind", READ, ids=lambda t: t.name)
def test_every_type_is_read(tmp_path: Path, kind: Type) -> None:
    """K-quants among them: random blocks, whose scales are made finite, against the package's own reading."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (3, 512 // block * size), np.uint8)
    path = write(tmp_path, {"a": (kind, raw), "b": (Type.F32, np.arange(5, dtype=np.float32))}, alignment=64)
    files = GGUFFile(path)
    assert files.shapes() == {"a": (3, 512), "b": (5,)}
    expected = gguf.dequantize(raw, kind)
    if kind is Type.BF16:
        assert files["a"].dtype is torch.bfloat16
    assert np.isfinite(expected).all()
    assert np.array_equal(files["a"].float().numpy(), expected)
    assert files["b"].tolist() == [0, 1, 2, 3, 4]


def test_k_quants_are_among_them() -> None:
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_1", "Q4_0", "BF16"} <= {t.name for t in READ}


@pytest.mark.parametrize("kind", [Type.I32, Type.F64, Type.Q8_K], ids=lambda t: t.name)
def test_types_without_a_reading(tmp_path: Path, kind: Type) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    path = write(tmp_path, {"a": (kind, np.zeros((2, 256 // block * size), np.uint8))})
    with pytest.raises(ValueError, match=f"a, {kind.name} .* cannot be read"):
        GGUFFile(path)


# damage -----------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str = "a", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(tensors: int = 0, facts: int = 0, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, facts)


FULL = bytes(256)
LIES = {
    "empty": b"",
    "short": header()[:20],
    "another magic": header(magic=b"GGML") + FULL,
    "another version": header(version=1) + FULL,
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + FULL,
    "endless tensors": header(2**63) + FULL,
    "more tensors than bytes": header(200) + FULL,
    "endless facts": header(0, 2**64 - 1) + FULL,
    "endless key": header(0, 1) + struct.pack("<Q", 2**62) + FULL,
    "endless text": header(0, 1) + text("k") + struct.pack("<IQ", 8, 2**63) + FULL,
    "endless array": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**62) + FULL,
    "endless array of texts": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**62) + FULL,
    "array of arrays": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 4) + FULL,
    "unknown fact": header(0, 1) + text("k") + struct.pack("<I", 77) + FULL,
    "endless dimensions": header(1) + text("a") + struct.pack("<I", 2**32 - 1) + FULL,
    "endless rows": header(1) + info(dims=(2**40, 2**40)) + FULL,
    "wrapped product": header(1) + info(dims=(2**32, 2**32)) + FULL,
    "no dimension": header(1) + info(dims=()) + FULL,
    "unknown type": header(1) + info(kind=99) + FULL,
    "removed type": header(1) + info(kind=4) + FULL,
    "broken block": header(1) + info(dims=(33,), kind=8) + FULL,
    "offset beyond the end": header(1) + info(offset=4096) + FULL,
    "endless offset": header(1) + info(offset=2**64 - 32) + FULL,
    "crooked offset": header(1) + info(offset=7) + FULL,
    "the same name twice": header(2) + info() + info() + FULL,
    "name in no encoding": header(1) + struct.pack("<Q", 2) + b"\xff\xfe" + info()[9:] + FULL,
    "crooked alignment": header(1, 1) + text("general.alignment") + struct.pack("<II", 4, 3) + info() + FULL,
    "endless alignment": header(1, 1)
    + text("general.alignment")
    + struct.pack("<II", 4, 2**31)
    + info()
    + FULL,
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[lie])
    start = time.perf_counter()
    with pytest.raises(ValueError, match="is no sound GGUF file"):
        GGUFFile(path)
    assert time.perf_counter() - start < 2


def test_the_truth_is_read(tmp_path: Path) -> None:
    """The file that the lies above are made from."""
    path = tmp_path / "model.gguf"
    path.write_bytes(header(1) + info() + FULL)
    assert GGUFFile(path)["a"].tolist() == [0] * 32


def damaged(data: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    changed = bytearray(data)
    for place in rng.integers(0, 600, rng.integers(1, 4)):
        changed[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    return bytes(changed[: rng.integers(0, len(data))] if seed % 3 == 0 else changed)


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Every file is refused, or all that its header lists can be read."""
    raw = np.random.default_rng(1).integers(0, 60, (2, 34 * 2), np.uint8)
    made = write(tmp_path, {name: (Type.Q8_0, raw) for name in ("first", "second", "third")}).read_bytes()
    path, refused = tmp_path / "damaged.gguf", 0
    for seed in range(400):
        path.write_bytes(damaged(made, seed))
        try:
            files = GGUFFile(path)
        except ValueError:
            refused += 1
        else:
            assert all(tuple(files[name].shape) == shape for name, shape in files.shapes().items())
    assert 100 < refused < 390
