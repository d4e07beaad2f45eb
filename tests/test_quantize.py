"""Packed linears: the right ones, close to the original, the same after saving, moved but never cast; the
model is never there twice; and clear words for what cannot be.
"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openbagel import lora, quantize
from openbagel.cli import main
from openbagel.config import Experts, nano
from openbagel.inference.pipeline import Bagel
from openbagel.lora import Adapter, bind, bound, load_adapter, merge, save_adapter
from openbagel.model.bagel import BagelModel
from openbagel.quantize import LAYERS, PackedLinear, Precision, packed_names, precision_of
from openbagel.train.stages import train
from openbagel.weights import Checkpoint, describe, load_checkpoint, save_checkpoint
from tests import tiny
from tests.train.test_trainer import quiet, recipe

SAMPLES = tiny.samples(3) + tiny.samples(5)
HERE = ("int8", "fp8", "nf4")
"""What a CPU can run."""
BOUNDS = {"int8": 0.03, "fp8": 0.1, "nf4": 0.3}
"""Of the relative error of a random model's hidden states."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(experts: Experts = Experts.MOT) -> BagelModel:
    return copy.deepcopy(tiny.model(experts))


def packed(precision: str, experts: Experts = Experts.MOT) -> BagelModel:
    model = fresh(experts)
    quantize.quantize(model, precision)
    return model


def hidden(model: nn.Module, experts: Experts = Experts.MOT) -> Tensor:
    with torch.inference_mode():
        return model(tiny.packer(experts).pack(SAMPLES))


def one(precision: str, outputs: int = 48, inputs: int = 128, scale: float = 1.0) -> tuple[nn.Linear, Tensor]:
    """A packed linear with a bias, and the weight that it was made of."""
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    linear.weight.normal_(0, scale, generator=seeded())
    return PackedLinear(linear, Precision(precision), None), linear.weight


def unpacked(linear: nn.Linear) -> Tensor:
    """The numbers that a packed linear stands for: the slow way."""
    assert isinstance(linear, PackedLinear)
    if linear.precision is not Precision.NF4:
        return linear.weight.float() * linear.scale
    functional = pytest.importorskip("bitsandbytes.functional")
    codes = torch.stack([linear.weight.flatten() >> 4, linear.weight.flatten() & 15], 1).flatten()
    values = functional.get_4bit_type("nf4", device="cpu")[codes.int()]
    values = F.pad(values, (0, -len(values) % 64)).view(-1, 64) * linear.scale[:, None]
    shape = (linear.out_features, linear.in_features)
    return values.flatten()[: shape[0] * shape[1]].view(shape)


def quick(bagel: Bagel) -> Bagel:
    return bagel.using(replace(bagel.config.settings.draw, num_timesteps=5, max_tokens=4))


def off(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


# numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", HERE)
@pytest.mark.parametrize("experts", Experts)
def test_the_decoders_linears_are_packed_and_nothing_else(experts: Experts, precision: str) -> None:
    model, plain = fresh(experts), tiny.model(experts)
    assert quantize.quantize(model, precision) == len(lora.choose(plain, Adapter()))
    assert precision_of(model) == precision and precision_of(plain) is None
    linears = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in linears if name.startswith(LAYERS)}
    assert packed_names(model) == {f"{name}.{leaf}" for name in wanted for leaf in ("weight", "scale")}
    before, after = plain.state_dict(), model.state_dict()
    kept = before.keys() & after.keys() - packed_names(model)
    assert kept == before.keys() - {f"{name}.weight" for name in wanted}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert 0 < off(hidden(model, experts), hidden(plain, experts)) < BOUNDS[precision]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [128, 96, 480])  # blocks of 64 that end with a row and that do not
