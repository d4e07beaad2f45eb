"""Adapters of other trainers, and several at once: every stored tensor finds its place, and deltas add up."""

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openbagel import cli
from openbagel.inference.pipeline import Bagel
from openbagel.lora import (
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
from openbagel.verbs import use
from openbagel.weights import save_checkpoint
from tests import tiny
from tests.test_lora import adapted, change, far, fresh, hidden, seeded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


# files of other trainers ------------------------------------------------------------------------------------


def renamed(tensors: dict[str, Tensor], cut: str, prefix: str, middle: str) -> dict[str, Tensor]:
    """The same tensors as a trainer stores them that wraps another part, or keeps the adapter's name."""
    bare = {name.removeprefix(PREFIX).removeprefix(cut): tensor for name, tensor in tensors.items()}
    return {prefix + name.replace(".weight", f"{middle}.weight"): tensor for name, tensor in bare.items()}


SPELLINGS = {  # what is cut off an official name, what is put before it, what after lora_A
    "PEFT's": ("", PREFIX, ""),
    "no prefix": ("", "", ""),
    "the adapter's name": ("", PREFIX, ".default"),
    "twice wrapped": ("", PREFIX + PREFIX, ".learner"),
    "the language model alone": ("language_model.", PREFIX, ""),
    "the decoder alone": ("language_model.model.", "", ".default"),
    "in a larger module": ("", PREFIX + "bagel.transformer.", ""),
}


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_other_trainers(spelling: str, alone: bool, folder: Path, tmp_path: Path) -> None:
    adapter = Adapter(preset=Preset.GEN, rank=3, alpha=1.5, targets=("q_proj", "down_proj"))
    model = adapted(adapter)
    save_adapter(model, folder)
    tensors = renamed(load_file(folder / TENSOR_FILE), *SPELLINGS[spelling])
    change(folder, target_modules=["q_proj_moe_gen", "down_proj"], exclude_modules=["mlp.down_proj"])
    place = folder
    if alone:
        place = tmp_path / "their.safetensors"
        save_file(tensors, place, {"lora_alpha": "1.5"})
    else:
        save_file(tensors, folder / TENSOR_FILE)
    again = fresh()
    assert load_adapter(again, place) == len(tensors) // 2 == 4
    assert torch.equal(hidden(again), hidden(model))


def test_a_file_alone_says_its_ranks_and_alpha_is_its_rank(folder: Path, tmp_path: Path) -> None:
    model = adapted(Adapter(rank=2, alpha=2, targets=("q_proj",)))
    save_adapter(model, folder)
    (folder / "adapter_config.json").unlink()
    (folder / TENSOR_FILE).rename(folder / "other.safetensors")
    for place in (folder, folder / "other.safetensors"):
        again = fresh()
        with pytest.warns(UserWarning, match="tells no alpha: taken to be its rank"):
            assert load_adapter(again, place) == 4
        assert torch.equal(hidden(again), hidden(model))
        assert {low.rank for low in bound(again).values()} == {2}
    save_file(load_file(place), place, {"alpha": "inf"})
    with pytest.raises(ValueError, match="alpha inf of .* make no sense"):
        load_adapter(fresh(), place)


@pytest.mark.parametrize(
    ("change_names", "words"),
    [
        (
            lambda n: n.replace("language_model.model.", ""),
            "0 of 4 stored tensors fit",
        ),  # the ViT has layers too
        (lambda n: n.replace("q_proj", "to_q"), "0 of 4 stored tensors fit; 4 unexpected.*did you mean"),
        (lambda n: f"lora_unet_{n}".replace(".", "_"), "0 of 4 stored tensors fit"),
    ],
)
def test_names_that_could_mean_anything_are_not_guessed(
    change_names: Callable[[str], str], words: str, folder: Path
) -> None:
    save_adapter(adapted(Adapter(preset=Preset.UND, rank=2, targets=("q_proj",))), folder)
    tensors = load_file(folder / TENSOR_FILE)
    save_file({change_names(name): tensor for name, tensor in tensors.items()}, folder / "x.safetensors")
    model = fresh()
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(model, folder / "x.safetensors")
    assert not bound(model)


def test_two_adapters_in_one_file_are_refused(folder: Path) -> None:
    save_adapter(adapted(Adapter(rank=2, targets=("q_proj",))), folder)
    tensors = load_file(folder / TENSOR_FILE)
    save_file(
        {n.replace(".weight", f".{which}.weight"): t + 0 for which in "ab" for n, t in tensors.items()},
        folder / TENSOR_FILE,
    )
    with pytest.raises(ValueError, match="several tensors for one place"):
        load_adapter(fresh(), folder)


FOREVER = r"(\w+\.?)+!"
"""A pattern whose matching takes twice as long with each letter more."""


@pytest.mark.parametrize(
    ("key", "value"),
    [("target_modules", FOREVER), ("exclude_modules", FOREVER), ("rank_pattern", {FOREVER: 2})],
)
def test_patterns_that_could_take_for_ever_are_not_matched(key: str, value: object, folder: Path) -> None:
    """What is stored tells for which linears and of which ranks it is."""
    model, again = adapted(Adapter(rank=2, targets=("q_proj",))), fresh()
    save_adapter(model, folder)
    change(folder, **{key: value})
    start = time.monotonic()
    assert load_adapter(again, folder) == 4
    assert time.monotonic() - start < 5
    assert torch.equal(hidden(again), hidden(model))


@pytest.mark.parametrize("spelling", [r"^language_model\.model.layers.0.mlp.up_proj", "k_proj|mlp.up_proj"])
def test_patterns_of_alpha_are_names_or_their_ends(spelling: str, folder: Path) -> None:
    save_adapter(adapted(Adapter(preset=Preset.UND, rank=2, alpha=4, targets=("q_proj", "up_proj"))), folder)
    change(folder, alpha_pattern={spelling: 7, "up_proj": 4, "mlp": 9})
    model = fresh()
    load_adapter(model, folder)
    alphas = [low.alpha for name, low in bound(model).items() if "up_proj" in name]
    assert alphas == ([7, 4] if "^" in spelling else [7, 7])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("r", 10**9, "misshapen"),
        ("r", "8", "r: expected int, got '8'"),
        ("r", 0, "rank 0"),
        ("lora_alpha", 1e999, "no finite number"),
        ("lora_alpha", None, "lora_alpha: expected float"),
        ("rank_pattern", {"q_proj": [1]}, "rank_pattern.q_proj: expected int"),
        ("rank_pattern", [1], "rank_pattern"),
        ("target_modules", 7, "target_modules"),
        ("alpha_pattern", {"(": 1}, "alpha_pattern '\\(' is not supported; give names, or their ends"),
        ("alpha_pattern", {"ok": 1, FOREVER: 2}, "alpha_pattern .* is not supported; give names"),
    ],
)
def test_absurd_configurations_are_refused(key: str, value: object, words: str, folder: Path) -> None:
    save_adapter(adapted(Adapter(rank=2, targets=("q_proj",))), folder)
    change(folder, **{key: value})
    model = fresh()
    with pytest.raises(ValueError, match=words):
        load_adapter(model, folder)
    assert not bound(model)


