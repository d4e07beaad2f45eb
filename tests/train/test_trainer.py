"""The first training loop: it learns, resumes exactly, and never shows a held-out pair."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openbagel.config import nano
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Packer, Text, VaeImage, VitImage
from openbagel.train.autoencoder import AutoencoderTrainer
from openbagel.train.optim import EMA, learning_rate
from openbagel.train.stages import read_recipe, train
from openbagel.train.trainer import Trainer, TrainRecipe
from openbagel.world.samples import LatentCache, Mixture, Teacher, world_codec
from openbagel.world.scene import nano_world

RECIPE = Path(__file__).parents[2] / "recipes" / "nano.yaml"
KINDS = {"draw_two": 1.0, "ask_colour": 1.0, "edit_recolour": 1.0}
CODEC = world_codec(nano_world())


def small_config():
    config = nano(512)
    llm = replace(
        config.llm, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    assert config.vit and config.vae
    vit = replace(config.vit, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return replace(config, llm=llm, vit=vit, vae=replace(config.vae, ch=8))


def trainer(folder: Path, recipe: TrainRecipe, copies: int = 1) -> Trainer:
    config = small_config()
    torch.manual_seed(0)
    assert config.vae
    autoencoder = AutoEncoder(config.vae)
    with torch.no_grad():
        autoencoder.encoder.conv_out.bias[config.vae.z_channels :] = -10  # pyright: ignore
    latents = LatentCache(autoencoder, folder / "latents", 50)
    mixture = Mixture(kinds=KINDS, think=0.2, copies=copies, examples_per_kind=50)
    teacher = Teacher(config, CODEC, world=nano_world(), mixture=mixture, latents=latents)
    model = BagelModel(config)
    model.initialise(torch.Generator().manual_seed(1))
    return Trainer(model, Packer(config, CODEC), teacher, recipe)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path):
    whole, first, second = (replace(TrainRecipe(steps=4), samples=4, steps=steps) for steps in (4, 2, 4))
    straight = trainer(tmp_path, whole)
    straight.run(tmp_path / "straight", lambda _: None)
    trainer(tmp_path, first).run(tmp_path / "cut", lambda _: None)
    resumed = trainer(tmp_path, second)
    resumed.run(tmp_path / "cut", lambda _: None)
    assert resumed.step == straight.step == 4
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in straight.ema.average.items():
        assert torch.equal(value, resumed.ema.average[name]), name


def test_both_losses_fall(tmp_path: Path):
    rows: list[dict] = []
    run = trainer(tmp_path, TrainRecipe(steps=60, samples=12, warmup=5, lr=3e-3, log_every=20))
    run.run(tmp_path, lambda line: rows.append(json.loads(line)))
    assert rows[-1]["ce"] < 0.7 * rows[0]["ce"]
    assert rows[-1]["mse"] < 0.9 * rows[0]["mse"]


def test_time_budget_stops_the_run(tmp_path: Path):
    run = trainer(tmp_path, TrainRecipe(steps=1000, samples=2, max_minutes=0.0))
    run.run(tmp_path, lambda _: None)
    assert run.step == 0 and (tmp_path / "state.pt").is_file()


def test_samples_have_the_official_layout(tmp_path: Path):
    run = trainer(tmp_path, TrainRecipe(steps=1))
    seen = set()
    for pack in range(8):
        for segments in run.teacher.samples(pack, 8):
            seen.add(tuple(type(segment) for segment in segments))
            losses = [s.loss for s in segments if isinstance(s, Text)]
            drawn = [s for s in segments if isinstance(s, VaeImage) and s.hidden]
            assert len(drawn) == 1 or losses[-1], "every sample has something to learn"
    assert (Text, VaeImage) in seen
    assert (VitImage, Text, Text) in seen
    assert (VaeImage, VitImage, Text, VaeImage) in seen


def test_packs_are_a_function_of_their_number(tmp_path: Path):
    a, b = (trainer(tmp_path / name, TrainRecipe(steps=1)) for name in "ab")
    first, again = (run.packer.pack(run.teacher.samples(7, 6)) for run in (a, b))
    assert torch.equal(first.text_ids, again.text_ids)
    assert torch.equal(first.targets, again.targets)


def test_latents_are_encoded_once(tmp_path: Path):
    run = trainer(tmp_path, TrainRecipe(steps=1))
    run.teacher.samples(0, 8)
    cached = LatentCache(run.teacher.latents.autoencoder, tmp_path / "latents", 50)
    calls = []
    cached.autoencoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    Teacher(run.model.config, CODEC, world=nano_world(), mixture=run.teacher.mixture, latents=cached).samples(
        0, 8
    )
    assert not calls


def test_learning_rate_warms_up_holds_and_falls():
    rates = [learning_rate(s, peak=1.0, warmup=10, total=100, decay=20) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[79] == 1.0
    assert rates[90] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[80:-1], rates[81:], strict=True))


def test_ema_follows_its_formula():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model, 1000)
    assert torch.allclose(ema.average["weight"], start + 0.1)


def test_autoencoder_training_resumes(tmp_path: Path):
    vae = small_config().vae
    assert vae
    whole, cut = (TrainRecipe(steps=steps, samples=1) for steps in (4, 2))
    straight, first, second = (
        AutoencoderTrainer(vae, nano_world(), recipe) for recipe in (whole, cut, whole)
    )
    straight.run(tmp_path / "a", lambda _: None)
    first.run(tmp_path / "b", lambda _: None)
    second.run(tmp_path / "b", lambda _: None)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    scale, shift = second.latent_statistics()
    assert scale > 0 and abs(shift) < 1


def test_copies_share_their_context_and_spread_their_times(tmp_path: Path):
    run = trainer(tmp_path, TrainRecipe(steps=1), copies=4)
    drawn = [s for s in run.teacher.samples(0, 8) if isinstance(s[-1], VaeImage)]
    for segments in drawn:
        copies = [s for s in segments if isinstance(s, VaeImage) and s.hidden]
        assert len(copies) == 4 and [c.t for c in copies] == sorted({c.t for c in copies})
    assert drawn


def test_recipe_of_nano_reads_and_refuses_typos():
    recipe = read_recipe(RECIPE, ["model.steps=7", "folder=elsewhere"])
    assert recipe.model.steps == 7 and recipe.folder == "elsewhere"
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        read_recipe(RECIPE, ["model.step=7"])
    with pytest.raises(ValueError, match="key=value"):
        read_recipe(RECIPE, ["model.steps"])
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        read_recipe("nowhere.yaml", [])


def test_training_goes_on_from_bare_weights(tmp_path: Path):
    overrides = ["model.steps=1", "model.samples=2", "mixture.examples_per_kind=10", "mixture.think=0.0"]
    nano_folder = Path(__file__).parents[2] / "openbagel" / "assets" / "nano"
    recipe = read_recipe(RECIPE, [*overrides, f"start={nano_folder}", f"folder={tmp_path}"])
    checkpoint = train(recipe, lambda _: None)
    assert {path.name for path in checkpoint.iterdir()} >= {
        "ema.safetensors",
        "ae.safetensors",
        "config.json",
    }