@pytest.mark.parametrize("precision", HERE)
def test_a_packed_linear_computes_with_the_numbers_it_stands_for(
    precision: str, inputs: int, dtype: torch.dtype
) -> None:
    linear, weight = one(precision, inputs=inputs)
    assert off(unpacked(linear), weight) < {"int8": 0.01, "fp8": 0.03, "nf4": 0.1}[precision]
    for rows in (1, 40):
        x = torch.randn(rows, inputs, generator=seeded(1)).to(dtype).requires_grad_()
        linear.to(dtype)
        y = linear(x)
        right = F.linear(x.float(), unpacked(linear), linear.bias.float())
        assert y.dtype == dtype and off(y, right) < (1e-6 if dtype is torch.float32 else 1e-2)
        y.float().sum().backward()
        assert x.grad is not None and off(x.grad, unpacked(linear).sum(0).expand(rows, -1)) < 1e-2


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_numbers_are_torchaos(precision: str) -> None:
    ao = pytest.importorskip("torchao.quantization")
    linear, weight = one(precision)
    kind = {"int8": ao.Int8Tensor, "fp8": ao.Float8Tensor}[precision]
    theirs = kind.from_hp(weight, granularity=ao.PerRow())
    assert torch.equal(linear.weight.float(), theirs.qdata.float())
    assert torch.equal(linear.get_parameter("scale"), theirs.scale)


def test_the_numbers_of_nf4_are_bitsandbytes_without_double_quantisation() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    linear, weight = one("nf4")
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    assert torch.equal(linear.weight, theirs) and torch.equal(linear.get_parameter("scale"), state.absmax)
    assert torch.equal(unpacked(linear), functional.dequantize_4bit(theirs, state))


def test_every_fp8_number_is_read_right() -> None:
    """A CPU reads them by their bits."""
    linear, _ = one("fp8", outputs=2, inputs=127)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.isnan()].view(2, 127)
    linear._parameters["weight"] = nn.Parameter(numbers, requires_grad=False)
    linear._parameters["scale"] = nn.Parameter(torch.ones(2, 1), requires_grad=False)
    linear.register_parameter("bias", None)
    assert torch.equal(linear(torch.eye(127)), numbers.float().T)


@pytest.mark.parametrize("precision", HERE)
def test_float16_does_not_overflow_on_the_way(precision: str) -> None:
    linear, _ = one(precision, inputs=4096, scale=0.02)
    linear.to(torch.float16)
    x = torch.full((3, 4096), 60.0, dtype=torch.float16)
    assert off(linear(x), F.linear(x.float(), unpacked(linear), linear.bias.float())) < 1e-2
    assert linear(torch.zeros_like(x)).isfinite().all()


@pytest.mark.parametrize("precision", HERE)
def test_rows_of_zeros_stay_zero(precision: str) -> None:
    linear = nn.Linear(64, 4, bias=False)
    nn.init.zeros_(linear.weight)
    zero = PackedLinear(linear, Precision(precision), None)
    assert not zero(torch.ones(2, 64)).any()


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_half_precision_is_close_on_nano(dtype: torch.dtype) -> None:
    """What is in float32 by code (norms, positions, times, flow state) keeps float16 and bfloat16 near."""
    whole, half = (quick(Bagel.load(device="cpu", dtype=d)) for d in (torch.float32, dtype))
    assert {p.dtype for p in half.model.parameters()} == {dtype}
    a, b = (
        torch.tensor(list(each.generate("a red circle", seed=3).tobytes())).float() for each in (whole, half)
    )
    assert (a - b).abs().mean() < (2 if dtype is torch.float16 else 6)


def test_a_picture_that_overflowed_is_an_error() -> None:
    bagel = tiny.bagel()
    with pytest.raises(ValueError, match=r"overflowed \(float32\); load the model in bfloat16"):
        bagel.decode(torch.full((4, bagel.config.latent_channels), float("nan")), (2, 2))


# moving, saving and loading --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", HERE)
def test_what_is_packed_is_moved_but_never_cast(precision: str) -> None:
    model, twin = packed(precision), packed(precision)
    for cast in (model.half(), copy.deepcopy(model).to(torch.bfloat16)):
        assert all(
            torch.equal(cast.get_parameter(name), twin.get_parameter(name)) for name in packed_names(twin)
        )
    plain = {p.dtype for name, p in model.named_parameters() if name not in packed_names(model)}
    assert plain == {torch.float16}
    layout = {name: (p.shape, p.dtype) for name, p in twin.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in twin.to("meta").named_parameters()} == layout
    meta = fresh().to("meta")
    quantize.quantize(meta, precision)
    assert {name: (p.shape, p.dtype) for name, p in meta.named_parameters()} == layout


