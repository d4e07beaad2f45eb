"""Sharded training against one process: losses, gradients, precision, recomputation, the meta device."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openbagel.config import bagel_7b
from openbagel.model.bagel import BagelModel
from openbagel.train.parallel import (
    Parallel,
    Precision,
    Ranks,
    bfloat16_products,
    materialise,
    memory_estimate,
    shard,
    stored_weights,
)
from openbagel.weights import TensorFiles
from tests import tiny
from tests.train.processes import run_ranks
from tests.train.toy import Run, packs, whole

STEPS = 2


def losses(ranks: Ranks, options: dict[str, Any]) -> list[float]:
    return Run(ranks, Parallel(**options)).advance(STEPS)


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return losses(Ranks("cpu"), {})


@pytest.mark.parametrize(
    ("number", "options"),
    [(2, {"recompute": 0.5}), (4, {"num_replicate": 2, "num_shard": 2, "recompute": 1.0})],
)
def test_ranks_give_the_losses_of_one_process(number: int, options: dict[str, Any], plain: list[float]):
    """Also where packs lack pictures, so that some parts have work on one rank alone."""
    for found in run_ranks(number, losses, options):
        assert found == pytest.approx(plain, rel=1e-6)


def start_from_file(ranks: Ranks, path: Path) -> tuple[bool, list[float], list[Any]]:
    with torch.device("meta"):
        model = BagelModel(tiny.config())
    shard(model, Parallel(), ranks)
    read, asked = stored_weights(TensorFiles([path]), tiny.config()), []
    materialise(model, lambda name: asked.append(name) or read(name), ranks.device)
    same = all(torch.equal(value, read(name)) for name, value in whole(model.state_dict()).items())
    counts = torch.tensor([1.0, ranks.rank])
    agreed = [ranks.all_sum(counts).tolist(), ranks.any(ranks.rank == 2), ranks.gather_objects(ranks.rank)]
    ranks.barrier()
    return same and set(asked) == set(tiny.model().state_dict()), agreed, Run(ranks).advance(STEPS)


def test_each_rank_reads_its_rows_of_a_file(tmp_path: Path, plain: list[float]):
    """Four ranks from the meta device, a position table left out; and the losses of four ranks."""
    state = {
        name: value for name, value in tiny.model().state_dict().items() if name != "vit_pos_embed.pos_embed"
    }
    save_file(state, tmp_path / "model.safetensors")
    for same, agreed, found in run_ranks(4, start_from_file, tmp_path / "model.safetensors"):
        assert same
        assert agreed == [[4.0, 6.0], True, [0, 1, 2, 3]]
        assert found == pytest.approx(plain, rel=1e-6)


def gradients(model: BagelModel, pack: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    ce, mse = model.losses(pack)
    loss = ce.sum() + mse.sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), found


def test_every_parameter_has_a_gradient_whatever_the_pack_holds():
    plain = copy.deepcopy(tiny.model()).train()
    complete = shard(copy.deepcopy(plain), Parallel(), Ranks("cpu"))
    for pack in packs(0):
        (loss, expected), (found_loss, found) = gradients(plain, pack), gradients(complete, pack)
        assert torch.equal(loss, found_loss)
        for name, parameter in complete.named_parameters():
            if parameter.requires_grad:
                grad, wanted = found[name], expected[name]
                assert grad is not None, name
                assert torch.equal(grad, torch.zeros_like(grad) if wanted is None else wanted), name


def test_recomputation_changes_no_bit():
    pack = packs(3)[0]
    plain, again = (
        shard(copy.deepcopy(tiny.model()).train(), Parallel(recompute=share), Ranks("cpu"))
        for share in (0.0, 1.0)
    )
    (loss, expected), (found_loss, found) = gradients(plain, pack), gradients(again, pack)
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items() if grad is not None)
    kept = [saved_bytes(model, pack) for model in (plain, again)]
    assert kept[1] < 0.6 * kept[0]


def saved_bytes(model: BagelModel, pack: Any) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []  # the graph keeps what it saved; without it, memory would be used twice
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept.append(model.losses(pack))
    return sum(seen.values())


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def check_low(model: BagelModel, limit: float) -> None:
    plain, pack = shard(copy.deepcopy(tiny.model()).train(), Parallel(), Ranks("cpu")), packs(5)[0]
    (loss, expected), (found_loss, found) = gradients(plain, pack), gradients(model, pack)
    assert 0 < relative(found_loss, loss) < limit
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, grad in expected.items():
        own = found[name]
        if grad is not None and grad.norm() > 1e-3:
            assert own is not None and own.dtype == torch.float32
            own = own.full_tensor() if hasattr(own, "full_tensor") else own  # pyright: ignore
            assert relative(own, grad) < 20 * limit, name


def test_linear_layers_multiply_in_bfloat16_and_stop():
    model = shard(copy.deepcopy(tiny.model()).train(), Parallel(precision=Precision.PRODUCTS), Ranks("cpu"))
    check_low(model, 1e-2)
    bfloat16_products(model, on=False)
    pack = packs(5)[0]
    with torch.no_grad():
        assert torch.equal(model.losses(pack)[0], tiny.model().losses(pack)[0])


def whole_model_in_bfloat16(ranks: Ranks) -> None:
    model = shard(copy.deepcopy(tiny.model()).train(), Parallel(precision=Precision.BFLOAT16), ranks)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_low(model, 3e-2)


def test_one_process_computes_in_bfloat16_with_float32_masters():
    run_ranks(1, whole_model_in_bfloat16)


def test_memory_of_the_7b_and_of_a_measured_pack():
    with torch.device("meta"):
        model = BagelModel(bagel_7b())
    estimate = memory_estimate(model, Parallel(num_shard=8), ranks=8, tokens=0)
    static = sum(estimate[kind] for kind in ("weights", "gradients", "optimizer", "ema"))
    assert static == pytest.approx(36.5e9, rel=0.01)  # reference/training.md: 292 GB over 8 ranks
    rng, counts = random.Random(1), {"ranks": 1}
    pack = tiny.packer().pack([tiny.segments(rng, 4, ("text", "noised", "clean")) for _ in range(40)])
    counts |= {"tokens": len(pack), "labels": len(pack.labels)}
    whole_graph = memory_estimate(tiny.model(), Parallel(), **counts)
    measured = saved_bytes(shard(copy.deepcopy(tiny.model()).train(), Parallel(), Ranks("cpu")), pack)
    assert whole_graph["activations"] + whole_graph["logits"] == pytest.approx(measured, rel=0.15)
    again = memory_estimate(tiny.model(), Parallel(recompute=0.5), **counts)
    assert again["activations"] > 0.5 * whole_graph["activations"]


def test_numbers_that_do_not_fit_the_ranks():
    with pytest.raises(ValueError, match="start 16 processes"):
        Parallel(num_shard=8, num_replicate=2).shards(8)
    assert Parallel(num_replicate=2).shards(8) == 4