# several ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of other ranks and alphas that share some of their linears."""
    save_adapter(adapted(Adapter(rank=3, alpha=5, targets=("q_proj", "up_proj"))), tmp_path / "a")
    model = fresh()
    bind(model, Adapter(preset=Preset.GEN, rank=2, targets=("q_proj", "o_proj")), generator=seeded(8))
    for low in bound(model).values():
        low.B.data.normal_(0, 0.1, generator=seeded(9))
    save_adapter(model, tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def deltas(model: BagelModel) -> dict[str, Tensor]:
    return {k: (low.alpha / low.rank * low.B @ low.A).detach() for k, low in bound(model).items()}


def test_several_are_the_sum_of_what_each_adds(pair: tuple[Path, Path], folder: Path) -> None:
    alone, both, turned = [fresh(), fresh()], fresh(), fresh()
    for model, path in zip(alone, pair, strict=True):
        load_adapter(model, path)
    weights = (0.7, -1.5)
    counts = [load_adapter(both, path, weight=weight) for path, weight in zip(pair, weights, strict=True)]
    for path, weight in zip(reversed(pair), reversed(weights), strict=True):
        load_adapter(turned, path, weight=weight)
    added, sums = [deltas(model) for model in alone], deltas(both)
    assert counts == [8, 4] and sums.keys() == added[0].keys() | added[1].keys() and len(sums) == 10
    for name, total in sums.items():
        expected = sum(w * d[name] for w, d in zip(weights, added, strict=True) if name in d)
        assert far(total, expected) < 1e-6  # type: ignore[arg-type]
    assert far(hidden(both), hidden(turned)) < 1e-6 * hidden(both).abs().max()
    assert far(hidden(both), hidden(alone[0])) > 0.05 and far(hidden(both), hidden(alone[1])) > 0.05
    save_adapter(both, folder)  # what is saved is the sum: one adapter
    again = fresh()
    assert load_adapter(again, folder) == 10
    assert torch.equal(hidden(again), hidden(both))
    assert all(low.A.requires_grad and low.B.requires_grad for low in bound(both).values())
    expected = hidden(both)
    assert merge(both) == 10 and not bound(both)
    assert far(hidden(both), expected) < 1e-5 * expected.abs().max()
    assert remove(turned) == 10
    assert torch.equal(hidden(turned), hidden(fresh()))


def test_a_bad_second_adapter_leaves_the_first(pair: tuple[Path, Path]) -> None:
    model = fresh()
    load_adapter(model, pair[0])
    before = hidden(model)
    change(pair[1], r=7)
    with pytest.raises(ValueError, match="misshapen"):
        load_adapter(model, pair[1])
    with pytest.raises(ValueError, match="weight nan"):
        load_adapter(model, pair[0], weight=math.nan)
    assert torch.equal(hidden(model), before)


def test_a_bagel_takes_several_with_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny.checkpoint())
    a, b = map(str, pair)

    def loaded(lora: object) -> Tensor:
        return hidden(Bagel.load(tmp_path / "model", device="cpu", lora=lora).model)  # type: ignore[arg-type]

    assert torch.equal(loaded([a, b]), loaded({a: 1, b: 1.0}))
    assert torch.equal(loaded([pair[0]]), loaded(a))
    assert torch.equal(loaded({a: 0.0}), loaded(None))
    asked = vars(cli.parser_for("ask").parse_strictly(["--lora", a, "what?", "--lora", f"{b}=0.5"]))
    bagel = use.Ask(**asked | {"model": str(tmp_path / "model"), "device": "cpu"}).load()
    assert torch.equal(hidden(bagel.model), loaded({a: 1, b: 0.5}))
    out = str(tmp_path / "merged")
    given = ["convert", str(tmp_path / "model"), out, "--to", "float32", "--lora", a, "--lora", f"{b}=0.5"]
    assert cli.main(given) == 0
    assert far(hidden(Bagel.load(out, device="cpu").model), loaded({a: 1, b: 0.5})) < 1e-4
