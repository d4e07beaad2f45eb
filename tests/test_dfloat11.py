"""DFloat11: every packed bit comes back, the buffers are what the package defines, folders load strictly.

`formats/dfloat11_0_5_0.safetensors` was packed by dfloat11 0.5.0 itself: a module with two weights (14,000)
and an embedding (800), beside the same weights unpacked. `as_the_kernel` reads buffers as its kernel does.
"""

import importlib.machinery
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openbagel import dfloat11
from openbagel.dfloat11 import decode, encode, write_dfloat11
from openbagel.hub import NANO
from openbagel.inference.pipeline import Bagel
from openbagel.lora import Adapter, bind, load_adapter, save_adapter
from openbagel.model.bagel import BagelModel
from openbagel.quantize import quantize
from openbagel.sequence import Text
from openbagel.weights import Checkpoint, describe, load_checkpoint, open_weights, save_checkpoint
from tests import tiny
from tests.test_weights import identical, starts_alike

PACKED_BY_THE_PACKAGE = Path(__file__).parent / "formats" / "dfloat11_0_5_0.safetensors"
BLOCK = "language_model_model_layers_1.safetensors"


def floats(bits: list[int] | np.ndarray) -> Tensor:
    """bfloat16 with these 16 bits each."""
    return torch.from_numpy(np.asarray(bits, np.uint16).view(np.int16)).view(torch.bfloat16)


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and signs of zeros too."""
    return a.dtype is b.dtype is torch.bfloat16 and torch.equal(a.view(torch.int16), b.view(torch.int16))


def packed(values: Tensor) -> dict[str, Tensor]:
    buffers = encode(values)
    assert buffers is not None
    return buffers


def as_the_kernel(buffers: dict[str, Tensor]) -> Tensor:
    """One thread for each 8 bytes, 512 of them a block, which knows the number of its first weight."""
    luts, data = buffers["luts"].tolist(), bytes(buffers["encoded_exponent"].tolist())
    others = buffers["sign_mantissa"].tolist()
    firsts = buffers["output_positions"].numpy().view(np.uint32).tolist()
    gaps = "".join(f"{byte:08b}" for byte in buffers["gaps"].tolist())
    blocks = -(-len(data) // 4096)
    assert len(firsts) == blocks + 1
    assert len(gaps) == blocks * 512 * 5
    out: list[int] = []
    for thread in range(blocks * 512):
        if thread % 512 == 0:
            out = out[: firsts[thread // 512]]
            assert len(out) == firsts[thread // 512]
        if thread * 8 >= len(data):
            break
        window = int.from_bytes(data[thread * 8 :][:12].ljust(12, b"\0"))
        place = int(gaps[thread * 5 :][:5], 2)
        while place < 64:
            table, found = 0, 255
            for depth in range(4):
                found = luts[table][(window << 32 >> 120 - place - 8 * depth) & 255]
                if found < 240:
                    break
                table = 256 - found
            assert luts[-1][found] > 0  # else the thread would stand still
            place += luts[-1][found]
            out.append(found)
    pairs = zip(out[: len(others)], others, strict=True)
    return floats([(other & 128) << 8 | exponent << 7 | other & 127 for exponent, other in pairs])


def fibonacci(count: int) -> list[int]:
    numbers = [1, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers


def normal(count: int, seed: int = 0) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


# packing ----------------------------------------------------------------------------------------------------

SPECIAL = {
    "zeros of both signs": [0, 0x8000] * 40,
    "one value": [0x3F80] * 1000,
    "one weight": [0xBF81],
    "denormals": list(range(1, 128)) + [0x8001],
    "every exponent that has a code": [e << 7 | e & 127 for e in range(240)],
    "every mantissa": [0x3C00 | m for m in range(256)] * 3,
}


@pytest.mark.parametrize("bits", SPECIAL.values(), ids=SPECIAL)
def test_special_values_come_back(bits: list[int]) -> None:
    buffers = packed(floats(bits))
    assert equal(decode(buffers), floats(bits))
    assert equal(as_the_kernel(buffers), floats(bits))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2**16 - 1).filter(lambda b: b >> 7 & 255 < 240), min_size=1, max_size=300))
def test_any_values_come_back(bits: list[int]) -> None:
    buffers = packed(floats(bits))
    assert equal(decode(buffers), floats(bits))
    assert equal(as_the_kernel(buffers), floats(bits))


@settings(max_examples=25)
@given(st.integers(1, 60_000), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_any_distribution_comes_back(count: int, spread: int, seed: int) -> None:
    """Enough weights for several blocks and for codes of every length up to 16 bits and more."""
    rng = np.random.default_rng(seed)
    exponents = np.minimum(rng.geometric(1.5 / spread, count), 239)
    values = floats((exponents << 7 | rng.integers(0, 2**16, count) & 0x807F).astype(np.uint16))
    assert (buffers := encode(values)) is None or equal(decode(buffers), values)


@pytest.mark.parametrize("depth", [9, 17, 25])
def test_long_codes(depth: int) -> None:
    """Fibonacci frequencies give codes as long as possible: one, two, three tables after the first."""
    counts = fibonacci(depth + 1)
    order = np.random.default_rng(depth).permutation(sum(counts))
    values = floats((np.repeat(np.arange(100, 101 + depth), counts)[order] << 7).astype(np.uint16))
    buffers = packed(values)
    assert int(buffers["luts"][-1].max()) == depth
    assert len(buffers["luts"]) == 2 + (depth - 1) // 8
    assert equal(decode(buffers), values)


def test_pieces_and_lanes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(70_000)
    whole = packed(values)
    monkeypatch.setattr(dfloat11, "PIECE", 777)
    monkeypatch.setattr(dfloat11, "LANES", 5)
    pieces = packed(values)
    assert all(torch.equal(pieces[leaf], whole[leaf]) for leaf in whole)
    assert equal(decode(pieces), values)
    assert equal(as_the_kernel(pieces), values)


def test_normal_weights_shrink_to_two_thirds() -> None:
    values = normal(200_000)
    assert sum(t.nbytes for t in packed(values).values()) / values.nbytes == pytest.approx(0.675, abs=0.005)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC1, 240 << 7], ids=["inf", "-inf", "nan", "huge"])
def test_values_without_a_code_are_not_packed(bits: int) -> None:
    assert encode(floats([0, bits])) is None


def test_codes_that_the_kernel_has_no_room_for_are_not_packed() -> None:
    assert encode(floats([0] * 23_550)) is not None
    assert encode(floats([0] * 23_551)) is None


def code(counts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return dfloat11._code(np.array(counts + [0] * (256 - len(counts))))


@pytest.mark.parametrize("counts", [fibonacci(60), [10**6] + [1] * 239], ids=["too long", "too many tables"])
def test_codes_stay_within_the_tables(counts: list[int]) -> None:
    lengths, _, luts = code(counts)
    assert lengths.max() <= 32
    assert sum(2.0**-length for length in lengths if length) == 1
    assert len(luts) <= 18


def test_codes_are_as_short_as_huffmans() -> None:
    lengths, bits, _ = code([1, 1, 2, 4, 8])
    assert lengths[:5].tolist() == [4, 4, 3, 2, 1]
    assert ["".join(map(str, bits[s, : lengths[s]])) for s in range(5)] == ["1110", "1111", "110", "10", "0"]


# the package ------------------------------------------------------------------------------------------------


def test_what_the_package_packed_is_read() -> None:
    stored = load_file(PACKED_BY_THE_PACKAGE)
    for owner, names in {"block": ["block.a", "block.b"], "embed": ["embed"]}.items():
        buffers = {leaf: stored[f"{owner}.{leaf}"] for leaf in dfloat11.LEAVES}
        expected = torch.cat([stored[f"expected.{name}.weight"].flatten() for name in names])
        assert equal(decode(buffers), expected)
        assert equal(as_the_kernel(buffers), expected)


def test_our_buffers_are_of_the_same_kind() -> None:
    stored = load_file(PACKED_BY_THE_PACKAGE)
    ours = packed(torch.cat([stored[f"expected.block.{part}.weight"].flatten() for part in "ab"]))
    theirs = {leaf: stored[f"block.{leaf}"] for leaf in dfloat11.LEAVES}
    assert all(ours[leaf].dtype is theirs[leaf].dtype for leaf in theirs)
    assert all(ours[leaf].dim() == theirs[leaf].dim() for leaf in theirs)
    assert torch.equal(ours["sign_mantissa"], theirs["sign_mantissa"])
    assert ours["encoded_exponent"].nbytes <= theirs["encoded_exponent"].nbytes  # no code for an end


def get_hook(threads: tuple[int], chunk: int) -> Callable[[nn.Module, Any], None]:
    """As in the package: writes decoded weights where the modules look for them, at each forward."""
    assert (threads, chunk) == ((512,), 8)

    def hook(module: Any, _: Any) -> None:
        flat = decode({leaf: getattr(module, leaf) for leaf in dfloat11.LEAVES})
        assert module.shared_mem_size <= 48 * 1024
        if isinstance(module, nn.Linear):
            module.weight = flat.view(module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            module.weight = flat.view(module.num_embeddings, module.embedding_dim)
        else:
            parts = torch.tensor_split(flat, module.split_positions)
            for linear, part in zip(module.weight_injection_modules, parts, strict=True):
                linear.weight = part.view(linear.out_features, linear.in_features)

    return hook


def test_on_cuda_the_package_decodes_at_each_forward(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wiring alone, on a CPU that passes for CUDA with a package that passes for the real one."""
    package, inner = ModuleType("dfloat11"), ModuleType("dfloat11.dfloat11")
    package.__spec__ = importlib.machinery.ModuleSpec("dfloat11", None)
    inner.get_hook = get_hook  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "dfloat11", package)
    monkeypatch.setitem(sys.modules, "dfloat11.dfloat11", inner)
    move = Tensor.to
    kept = lambda t, *to, device=None, **more: t if "cuda" in to else move(t, *to, **more)  # noqa: E731
    monkeypatch.setattr(Tensor, "to", kept)
    loaded = load_checkpoint(folder, dtype=torch.bfloat16, device="cuda")
    owners = {name.rpartition(".")[0] for name, _ in loaded.model.named_buffers()}
    assert len(owners) == 2 + 2 + 2  # embeddings and head, layers, ViT's layers
    assert not any(
        "proj" in n and n.endswith("weight") for n, _ in loaded.model.language_model.named_parameters()
    )
    bind(adapted := BagelModel(tiny.config()), Adapter(rank=2), generator=torch.Generator())
    save_adapter(adapted, tmp_path / "adapter")
    for refused in (
        lambda: save_checkpoint(tmp_path / "again", loaded),
        lambda: quantize(loaded.model, "int8"),
        lambda: bind(loaded.model, Adapter(), generator=torch.Generator()),
        lambda: load_adapter(loaded.model, tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=r"packed \(DFloat11\).*device='cpu'.*convert . --to bfloat16"):
            refused()
    assert load_adapter(load_checkpoint(folder).model, tmp_path / "adapter") == 28
    part = load_checkpoint(folder, dtype=torch.bfloat16, device="cuda", understanding_only=True)
    pack, words = tiny.packer().pack(tiny.samples(3)), tiny.packer().pack([[Text((1, 2, 3))]])
    with torch.no_grad():
        hidden = bfloat16().model(pack)
        assert torch.equal(loaded.model(pack), hidden)
        assert torch.equal(loaded.model.logits(hidden), bfloat16().model.logits(hidden))
        assert torch.equal(part.model(words), bfloat16().model(words))


# folders ----------------------------------------------------------------------------------------------------


@cache
def bfloat16() -> Checkpoint:
    """The tiny checkpoint in bfloat16; its autoencoder stays as it is."""
    model = BagelModel(tiny.config()).bfloat16().eval()
    model.load_state_dict(tiny.model().state_dict())
    return replace(tiny.checkpoint(), model=model)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_dfloat11(folder, tiny.checkpoint())
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(written, tmp_path / "model")


def test_round_trip(folder: Path) -> None:
    assert identical(load_checkpoint(folder), bfloat16())
    half = load_checkpoint(folder, dtype=torch.float32)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    config = json.loads((folder / "config.json").read_text())["dfloat11_config"]
    assert list(config) == ["version", "threads_per_block", "bytes_per_thread", "pattern_dict"]
    assert not (folder / "ae.safetensors").exists()  # the package would take its tensors for the model's
    assert (folder / "vae" / "ae.safetensors").is_file()
    stored = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert sum(name.endswith(".encoded_exponent") for name in stored) == 6
    assert not any("proj.weight" in name for name in stored)


def test_weights_without_a_code_lie_beside_the_packed_ones(tmp_path: Path) -> None:
    model = BagelModel(tiny.config()).bfloat16().eval()
    model.load_state_dict(tiny.model().state_dict())
    with torch.no_grad():
        model.get_parameter("language_model.model.layers.1.mlp.up_proj.weight")[3, 4] = float("inf")
    odd = replace(tiny.checkpoint(), model=model)
    write_dfloat11(tmp_path, odd)
    assert not (tmp_path / BLOCK).exists()
    assert identical(load_checkpoint(tmp_path), odd)


def test_understanding_alone(folder: Path) -> None:
    half = load_checkpoint(folder, understanding_only=True)
    whole = bfloat16().model.state_dict()
    assert all(equal(tensor, whole[name]) for name, tensor in half.model.state_dict().items())
    assert not any("moe_gen" in name for name, _ in half.model.named_parameters())


def test_description(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain", bfloat16())
    packed, plain = describe(folder), describe(tmp_path / "plain")
    assert packed["dtypes"] == ["BF16", "DF11"]
    assert packed["config"] == plain["config"]


def test_facts_that_no_file_states_are_read_beside_packed_weights(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("layer_module", "vit_max_num_patch_per_side", "max_latent_size", "latent_patch_size"):
        del config[key]
    path.write_text(json.dumps(config))
    assert identical(load_checkpoint(folder), bfloat16())


def test_nano_draws_the_same_picture(tmp_path: Path) -> None:
    plain = Bagel.load("nano", dtype=torch.bfloat16)
    write_dfloat11(tmp_path, load_checkpoint(NANO))
    packed = Bagel.load(tmp_path, dtype=torch.bfloat16)
    sampling = replace(plain.config.settings.draw, num_timesteps=4)
    pictures = [bagel.using(sampling).generate("a red circle", seed=1) for bagel in (plain, packed)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize("weights", [None, "model"])
def test_training_begins_from_one(folder: Path, tmp_path: Path, weights: str | None) -> None:
    assert starts_alike(folder, tmp_path, weights=weights)


# damage -----------------------------------------------------------------------------------------------------


def change(path: Path, name: str, tensor: Tensor | None) -> None:
    stored = {key: value.clone() for key, value in load_file(path).items()}
    stored.pop(name)
    save_file(stored | ({name: tensor} if tensor is not None else {}), path, {"format": "pt"})


DAMAGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda t: None,
    "half": lambda t: t[: len(t) // 2].clone(),
    "zeros": torch.zeros_like,
    "ones": lambda t: torch.full_like(t, 255),
    "flipped": lambda t: t.flip(0),
    "empty": lambda t: t[:0].clone(),
    "deeper": lambda t: t[None, None].clone(),
    "of floats": lambda t: t.float() + 0.5,
}


@pytest.mark.parametrize("leaf", [*dfloat11.LEAVES, "split_positions"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_buffers(folder: Path, leaf: str, damage: str) -> None:
    """An error, or the same weights; signs and mantissas alone have no false values."""
    layer, weight = "language_model.model.layers.1.", "language_model.model.layers.1.mlp.up_proj.weight"
    change(folder / BLOCK, layer + leaf, DAMAGES[damage](load_file(folder / BLOCK)[layer + leaf]))
    expected = bfloat16().model.get_parameter(weight)
    try:
        files = open_weights(folder)
        read = files[weight] if files.shapes().get(weight) == expected.shape else None
    except ValueError:
        return
    if read is None:  # what `load_checkpoint` finds missing or misshapen
        with pytest.raises(ValueError, match="does not fit its configuration"):
            load_checkpoint(folder)
    elif leaf != "sign_mantissa" or damage not in ("zeros", "ones", "flipped"):
        assert equal(read, expected)


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {},
        {"threads_per_block": []},
        {"threads_per_block": ["512"]},
        {"threads_per_block": [0]},
        {"bytes_per_thread": 16},
        {"pattern_dict": {"(": []}},
        {"pattern_dict": {"other": []}},
        {"pattern_dict": ["language_model"]},
        {"pattern_dict": {r"language_model\.model\.layers\.\d+": ["self_attn.q_proj"]}},
        {"pattern_dict": {r"(\w+\.?)+!": []}},
        {"pattern_dict": {r".*.*.*.*.*.*.*.*!": []}},
        {"pattern_dict": {r"\d+\d+\d+\d+\d+\d+\d+!": []}},
        {"pattern_dict": {r"\d+.\d+.\d+.\d+.\d+": []}},
        {"pattern_dict": {r"(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)!": []}},
    ],
    ids=str,
)
def test_damaged_settings(folder: Path, damage: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    own = config["dfloat11_config"]
    config["dfloat11_config"] = own | damage if damage else damage
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not as dfloat11"):
        open_weights(folder)
