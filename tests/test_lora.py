"""Adapters: PEFT reads ours and we read PEFT's, nothing binds by half, only adapters learn, merging changes
nothing.
"""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openbagel import lora
from openbagel.config import Experts, from_json
from openbagel.inference.pipeline import Bagel
from openbagel.lora import (
    LAYERS,
    PREFIX,
    TENSOR_FILE,
    Adapter,
    Preset,
    bind,
    bound,
    load_adapter,
    merge,
    remove,
    save_adapter,
)
from openbagel.model.bagel import BagelModel
from openbagel.weights import save_checkpoint
from tests import tiny

SAMPLES = tiny.samples(3) + tiny.samples(5)
PRESETS = tuple(Preset)
VARIANTS = tuple(Experts)
Q0 = LAYERS + "0.self_attn.q_proj"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(experts: Experts = Experts.MOT) -> BagelModel:
    return copy.deepcopy(tiny.model(experts))


def randomise(model: BagelModel) -> None:
    """B is zero at the start, so that an adapter that is never added would look right."""
    generator = seeded(7)
    for low in bound(model).values():
        low.B.data.normal_(0, low.rank**0.5 / low.alpha, generator=generator)  # as large as the weights


def adapted(adapter: Adapter, experts: Experts = Experts.MOT) -> BagelModel:
    model = fresh(experts)
    bind(model, adapter, generator=seeded())
    randomise(model)
    return model


def trainable(model: BagelModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def in_dtype(model: BagelModel, dtype: torch.dtype) -> BagelModel:
    """A copy whose base has the dtype, as loading gives it."""
    cast = copy.deepcopy(model).to(dtype)
    for name, low in bound(cast).items():
        low.A.data, low.B.data = bound(model)[name].A.data.clone(), bound(model)[name].B.data.clone()
    return cast


def hidden(model: torch.nn.Module, experts: Experts = Experts.MOT) -> Tensor:
    with torch.no_grad():
        return model(tiny.packer(experts).pack(SAMPLES))


def loss(model: BagelModel, experts: Experts = Experts.MOT) -> Tensor:
    ce, mse = model.losses(tiny.packer(experts).pack(SAMPLES))
    return ce.mean() + mse.mean()


def far(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


# binding ---------------------------------------------------------------------------------------------------

MODULES = {  # per layer: attention and feed-forward of each side
    (Experts.MOT, Preset.UND): 7,
    (Experts.MOT, Preset.GEN): 7,
    (Experts.MOT, Preset.BOTH): 14,
    (Experts.MOE, Preset.UND): 7,
    (Experts.MOE, Preset.GEN): 3,
    (Experts.MOE, Preset.BOTH): 10,
    (Experts.DENSE, Preset.UND): 7,
    (Experts.DENSE, Preset.BOTH): 7,
}


@pytest.mark.parametrize(("experts", "preset"), MODULES)
def test_bind_freezes_the_base_and_changes_nothing_yet(experts: Experts, preset: Preset) -> None:
    model, plain = fresh(experts), tiny.model(experts)
    count = bind(model, Adapter(preset=preset, rank=4), generator=seeded())
    assert count == len(bound(model)) == 2 * MODULES[experts, preset]
    assert torch.equal(hidden(model, experts), hidden(plain, experts))
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {f"{name}.lora.{part}" for name in bound(model) for part in "AB"}
    state = model.state_dict()
    assert [name for name in state if ".lora." not in name] == list(plain.state_dict())
    assert trainable(model) == sum(state[name].numel() for name in learned)
    if experts is Experts.MOT:
        gen = {"_moe_gen" in name for name in bound(model)}
        assert gen == {Preset.UND: {False}, Preset.GEN: {True}, Preset.BOTH: {False, True}}[preset]


def test_start_values_depend_on_the_generator_alone() -> None:
    models = [fresh() for _ in range(2)]
    for model in models:
        bind(model, Adapter(), generator=seeded(4))
    a, b = (torch.cat([low.A.flatten() for low in bound(model).values()]) for model in models)
    assert torch.equal(a, b)
    low = bound(models[0])[Q0]
    assert 0.9 / 8 < low.A.abs().max() <= 1 / 8  # kaiming-uniform: 1 / √64
    with torch.device("meta"):
        meta = BagelModel(tiny.config())
    bind(meta, Adapter(), generator=seeded(1))
    assert bound(meta)[Q0].A.is_meta
    start = lora.initial(meta, seeded(4))
    assert torch.equal(start[f"{Q0}.lora.A"], low.A)
    assert not start[f"{Q0}.lora.B"].any()


def test_targets_are_leaves_on_the_presets_side_or_patterns_anywhere() -> None:
    def names(*targets: str, preset: str = "gen") -> list[str]:
        return list(lora.choose(tiny.model(), Adapter(preset=Preset(preset), targets=targets)))

    assert names("q_proj") == [f"{LAYERS}{i}.self_attn.q_proj_moe_gen" for i in range(2)]
    assert names("v_proj", preset="und") == [f"{LAYERS}{i}.self_attn.v_proj" for i in range(2)]
    assert names(r"connector\.fc\d") == ["connector.fc1", "connector.fc2"]
    assert names(r".*layers\.1\.mlp\.up_proj", "down_proj") == [
        f"{LAYERS}0.mlp_moe_gen.down_proj",
        f"{LAYERS}1.mlp.up_proj",
        f"{LAYERS}1.mlp_moe_gen.down_proj",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "gne"}, "'gne' is none of und, gen, both; did you mean 'gen'"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"targets": ()}, "not empty"),
        ({"targets": ("q_porj",)}, r"'q_porj' is neither .*did you mean 'q_proj'"),
        ({"targets": ("embed_tokens",)}, "'embed_tokens' is neither"),
        ({"targets": ("(",)}, "no regular expression"),
    ],
)
def test_wrong_adapters_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora.choose(tiny.model(), Adapter(**options))


