"""Previews of a live model: what they write, what they leave alone, what they refuse."""

import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openbagel.config import from_json
from openbagel.inference.pipeline import Bagel
from openbagel.model.bagel import BagelModel
from openbagel.sequence import Text, VaeImage
from openbagel.train.previews import Preview, Previews
from openbagel.weights import Checkpoint
from tests import tiny


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "shown.png"
    Image.effect_noise((12, 8), 60).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def preview(picture: str) -> Preview:
    questions = ((picture, "how many circles?"), ("", "what is red?"))
    return Preview(every=3, prompts=("A red circle, above: blue!", "?"), questions=questions, seed=5)


@pytest.fixture
def live() -> Checkpoint:
    """A checkpoint of its own, which a test may train."""
    with torch.inference_mode(False):
        model = tiny.randomised(BagelModel(tiny.config()))
    return replace(tiny.checkpoint(), model=model)


def losses(checkpoint: Checkpoint) -> torch.Tensor:
    latents = torch.randn(6, checkpoint.config.latent_channels, generator=torch.Generator().manual_seed(0))
    sample = [Text((5, 6, 7), loss=True), VaeImage.noised(latents, (2, 3), 0.7, latents)]
    ce, mse = checkpoint.model.losses(tiny.packer().pack([sample]))
    return ce.sum() + mse.sum()


def test_previews_are_written(tmp_path: Path, live: Checkpoint, preview: Preview, picture: str):
    previews = Previews(live, preview, folder=tmp_path / "run")
    assert [step for step in range(8) if previews.due(step)] == [0, 3, 6]
    folder = previews.draw(200)
    assert folder is not None and folder == tmp_path / "run" / "previews" / "step-0000200"
    assert sorted(path.name for path in folder.iterdir()) == [
        "1-a-red-circle-above-blue.png",
        "2-.png",
        "answers.txt",
    ]
    bagel = Bagel(live)
    with Image.open(folder / "2-.png") as drawn:
        assert drawn.info["seed"] == "6"
        assert np.array_equal(np.asarray(drawn), np.asarray(bagel.generate("?", seed=6)))
    answer, other = bagel.ask(picture, "how many circles?", seed=5), bagel.ask([], "what is red?", seed=5)
    assert (folder / "answers.txt").read_text() == (
        f"{picture}\nQ: how many circles?\nA: {answer}\n\nQ: what is red?\nA: {other}\n"
    )


def test_training_is_untouched(tmp_path: Path, live: Checkpoint, preview: Preview):
    """In the middle of an accumulation: gradients, weights, mode and every global generator stay."""
    previews = Previews(live, preview, folder=tmp_path)
    live.model.train()
    losses(live).backward()
    gradients = {n: p.grad.clone() for n, p in live.model.named_parameters() if p.grad is not None}
    weights = {n: p.detach().clone() for n, p in live.model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    previews.draw(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert live.model.training and all(module.training for module in live.model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    parameters = dict(live.model.named_parameters())
    assert all(torch.equal(parameters[n], w) and not parameters[n].is_inference() for n, w in weights.items())
    assert len(gradients) > 20 and {n for n, p in parameters.items() if p.grad is not None} == set(gradients)
    for name, gradient in gradients.items():
        assert torch.equal(parameters[name].grad, gradient), name  # pyright: ignore[reportArgumentType]
    losses(live).backward()  # and training goes on


def test_previews_follow_the_weights(tmp_path: Path, live: Checkpoint):
    previews = Previews(live, Preview(every=1, prompts=("a",)), folder=tmp_path)
    first = previews.draw(1)
    with torch.no_grad():
        live.model.llm2vae.weight.mul_(3)
    second = previews.draw(2)
    assert first and second
    assert (first / "1-a.png").read_bytes() != (second / "1-a.png").read_bytes()


def test_other_ranks_run_the_same_forwards_and_write_nothing(
    tmp_path: Path, live: Checkpoint, preview: Preview, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    live.model.register_forward_hook(lambda *_: calls.append(1))
    assert Previews(live, preview, folder=tmp_path / "run").draw(1)
    count = len(calls)
    monkeypatch.chdir(tmp_path)
    assert Previews(live, preview, folder=None).draw(1) is None
    assert len(calls) == 2 * count > 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "shown.png"}


def test_a_picture_may_go_while_the_run_lasts(
    tmp_path: Path, live: Checkpoint, preview: Preview, picture: str
):
    previews = Previews(live, replace(preview, prompts=()), folder=tmp_path)
    Path(picture).unlink()
    assert previews.draw(3)


def test_a_place_that_cannot_be_written_costs_previews_alone(
    tmp_path: Path, live: Checkpoint, preview: Preview
):
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as told:
        Previews(live, preview, folder=tmp_path / "file").draw(1)
    assert [str(warning.message) for warning in told] == ["previews are not written: Not a directory"]


def test_what_cannot_be_shown_is_refused_at_the_start(tmp_path: Path, live: Checkpoint):
    missing = Preview(every=1, questions=(("nowhere.png", "what?"),))
    with pytest.raises((ValueError, OSError), match=r"nowhere\.png"):
        Previews(live, missing, folder=tmp_path)
    with pytest.raises(ValueError, match="no autoencoder"):
        Previews(replace(live, autoencoder=None), Preview(every=1, prompts=("a",)), folder=tmp_path)
    blind = replace(live, config=replace(live.config, vit=None))
    with pytest.raises(ValueError, match="no ViT"):
        Previews(blind, missing, folder=tmp_path)
    with pytest.raises(ValueError, match="needs prompts or questions"):
        Preview(every=5)


def test_a_recipe_may_hold_it():
    tree = {"every": 200, "prompts": ["a red circle"], "questions": [["a.png", "what?"]]}
    preview = from_json(Preview, tree, "recipe.preview")
    assert preview.questions == (("a.png", "what?"),) and not Preview().every