@pytest.mark.parametrize("shard_bytes", [None, 100_000])
@pytest.mark.parametrize("precision", HERE)
def test_a_saved_model_comes_back_bit_equal(precision: str, shard_bytes: int | None, folder: Path) -> None:
    checkpoint = replace(tiny.checkpoint(), model=packed(precision))
    save_checkpoint(folder, checkpoint, shard_bytes=shard_bytes)
    assert json.loads((folder / "config.json").read_text())["quantization"] == {"precision": precision}
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    again = load_checkpoint(folder)
    assert precision_of(again.model) == precision and torch.equal(
        hidden(again.model), hidden(checkpoint.model)
    )
    half = load_checkpoint(folder, dtype=torch.bfloat16).model
    assert all(torch.equal(half.get_parameter(n), again.model.get_parameter(n)) for n in packed_names(half))
    assert half.get_parameter("llm2vae.weight").dtype == torch.bfloat16
    save_checkpoint(folder.with_name("plain"), tiny.checkpoint())
    told, plain = describe(folder), describe(folder.with_name("plain"))
    assert told["quantization"] == precision and plain["quantization"] is None
    assert told["config"] == plain["config"]
    looking = load_checkpoint(folder, understanding_only=True).model
    assert not [name for name in packed_names(looking) if "_moe_gen" in name] and precision_of(looking)


