"""The recipes that come with the project: all are read, and nano's stages run one after another."""

import subprocess
from pathlib import Path

import pytest
import torch

from openbagel.train.recipe import read_recipe
from openbagel.train.stages import train
from openbagel.weights import load_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ("encoders", "language", "alignment", "pretraining", "continued", "finetuning")
SHORT = ["train.steps=2", "data.world.examples_per_kind=20", "guard.check_first_losses=false"]
ENCODERS = ["autoencoder.train.steps=2", "autoencoder.decoder_steps=1", "vision.train.steps=2"]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read(path: Path):
    assert read_recipe(path).folder.startswith("runs/")


def test_the_script_names_every_stage_in_order():
    script = (RECIPES / "nano.sh").read_text("utf-8")
    assert " ".join(STAGES) in script
    assert {path.stem.removeprefix("nano_") for path in RECIPES.glob("nano_*.yaml")} == set(STAGES)
    assert subprocess.run(["sh", "-n", str(RECIPES / "nano.sh")]).returncode == 0


@pytest.mark.slow
def test_nano_is_made_from_nothing_stage_by_stage(tmp_path: Path):
    """Two steps of each, of every kind's data; then the result draws, answers and decides by itself."""
    for before, stage in zip(("", *STAGES), STAGES, strict=False):
        changes = [f"folder={tmp_path / stage}", f"data.latent_cache={tmp_path / 'latents'}", *SHORT]
        changes += [f"start.checkpoint={tmp_path / before / 'checkpoint'}"] if before else ENCODERS
        train(read_recipe(RECIPES / f"nano_{stage}.yaml", changes), lambda line: None)
    made = load_checkpoint(tmp_path / "finetuning" / "checkpoint", dtype=torch.float32)
    assert made.config.settings.draws_by_itself and made.config.settings.world == "full"
    old = load_checkpoint(tmp_path / "encoders" / "checkpoint", dtype=torch.float32).model.state_dict()
    new = made.model.state_dict()
    changed = {name for name, value in old.items() if not torch.equal(value, new[name])}
    assert any("moe_gen" in name for name in changed)
    assert any(name.startswith("connector") for name in changed)