def test_what_finds_nothing_or_binds_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="preset 'gen' finds no q_proj.*choose 'und' or 'both'"):
        bind(fresh(Experts.DENSE), Adapter(preset=Preset.GEN), generator=seeded())
    with pytest.raises(ValueError, match="preset 'gen' finds no q_proj"):
        bind(fresh(Experts.MOE), Adapter(preset=Preset.GEN, targets=("q_proj",)), generator=seeded())
    with pytest.raises(ValueError, match="an adapter is bound to the model"):
        bind(adapted(Adapter(rank=2)), Adapter(), generator=seeded())
    assert from_json(Adapter, {"preset": "gen", "targets": ["q_proj"], "alpha": 8}, "lora").alpha == 8.0


# learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", VARIANTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_reach_every_adapter_and_nothing_else(experts: Experts, preset: Preset) -> None:
    if (experts, preset) not in MODULES:
        return
    model = adapted(Adapter(preset=preset, rank=2), experts)
    loss(model, experts).backward()
    assert all(low.A.grad is not None and low.A.grad.any() for low in bound(model).values())
    assert all(low.B.grad is not None and low.B.grad.any() for low in bound(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora." not in name)


@pytest.mark.parametrize("preset", PRESETS)
def test_thirty_steps_on_one_pack_lower_the_loss(preset: Preset) -> None:
    model, before = fresh(), tiny.model().state_dict()
    bind(model, Adapter(preset=preset, rank=8), generator=seeded())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(30):
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.85 * losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_rank_and_alpha_say_what_is_added() -> None:
    x = torch.randn(5, 64, generator=seeded())
    for rank, alpha in ((2, 8.0), (16, 32.0), (3, 1.0)):
        linear = adapted(Adapter(rank=rank, alpha=alpha, targets=("q_proj",))).get_submodule(Q0)
        low = linear.get_submodule("lora")
        assert isinstance(low, lora.LowRank) and isinstance(linear, torch.nn.Linear)
        assert low.A.shape == (rank, 64) and low.B.shape == (64, rank)
        weight = linear.weight + alpha / rank * low.B @ low.A
        assert far(linear(x), torch.nn.functional.linear(x, weight, linear.bias)) < 1e-5


def test_bfloat16_bases_keep_float32_adapters() -> None:
    whole = adapted(Adapter(rank=2))
    model = in_dtype(whole, torch.bfloat16)
    out = hidden(model)
    assert out.dtype == torch.bfloat16
    assert {low.A.dtype for low in bound(model).values()} == {torch.float32}
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = hidden(whole)
    for rounded in (out, hidden(model)):
        assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_dropout_acts_when_seeded_and_repeats() -> None:
    model = adapted(Adapter(rank=2, dropout=0.5))
    off = hidden(model)
    assert torch.equal(hidden(model.train()), off)  # no mode selects anything
    lora.seed_dropout(model, 1)
    assert torch.equal(first := hidden(model), hidden(model)) and far(first, off) > 1e-3
    recomputed = checkpoint(model.get_submodule(Q0), x := torch.ones(3, 64), use_reentrant=False)
    assert isinstance(recomputed, Tensor)
    parameters = [bound(model)[Q0].A, bound(model)[Q0].B]
    kept = torch.autograd.grad(model.get_submodule(Q0)(x).sum(), parameters)
    for a, b in zip(torch.autograd.grad(recomputed.sum(), parameters), kept, strict=True):
        assert torch.equal(a, b)
    lora.seed_dropout(model, 2)
    assert far(hidden(model), first) > 1e-3
    lora.seed_dropout(model, None)
    assert torch.equal(hidden(model), off)
    linear = model.get_submodule(Q0)
    assert isinstance(low := linear.get_submodule("lora"), lora.LowRank)
    x, total = torch.ones(1, 64), torch.zeros(1, 64)
    for low.seed in range(2000):
        total += linear(x).detach() / 2000
    low.seed = None
    assert far(total, linear(x)) < 0.15 * far(linear(x), torch.zeros(()))  # the mean is kept


# merging ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", VARIANTS)
def test_merged_equals_unmerged(experts: Experts) -> None:
    model = adapted(Adapter(rank=4), experts)
    unmerged, plain = hidden(model, experts), tiny.model(experts)
    assert far(unmerged, hidden(plain, experts)) > 0.1
    twin = copy.deepcopy(model)
    assert merge(model) == len(bound(twin)) > 0
    assert far(hidden(model, experts), unmerged) < 1e-5 * unmerged.abs().max()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(hidden(twin, experts), unmerged)  # a copy has hooks of its own
    remove(twin)
    assert torch.equal(hidden(twin, experts), hidden(plain, experts))
    assert list(twin.state_dict()) == list(plain.state_dict())


# files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", VARIANTS)
def test_a_saved_adapter_comes_back_bit_equal(experts: Experts, folder: Path) -> None:
    model = adapted(Adapter(rank=3, alpha=5.5, dropout=0.25, targets=("q_proj", "down_proj")), experts)
    save_adapter(model, folder, base="some/model")
    again = fresh(experts)
    assert load_adapter(again, folder) == len(bound(model))
    assert torch.equal(hidden(again, experts), hidden(model, experts))
    save_adapter(again, folder.with_name("again"), base="some/model")
    for path in folder.iterdir():
        assert path.read_bytes() == (folder.with_name("again") / path.name).read_bytes()
    assert trainable(again) == trainable(model)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5.5, 0.25)
    assert config["base_model_name_or_path"] == "some/model"


def test_given_state_is_what_is_stored(folder: Path) -> None:
    model = adapted(Adapter(rank=2, targets=("q_proj",)))
    average = {name: p.detach() / 2 for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, folder, state=average)
    stored = load_file(folder / TENSOR_FILE)
    assert torch.equal(stored[f"{PREFIX}{Q0}.lora_A.weight"], bound(model)[Q0].A / 2)
    with pytest.raises(ValueError, match="no adapter is bound"):
        save_adapter(fresh(), folder)


@pytest.mark.parametrize("fault", ["good", "renamed", "missing"])
@pytest.mark.parametrize("preset", PRESETS)
def test_bound_equals_stored_or_it_is_an_error(preset: Preset, fault: str, folder: Path) -> None:
    save_adapter(adapted(Adapter(preset=preset, rank=2)), folder)
    tensors = load_file(folder / TENSOR_FILE)
    names = list(tensors)
    if fault == "renamed":
        tensors[names[0].replace("_proj", "_porj")] = tensors.pop(names[0])
    if fault == "missing":
        del tensors[names[-1]]
    save_file(tensors, folder / TENSOR_FILE)
    model = fresh()
    if fault == "good":
        assert 2 * load_adapter(model, folder) == len(tensors)
        return
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    message = str(caught.value)
    assert f"{len(names) - 1} of {len(tensors)} stored tensors fit" in message
    lost = names[0] if fault == "renamed" else names[-1]
    assert f"1 missing: {lost.removeprefix(PREFIX)}" in message
    if fault == "renamed":
        assert "1 unexpected: " in message and "did you mean 'language_model.model." in message
    assert not bound(model) and all(p.requires_grad for p in model.language_model.parameters())


def test_a_whole_linear_that_is_missing_is_missed(folder: Path) -> None:
    save_adapter(adapted(Adapter(rank=2)), folder)
    tensors = {k: v for k, v in load_file(folder / TENSOR_FILE).items() if f"{Q0}." not in k}
    save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(ValueError, match=f"2 missing: {Q0}.lora_A"):
        load_adapter(fresh(), folder)


def test_other_models_and_shapes_are_named(folder: Path) -> None:
    save_adapter(adapted(Adapter(rank=2)), folder)
    with pytest.raises(ValueError, match=r"28 of 56 stored tensors fit; 28 unexpected: .* …"):
        load_adapter(fresh(Experts.DENSE), folder)
    tensors = load_file(folder / TENSOR_FILE)
    tensors[f"{PREFIX}{Q0}.lora_A.weight"] = torch.zeros(2, 63)
    save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(ValueError, match=r"1 misshapen: \S*lora_A.weight \(2, 63\), expected \(2, 64\)"):
        load_adapter(fresh(), folder)
    save_file({}, folder / TENSOR_FILE)
    with pytest.raises(ValueError, match="0 of 0 stored"):
        load_adapter(fresh(), folder)
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(ValueError, match="no adapter folder: it has no adapter_model"):
        load_adapter(fresh(), folder)


def change(folder: Path, **entries: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("init_lora_weights", "pissa"),
        ("invented_next_year", 1),
    ],
)
def test_what_is_not_applied_is_refused(key: str, value: object, folder: Path) -> None:
    save_adapter(adapted(Adapter(rank=2, targets=("q_proj",))), folder)
    change(folder, **{key: value})
    with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
        load_adapter(fresh(), folder)