@pytest.mark.parametrize("precision", HERE)
def test_packed_on_load_or_before_the_verbs_do_the_same(precision: str, tmp_path: Path) -> None:
    assert main(["convert", "nano", str(tmp_path / "packed"), "--to", precision]) == 0
    saved = quick(Bagel.load(tmp_path / "packed", device="cpu"))
    packed = quick(Bagel.load("nano", device="cpu", quantize=precision))
    pictures = [each.generate("a red circle", seed=1) for each in (saved, packed)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert saved.ask(pictures, "what shape?") == packed.ask(pictures, "what shape?")
    sizes = [p.stat().st_size for p in (tmp_path / "packed").glob("ema*")]
    assert sum(sizes) < {"int8": 0.6, "fp8": 0.6, "nf4": 0.4}[precision] * 14_925_776


def test_the_command_line_packs_and_does_not_pack_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, folder = tmp_path / "a.png", str(tmp_path / "int8")
    options = ["--quantize", "int8", "--device", "cpu", "--num-timesteps", "3", "-o", str(drawn)]
    assert main(["generate", "a red circle", *options]) == 0
    assert drawn.is_file()
    assert main(["convert", "nano", folder, "--to", "int8"]) == 0
    assert main(["convert", folder, str(tmp_path / "b"), "--to", "nf4"]) == 2
    assert f"the weights of {folder} are int8 already" in capsys.readouterr().err
    assert main(["ask", "how many?", "--model", folder, "--quantize", "nf4", "--device", "cpu"]) == 2
    assert "the weights are int8 already; take the original ones to get nf4" in capsys.readouterr().err
    assert main(["convert", "nano", str(tmp_path / "c"), "--to", "dfloat11", "--shard-gb", "1"]) == 2
    assert "--shard-gb has no effect with --to dfloat11" in capsys.readouterr().err


MEMORY = """
import json, sys
import torch
from openbagel import quantize
from openbagel.inference.pipeline import Bagel

torch.set_num_threads(1)

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

most, pack = 0, quantize._pack

def watched(*arguments):
    global most
    parts = pack(*arguments)
    most = max(most, anonymous())
    return parts

small, large = sys.argv[1:]
Bagel.load(small, device="cpu", quantize="int8")  # whatever a first load imports and allocates
quantize._pack, before = watched, anonymous()
model = Bagel.load(large, device="cpu", quantize="int8").model
size = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"most": max(most, anonymous()) - before, "size": size}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_model_never_exists_twice(tmp_path: Path) -> None:
    """What is packed takes memory, the original stays in the file's pages, but for one linear at a time."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = replace(tiny.config(), llm=replace(tiny.config().llm, **sizes, num_key_value_heads=2))
    with torch.device("meta"):
        model = BagelModel(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    save_checkpoint(tmp_path / "large", Checkpoint(config, model, None, tiny.codec()))
    save_checkpoint(tmp_path / "small", tiny.checkpoint())
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    options = {"cwd": Path(__file__).parents[1], "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stderr
    seen, original = json.loads(done.stdout), sum(parameter.nbytes for parameter in model.parameters())
    assert 40e6 < seen["size"] < 0.6 * original
    one_linear = 4 * 512 * 2048
    assert seen["most"] < 1.05 * seen["size"] + 3 * one_linear


# adapters on packed bases ----------------------------------------------------------------------------------


def loss(model: BagelModel, experts: Experts = Experts.MOT) -> Tensor:
    ce, mse = model.losses(tiny.packer(experts).pack(SAMPLES))
    return ce.mean() + mse.mean()


@pytest.mark.parametrize(("precision", "experts"), [("nf4", e) for e in Experts] + [("int8", Experts.MOT)])
def test_adapters_learn_on_a_packed_base(precision: str, experts: Experts, folder: Path) -> None:
    model, dense = packed(precision, experts), fresh(experts)
    for name, linear in model.named_modules():
        if isinstance(linear, PackedLinear):  # the same numbers, unpacked: the slow way to the same result
            dense.get_parameter(f"{name}.weight").data.copy_(unpacked(linear))
    for each in (model, dense):
        bind(each, Adapter(rank=4), generator=seeded())
        generator = seeded(7)
        for low in bound(each).values():
            low.B.data.normal_(0, low.rank**0.5 / low.alpha, generator=generator)
        loss(each, experts).backward()
    assert off(hidden(model, experts), hidden(dense, experts)) < 1e-4
    for ours, theirs in zip(bound(model).values(), bound(dense).values(), strict=True):
        assert ours.A.grad is not None and theirs.A.grad is not None and theirs.A.grad.any()
        assert off(ours.A.grad, theirs.A.grad) < 1e-3
    save_adapter(model, folder)
    again = packed(precision, experts)
    load_adapter(again, folder)
    assert torch.equal(hidden(again, experts), hidden(model, experts))
    with pytest.raises(ValueError, match=f"{precision} weights cannot take an adapter in"):
        merge(model)
    with pytest.raises(ValueError, match="an adapter is bound to the model"):
        quantize.quantize(dense, precision)


def test_packed_weights_do_not_learn(tmp_path: Path) -> None:
    assert main(["convert", "nano", str(tmp_path / "int8"), "--to", "int8"]) == 0
    with pytest.raises(ValueError, match="int8 weights do not learn; add lora"):
        train(recipe(tmp_path / "int8", tmp_path / "run", train__steps=1), quiet)


# what cannot be --------------------------------------------------------------------------------------------


def test_unknown_precisions_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="precision 'in8' is none of int8, fp8, nf4, int4; did you mean 'int8'"
    ):
        quantize.quantize(fresh(), "in8")
    with pytest.raises(ValueError, match="are int8 already"):
        quantize.quantize(packed("int8"), "nf4")


def test_a_device_that_cannot_names_what_can() -> None:
    with pytest.raises(ValueError, match="int4 needs a CUDA card .* not cpu; use nf4 or int8"):
        Bagel.load("nano", device="cpu", quantize="int4")
    with pytest.raises(ValueError, match="fp8 weights cannot be on mps.*use int8 or nf4"):
        quantize.check_device(Precision.FP8, "mps")
    for device in ("cpu", "mps", "cuda"):
        quantize.check_device(Precision.INT8, device)
        quantize.check_device(None, device)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    save_checkpoint(folder, replace(tiny.checkpoint(), model=packed("nf4")))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"nf4 needs bitsandbytes: pip install 'openbagel\[quant\]'"):
        packed("nf4")
    with pytest.raises(ValueError, match=r"openbagel\[quant\]"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match=r"precision int4 needs torchao"):
        PackedLinear(nn.Linear(128, 8, device="meta"), Precision.INT4, None)
    assert precision_of(packed("int8")) and precision_of(packed("fp8"))  # need no extra


def test_int4_is_laid_out_as_torchao_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card only shapes and types can be seen, and which linears are left alone."""
    ao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for outputs, inputs in ((480, 256), (100, 1152), (3584, 18944)):
        with torch.device("meta"):
            linear = nn.Linear(inputs, outputs)
        theirs = ao.Int4TilePackedTo4dTensor.from_hp(linear.weight.bfloat16(), [1, quantize.GROUP])
        ours = PackedLinear(linear, Precision.INT4, None)
        for part, right in zip((ours.weight, ours.scale), (theirs.qdata, theirs.scale_and_zero), strict=True):
            assert part.shape == right.shape and part.dtype == right.dtype
    with torch.device("meta"):
        model = BagelModel(nano(512))
    with pytest.warns(UserWarning, match=r"12 of 84 linears keep .* groups of 128 .*down_proj \(480\)"):
        assert quantize.quantize(model, "int4") == 72


def test_int4_folders_load_where_they_can_run(folder: Path) -> None:
    pytest.importorskip("torchao.quantization")
    config = nano(512)
    with torch.device("meta"):
        model = BagelModel(config)
    with pytest.warns(UserWarning, match="12 of 84"):
        quantize.quantize(model, "int4")
    model.to_empty(device="cpu")
    save_checkpoint(folder, Checkpoint(config, model, None, tiny.codec()))
    with pytest.warns(UserWarning, match="12 of 84"):
        assert precision_of(load_checkpoint(folder).model) == "int4"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="int4 needs a CUDA card .* not cpu"):
        Bagel.load(folder, device="cpu")


FOREIGN = "packed by another tool, are not read: take the original ones and pack them"


def change(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_what_other_tools_packed_is_refused(folder: Path) -> None:
    save_checkpoint(folder, tiny.checkpoint())
    file, name = folder / "ema.safetensors", LAYERS + "0.self_attn.q_proj.weight"
    tensors = load_file(file)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {name: tensors[name].to(dtype)}, file)
        with pytest.raises(ValueError, match=f"{name} is stored as {dtype}; such weights, {FOREIGN}"):
            load_checkpoint(folder, dtype=torch.float32)
    save_file(tensors | {name: tensors[name].to(torch.int8), f"{name}_scale": torch.ones(64, 1)}, file)
    with pytest.raises(ValueError, match=f"1 unexpected: {name}_scale; such weights, {FOREIGN}"):
        load_checkpoint(folder)
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match=f"config.json: quantization_config; such weights, {FOREIGN}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("entry", ["int7", {"precision": "int7"}, {}, ["int8"], 8])
def test_unknown_entries_are_refused(entry: object, folder: Path) -> None:
    save_checkpoint(folder, replace(tiny.checkpoint(), model=packed("int8")))
    change(folder, quantization=entry)
    with pytest.raises(ValueError, match="config.json: quantization .* is none of int8, fp8, nf4, int4"):
        load_checkpoint(folder)


def test_packed_tensors_of_other_shapes_and_types_are_refused(folder: Path) -> None:
    save_checkpoint(folder, replace(tiny.checkpoint(), model=packed("int8")))
    file, name = folder / "ema.safetensors", LAYERS + "0.self_attn.q_proj"
    tensors = load_file(file)
    save_file(tensors | {f"{name}.scale": torch.ones(1, 1)}, file)
    with pytest.raises(ValueError, match=rf"1 misshapen: {name}.scale \(1, 1\), expected \(64, 1\)"):
        load_checkpoint(folder)
    save_file(tensors | {f"{name}.weight": torch.zeros(64, 64)}, file)
    with pytest.raises(ValueError, match=f"{name}.weight is stored as torch.float32"):
        load_checkpoint(folder)
    save_file(tensors, file)
    change(folder, quantization={"precision": "nf4"})
    with pytest.raises(ValueError, match="misshapen"):
        load_checkpoint(folder)
