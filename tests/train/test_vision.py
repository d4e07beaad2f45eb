"""The ViT's own training: what it is taught about a picture, that it learns, and where a run puts it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openbagel.config import nano
from openbagel.inference.pipeline import Bagel
from openbagel.model.bagel import BagelModel
from openbagel.train.checkpoint import Stored
from openbagel.train.encoders import VisionTrainer, VisionTraining
from openbagel.train.optim import Schedule
from openbagel.train.parallel import Ranks
from openbagel.train.recipe import recipe_from
from openbagel.train.stages import train
from openbagel.train.trainer import Place, Training
from openbagel.weights import load_checkpoint
from openbagel.world.scene import Colour, Ground, Scene, Shape, Size, Thing, nano_world

NANO = Bagel.load("nano")


def trainer(folder: Path, steps: int = 40) -> VisionTrainer:
    config = nano(300)
    assert config.vit
    model = BagelModel(replace(config, llm=replace(config.llm, num_hidden_layers=1, hidden_size=64)))
    model.initialise(torch.Generator().manual_seed(0))
    training = Training(steps=steps, schedule=Schedule(lr=2e-3, warmup=0), ema=0.9)
    place = Place(folder=folder, checkpoints=folder / "checkpoints", ranks=Ranks("cpu"))
    return VisionTrainer(model, nano_world(), VisionTraining(train=training, samples=16), place)


def test_what_is_taught_about_a_picture(tmp_path: Path):
    teacher = trainer(tmp_path)
    things = (
        Thing(Shape.CROSS, Colour.BLUE, Size.LARGE, 0.25, 0.5),
        Thing(Shape.CIRCLE, Colour.RED, Size.SMALL, 0.8125, 0.9375),
    )
    found, places = teacher._truth([Scene(Ground.WHITE, ()), Scene(Ground.GREY, things)])
    world = nano_world()
    cross = [world.shapes.index(Shape.CROSS), world.colours.index(Colour.BLUE), 1]
    circle = [world.shapes.index(Shape.CIRCLE), world.colours.index(Colour.RED), 0]
    assert found == [[16 + 2 * 4 + 1, *cross], [16 + 3 * 4 + 3, *circle]]
    assert places == [[0.25, 0.5], [0.8125, 0.9375]]


def test_it_learns_and_the_same_steps_give_the_same_weights(tmp_path: Path):
    whole, cut = trainer(tmp_path / "whole"), trainer(tmp_path / "cut", steps=25)
    start = {name: value.clone() for name, value in whole.model.vit.state_dict().items()}
    first = whole.sums(whole.pictures(-1))
    whole.run()
    cut.run()
    later = trainer(tmp_path / "cut")
    later.run()
    last = whole.sums(whole.pictures(-1))
    assert all(last[name] < 0.9 * first[name] for name in ("found", "placed", "ground"))
    for name, value in later.model.vit.state_dict().items():
        assert torch.equal(value, whole.model.vit.state_dict()[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in later.model.vit.state_dict().items())


def small(folder: Path, **start: object) -> dict[str, object]:
    training = {"steps": 3, "schedule": {"lr": 1e-3, "warmup": 0}, "ema": 0.9}
    return {
        "folder": str(folder),
        "start": start,
        "autoencoder": {"train": training, "samples": 2},
        "vision": {"train": training, "samples": 2},
        "data": {"world": {"kinds": {"draw_one": 1}}, "packing": {"max_num_tokens": 128}},
        "train": {**training, "steps": 0, "marker_loss": True},
        "guard": {"check_first_losses": False},
    }


def test_a_run_from_nothing_keeps_the_vit_that_it_trained(tmp_path: Path):
    tree = small(tmp_path / "run", settings={"llm": {"num_hidden_layers": 1}})
    made = load_checkpoint(train(recipe_from(tree), lambda line: None))
    assert made.config.settings.world == "nano" and made.config.settings.draws_by_itself
    assert made.config.llm.num_hidden_layers == 1
    stored = Stored(next((tmp_path / "run" / "vision" / "checkpoints").glob("step-*")))
    for name, value in made.model.vit_model.state_dict().items():
        assert torch.equal(value, stored[f"ema/vit.{name}"].bfloat16()), name


def test_a_transformer_of_random_weights_beside_the_encoders_of_nano(tmp_path: Path):
    tree = small(tmp_path, facts="nano", settings={"llm": {"num_hidden_layers": 1, "intermediate_size": 64}})
    del tree["autoencoder"], tree["vision"]
    made = load_checkpoint(train(recipe_from(tree), lambda line: None), dtype=torch.float32)
    for name, value in made.model.vit_model.state_dict().items():
        assert torch.equal(value, NANO.model.vit_model.state_dict()[name]), name
    assert made.codec.encode("a red circle") == NANO.codec.encode("a red circle")
    assert len(made.model.language_model.model.layers) == 1


def test_an_unknown_number_names_the_nearest(tmp_path: Path):
    tree = small(tmp_path, facts="nano", settings={"llm": {"hiden_size": 64}})
    with pytest.raises(ValueError, match="hidden_size"):
        train(recipe_from(tree), lambda line: None)