def test_a_target_list_that_leaves_a_stored_linear_out_is_an_error(folder: Path) -> None:
    save_adapter(adapted(Adapter(rank=2, targets=("q_proj",))), folder)
    change(folder, target_modules=["q_proj_moe_gen"])
    with pytest.raises(ValueError, match="4 of 8 stored.*no target module in adapter_config.json"):
        load_adapter(fresh(), folder)


# PEFT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", VARIANTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_peft_loads_ours(experts: Experts, preset: Preset, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    if (experts, preset) not in MODULES:
        return
    model = adapted(Adapter(preset=preset, rank=3, alpha=7.0), experts)
    save_adapter(model, folder)
    theirs = peft.PeftModel.from_pretrained(fresh(experts), folder)
    assert sum("lora_A" in name for name in theirs.state_dict()) == len(bound(model))
    assert far(hidden(theirs, experts), hidden(model, experts)) < 1e-6 * hidden(model, experts).abs().max()


PEFT_CONFIGS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj_moe_gen", "mlp.down_proj", "fc1"]},
    "pattern": {"target_modules": r".*layers\.\d\.self_attn\.[qk]_proj(_moe_gen)?"},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj"]},
    "every linear": {"target_modules": "all-linear", "exclude_modules": r"vit_model\..*"},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {r"layers.1.mlp.up_proj": 2, "^language_model.*down_proj": 6},
        "alpha_pattern": {"up_proj": 5},
    },
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_we_load_pefts(kind: str, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(**PEFT_CONFIGS[kind]))
    generator = seeded(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    theirs.save_pretrained(folder)
    model = fresh()
    assert 2 * load_adapter(model, folder) == len(load_file(folder / TENSOR_FILE)) > 0
    expected = hidden(theirs)
    assert far(expected, hidden(tiny.model())) > 0.05
    assert far(hidden(model), expected) < 1e-6 * expected.abs().max()
    save_adapter(model, folder.with_name("ours"))  # and back, other ranks and alphas included
    back = peft.PeftModel.from_pretrained(fresh(), folder.with_name("ours"))
    assert far(hidden(back), expected) < 1e-6 * expected.abs().max()


# inference -------------------------------------------------------------------------------------------------


def test_every_verb_runs_with_an_adapter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    save_adapter(adapted(Adapter(rank=4)), tmp_path / "adapter")
    plain = Bagel.load(tmp_path / "model", device="cpu")
    bagel = Bagel.load(tmp_path / "model", device="cpu", lora=tmp_path / "adapter")
    picture = Image.new("RGB", (12, 8), (200, 30, 30))

    def drawn(bagel: Bagel) -> list[bytes | str]:
        a, b = bagel.generate("a red circle"), bagel.edit(picture, "a blue square")
        c, d = (bagel.chat([picture, "a cross"], reply="image")[0], bagel.ask(picture, "how many circles?"))
        assert isinstance(c, Image.Image)
        return [a.tobytes(), b.tobytes(), c.tobytes(), str(d)]

    with_adapter = drawn(bagel)
    assert all(a != b for a, b in zip(with_adapter[:3], drawn(plain)[:3], strict=True))
    assert len(bound(bagel.model)) == merge(bagel.model) == 28
    merged = drawn(bagel)
    assert max(abs(a - b) for a, b in zip(with_adapter[0], merged[0], strict=True)) <= 1  # type: ignore


def test_understanding_alone_takes_an_und_adapter_and_refuses_others(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    for preset in (Preset.UND, Preset.GEN):
        save_adapter(adapted(Adapter(preset=preset, rank=2)), tmp_path / preset)
    options = {"device": "cpu", "understanding_only": True}
    bagel = Bagel.load(tmp_path / "model", lora=tmp_path / "und", **options)
    whole = Bagel.load(tmp_path / "model", lora=str(tmp_path / "und"), device="cpu")
    assert bagel.ask([], "how many circles?") == whole.ask([], "how many circles?")
    with pytest.raises(ValueError, match="0 of 28 stored tensors fit"):
        Bagel.load(tmp_path / "model", lora=tmp_path / "gen", **options)


# sharding -------------------------------------------------------------------------------------------------


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from openbagel.lora import Adapter, bound
from tests import test_lora

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
whole = test_lora.adapted(Adapter(rank=4))
test_lora.loss(whole).backward()
for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
    model = test_lora.in_dtype(test_lora.adapted(Adapter(rank=4)), dtype)
    for block in model.language_model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    test_lora.loss(model).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora." not in name)
    for low, reference in zip(bound(model).values(), bound(whole).values(), strict=True):
        gradient = low.A.grad.full_tensor()
        assert gradient.dtype == torch.float32
        error = (gradient - reference.A.grad).norm() / reference.A.grad.norm()
        assert error < most, (dtype, error)
dist.destroy_process_group()
"""


def test_adapters_learn_on_a_sharded_base(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SHARDED, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*arguments, str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
