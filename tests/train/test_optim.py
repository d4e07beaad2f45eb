"""Schedules, AdamW on rows, 8-bit states, the average of the weights."""

import copy
from pathlib import Path

import pytest
import torch

from openbagel.train.checkpoint import Checkpoints, training_tensors
from openbagel.train.optim import EMA, AdamW, Optimizer, Schedule, Shape
from openbagel.train.parallel import Ranks
from tests.train.processes import run_ranks
from tests.train.test_checkpoint import load
from tests.train.toy import Run, whole


def test_schedules():
    constant = Schedule(lr=2.0, warmup=4)
    assert [constant.at(step) for step in (0, 1, 3, 4, 10**6)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = Schedule(kind=Shape.COSINE, lr=1.0, min_lr=0.2, warmup=10, total=110)
    assert cosine.at(10) == 1.0 and cosine.at(60) == pytest.approx(0.6)
    assert cosine.at(110) == cosine.at(1000) == pytest.approx(0.2)
    decay = Schedule(kind=Shape.DECAY, lr=1.0, warmup=0, total=100, decay_steps=20)
    assert decay.at(0) == decay.at(80) == 1.0 and decay.at(90) == pytest.approx(0.5) and decay.at(100) == 0.0
    assert Schedule(warmup=0, kind=Shape.COSINE, total=0).at(0) == 1e-4


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Tanh(), torch.nn.Linear(64, 96))
    model[2].bias.requires_grad_(False)
    return model


def backward(model: torch.nn.Module, seed: int) -> None:
    x = torch.randn(32, 96, generator=torch.Generator().manual_seed(seed))
    (model(x) - x).square().mean().backward()


def test_adamw_is_the_one_of_torch():
    ours, theirs = layers(), layers()
    optimizer = Optimizer(ours, AdamW(weight_decay=0.1))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1, fused=True)
    for step in range(3):
        backward(ours, step)
        backward(theirs, step)
        optimizer.step(1e-3)
        optimizer.clear()
        adamw.step()
        adamw.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert optimizer.updates == 3 and all(p.grad is None for p in ours.parameters())
    with pytest.raises(ValueError, match="every parameter is frozen"):
        Optimizer(layers().requires_grad_(False), AdamW())


def test_8bit_states_follow_the_full_ones_and_resume(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    models = [layers() for _ in range(3)]
    settings = [AdamW(), AdamW(eight_bit=True), AdamW(eight_bit=True)]
    full, small, resumed = (Optimizer(model, s) for model, s in zip(models, settings, strict=True))
    start = copy.deepcopy(models[0])

    def advance(index: int, optimizer: Optimizer, seed: int) -> None:
        backward(models[index], seed)
        optimizer.step(1e-3)
        optimizer.clear()

    for seed in range(4):
        advance(0, full, seed)
        advance(1, small, seed)
    moved, apart = (
        (models[0][0].weight - other[0].weight).norm().item()
        for other in (start, models[1])  # pyright: ignore
    )
    assert 0 < apart < 0.3 * moved
    assert sum(value.nbytes for value in small.state_dict().values()) < 0.3 * sum(
        value.nbytes for value in full.state_dict().values()
    )
    checkpoints = Checkpoints(tmp_path, Ranks("cpu"))
    checkpoints.save(4, training_tensors(models[1], None, small), {})
    checkpoints.close()
    load(checkpoints, training_tensors(models[2], None, resumed))
    advance(1, small, 9)
    advance(2, resumed, 9)
    assert all(torch.equal(a, b) for a, b in zip(models[1].parameters(), models[2].parameters(), strict=True))


def sharded_8bit(ranks: Ranks, folder: Path) -> str:
    pytest.importorskip("bitsandbytes")
    run, again = (Run(ranks, eight_bit=True) for _ in range(2))
    run.advance(1)
    checkpoints = Checkpoints(folder, ranks)
    checkpoints.save(1, training_tensors(run.model, run.ema, run.optimizer), {})
    checkpoints.close()
    load(checkpoints, training_tensors(again.model, again.ema, again.optimizer))
    again.step = 1
    assert run.advance(1) == again.advance(1)
    # the average: each rank its own rows, and the model's own weights back in place
    own, average = whole(run.model.state_dict()), whole(run.ema.average)
    with run.ema.applied(run.model):
        inside = whole(run.model.state_dict())
    assert all(torch.equal(inside[name], value) for name, value in average.items())
    assert all(torch.equal(own[name], value) for name, value in whole(run.model.state_dict()).items())
    return "fine"


def test_8bit_states_and_averages_of_two_ranks(tmp_path: Path):
    assert run_ranks(2, sharded_8bit, tmp_path) == ["fine", "fine"]
    other = Run(Ranks("cpu"), eight_bit=True)
    with pytest.raises(ValueError, match="8-bit states fit so many ranks"):
        load(Checkpoints(tmp_path, Ranks("cpu")), training_tensors(other.model, other.ema, other.optimizer))


def test_average_follows_its_formula():
    model = torch.nn.Linear(2, 2)
    plain, warming = EMA(model, 0.9), EMA(model, 0.9, warmup=True)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    plain.update(model, 1)
    warming.update(model, 1)
    assert torch.allclose(plain.average["weight"], start + 0.1)
    assert torch.allclose(warming.average["weight"], start + 9 / 11)
