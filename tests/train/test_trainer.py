"""The training loop: it learns, resumes bit for bit, and takes the same steps on any number of ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.resume import descendants
from openbagel.config import nano
from openbagel.data.samples import BadRow, Part, Sample, SampleId, decode, extent
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Packer, Text, VaeImage, VitImage
from openbagel.train.encoders import AutoencoderTrainer, AutoencoderTraining
from openbagel.train.latents import LatentCache, LatentEncoder
from openbagel.train.parallel import Ranks
from openbagel.train.recipe import Data, Recipe, read_recipe, recipe_from
from openbagel.train.stages import datasets, train
from openbagel.train.trainer import Place, Training
from openbagel.weights import Checkpoint, save_checkpoint
from openbagel.world.dataset import write_example
from openbagel.world.samples import Mixture, WorldDataset, world_codec
from openbagel.world.scene import nano_world

RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {"draw_two": 1.0, "ask_colour": 1.0, "edit_recolour": 1.0}
CODEC = world_codec(nano_world())


def small() -> Checkpoint:
    """A nano of two thin layers."""
    config = nano(512)
    llm = replace(
        config.llm, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    assert config.vit and config.vae
    vit = replace(config.vit, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = replace(config, llm=llm, vit=vit, vae=replace(config.vae, ch=8))
    model = BagelModel(config)
    model.initialise(torch.Generator().manual_seed(1))
    assert config.vae
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoEncoder(config.vae)
        assert autoencoder.encoder.conv_out.bias is not None
        autoencoder.encoder.conv_out.bias.data[config.vae.z_channels :] = -10  # almost no posterior noise
    return Checkpoint(config, model, autoencoder, CODEC)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(folder, small())
    return folder


def recipe(start: Path, folder: Path, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "folder": str(folder),
        "start": {"checkpoint": str(start)},
        "data": {
            "world": {"kinds": dict(KINDS), "think": 0.0, "copies": 2, "examples_per_kind": 40},
            "packing": {"max_num_tokens": 256},
        },
        "train": {
            "steps": 6,
            "schedule": {"kind": "constant", "lr": 1e-3, "warmup": 2},
            "save_every": 2,
            "ema": 0.9,
            "execution": "dense",
        },
        "track": {"log_every": 1},
        "guard": {"check_first_losses": False},
    }
    for place, value in changes.items():
        *branches, leaf = place.split("__")
        branch = tree
        for key in branches:
            branch = branch.setdefault(key, {})
        branch[leaf] = value
    return recipe_from(tree)


def quiet(line: str) -> None:
    assert line


def last(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"))
    return {name: t for path in newest.glob("*.safetensors") for name, t in load_file(path).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same_run(a: Path, b: Path) -> None:
    ours, theirs = last(a), last(b)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    for name in ("ce", "mse", "grad_norm", "lr", "tokens"):
        assert [row.get(name) for row in rows(a)] == [row.get(name) for row in rows(b)], name


@pytest.mark.parametrize(("workers", "accumulation", "cache"), [(0, 1, "latents"), (2, 4, None)])
def test_a_resumed_run_equals_the_uninterrupted_one(
    start: Path, tmp_path: Path, workers: int, accumulation: int, cache: str | None
):
    """Also where the other one finds the latents that the first has written."""
    options = {"train__accumulation": accumulation, "data__latent_cache": cache and str(tmp_path / cache)}
    train(recipe(start, tmp_path / "whole", **options), quiet)
    for steps in (3, 6):
        changed = recipe(start, tmp_path / "cut", train__steps=steps, data__workers=workers, **options)
        train(changed, quiet)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_layers_are_recomputed_only_when_memory_asks(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept: dict[str, float] = {}
    for name, room in {"roomy": 1 << 40, "tight": 0}.items():
        monkeypatch.setattr(Ranks, "memory", lambda self, room=room: room)
        said: list[str] = []
        train(
            recipe(start, tmp_path / name, data__packing__max_num_tokens=16384, train__steps=0), said.append
        )
        line = next(line for line in said if "activations" in line)
        kept[name] = float(line.split("activations ")[1].split(",")[0].rstrip(")"))
        train(recipe(start, tmp_path / f"{name} run"), quiet)
    assert kept["tight"] < kept["roomy"]
    same_run(tmp_path / "roomy run", tmp_path / "tight run")


def test_the_count_of_skipped_samples_survives(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = WorldDataset.parts

    def damaged(self: WorldDataset, row: int, rng: random.Random) -> list[Part]:
        if row % 8 == 3:
            raise BadRow("as the test wants it")
        return parts(self, row, rng)

    monkeypatch.setattr(WorldDataset, "parts", damaged)
    counts = {}
    for name, stops in {"whole": (6,), "cut": (3, 6)}.items():
        for steps in stops:
            train(recipe(start, tmp_path / name, train__steps=steps, data__max_bad=0.5), quiet)
        counts[name] = [row["skipped_samples"] for row in rows(tmp_path / name)]
    assert counts["whole"] == counts["cut"] and counts["cut"][-1] > counts["cut"][0]
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-0000006")  # as if killed before its last save
    train(recipe(start, tmp_path / "cut", data__max_bad=0.5), quiet)
    whole, cut = ((tmp_path / name / "quarantine-0.jsonl").read_text() for name in counts)
    assert whole == cut and whole.count("\n") == counts["whole"][-1]


def test_both_losses_fall(start: Path, tmp_path: Path):
    train(recipe(start, tmp_path, train__steps=100, train__schedule__lr=3e-3, train__save_every=100), quiet)
    logged = rows(tmp_path)

    def mean(name: str, part: slice) -> float:
        values = [row[name] for row in logged[part] if row.get(name) is not None]
        return sum(values) / len(values)

    assert mean("ce", slice(-10, None)) < 0.7 * mean("ce", slice(0, 3))
    assert mean("mse", slice(-10, None)) < 0.9 * mean("mse", slice(0, 3))


def test_a_time_budget_stops_the_run_and_saves_it(start: Path, tmp_path: Path):
    said: list[str] = []
    train(recipe(start, tmp_path, train__max_minutes=0.0), said.append)
    assert said[-1].startswith("stopped after step 1 of ")
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-0000001"]


def test_an_old_run_is_not_overwritten(start: Path, tmp_path: Path):
    train(recipe(start, tmp_path, train__steps=1), quiet)
    with pytest.raises(ValueError, match=r"auto_resume=true"):
        train(recipe(start, tmp_path, train__auto_resume=False), quiet)


def test_what_cannot_go_on_changes_nothing(start: Path, tmp_path: Path):
    train(recipe(start, tmp_path, train__steps=1), quiet)
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match="of another run; name another folder"):
        train(recipe(start, tmp_path, train__steps=2, train__ema=None), quiet)
    code = "import fcntl, sys; fcntl.lockf(file := open(sys.argv[1], 'w'), 2); print(flush=True); input()"
    line = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(ValueError, match="another process trains in"):
            train(recipe(start, tmp_path, train__steps=2), quiet)
        other.kill()
    assert (tmp_path / "recipe.json").read_bytes() == before
    train(recipe(start, tmp_path, train__steps=2), quiet)


def test_the_resolved_recipe_repeats_the_run(start: Path, tmp_path: Path):
    train(recipe(start, tmp_path / "a", train__steps=2), quiet)
    again = read_recipe(tmp_path / "a" / "recipe.json", [f"folder={tmp_path / 'b'}"])
    train(again, quiet)
    same_run(tmp_path / "a", tmp_path / "b")


def test_packs_without_pictures_or_of_one_kind_train(start: Path, tmp_path: Path):
    for kind in ("ask_count", "draw_one"):
        folder = tmp_path / kind
        train(recipe(start, folder, train__steps=2, data__world__kinds={kind: 1.0}), quiet)
        assert all(
            ("ce" in row) == (kind == "ask_count" or row.get("ce") is not None) for row in rows(folder)
        )


def test_sigterm_saves_and_ends_well(start: Path, tmp_path: Path):
    process = run_apart(recipe(start, tmp_path / "run", train__steps=10_000), tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    step = len(rows(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "MANIFEST.json").is_file()


def run_apart(run: Recipe, folder: Path, ranks: int = 1) -> subprocess.Popen:
    from openbagel.config import to_json

    path = folder / "run.yaml"
    path.write_text(json.dumps(to_json(run)))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "openbagel.train", str(path)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def wait_for(path: Path, lines: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, f"{path} never had {lines} lines"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_ranks_killed_at_any_moment_resume_exactly(start: Path, tmp_path: Path):
    whole = recipe(start, tmp_path / "whole", train__steps=8, train__accumulation=2)
    train(whole, quiet)
    halved = {"train__steps": 8, "train__accumulation": 1}
    for lines in (1, 3, 6):
        process = run_apart(recipe(start, tmp_path / "cut", **halved), tmp_path, ranks=2)
        wait_for(tmp_path / "cut" / "metrics.jsonl", lines)
        for pid in (process.pid, *descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert run_apart(recipe(start, tmp_path / "cut", **halved), tmp_path, ranks=2).wait(200) == 0
    ours, theirs = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert [row["step"] for row in theirs] == list(range(8))
    for mine, other in zip(ours, theirs, strict=True):
        losses = {name: value for name in ("ce", "mse") if (value := mine.get(name)) is not None}
        assert {name: other[name] for name in losses} == pytest.approx(losses, rel=1e-5)


def test_ema_lora_and_freezing_decide_what_a_run_keeps(start: Path, tmp_path: Path):
    run = recipe(start, tmp_path, lora={"preset": "gen", "rank": 2}, train__steps=2)
    assert train(run, quiet) == tmp_path / "adapter"
    assert all("lora" in name for name in last(tmp_path) if name.startswith("model/"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_overfitting_one_pack_is_a_self_test(start: Path, tmp_path: Path):
    said: list[str] = []
    run = recipe(start, tmp_path, overfit=80, train__schedule__lr=3e-3, data__world__copies=1)
    train(run, said.append)
    assert "the self-test passed" in said[-1]
    with pytest.raises(ValueError, match="the self-test failed"):
        train(recipe(start, tmp_path / "b", overfit=2), quiet)


# samples ----------------------------------------------------------------------------------------------------


def world_samples(kind: str, count: int, copies: int = 1) -> list[Sample]:
    mixture = Mixture(kinds=KINDS, think=0.2, copies=copies, examples_per_kind=50)
    data = WorldDataset(kind, nano_world(), mixture, small().config, CODEC)
    ids = [SampleId(data.name, 0, row) for row in range(count)]
    return [Sample(id, decode(data.parts(id.row, id.random(0, "parts")))) for id in ids]


def encoder(cache: LatentCache | None = None) -> LatentEncoder:
    checkpoint = small()
    return LatentEncoder(checkpoint.autoencoder, checkpoint.config, 0, 1.0, cache)


def test_samples_have_the_official_layout():
    seen = set()
    for kind in KINDS:
        for segments in encoder().segments(world_samples(kind, 12)):
            seen.add(tuple(type(segment) for segment in segments))
            losses = [s.loss for s in segments if isinstance(s, Text)]
            drawn = [s for s in segments if isinstance(s, VaeImage) and s.hidden]
            assert len(drawn) == 1 or losses[-1], "every sample has something to learn"
    assert (Text, VaeImage) in seen
    assert (VitImage, Text, Text) in seen
    assert (VaeImage, VitImage, Text, VaeImage) in seen


def test_packs_are_as_long_as_was_planned(tmp_path: Path):
    """For every kind of data there is: what the headers said is what is trained."""
    checkpoint = small()
    data = Data(mixture=str(write_example(tmp_path / "toy", rows=4)), world=Mixture(kinds=KINDS, copies=3))
    packer = Packer(checkpoint.config, checkpoint.codec)
    for group in datasets(data, checkpoint):
        for row in range(4):
            id = SampleId(group.name, 0, row)
            parts = group.parts(row, id.random(0, "parts"))
            pack = packer.pack(encoder().segments([Sample(id, decode(parts))]))
            assert len(pack) == extent(parts, checkpoint.config).tokens, id
            assert len(pack.labels) or len(pack.targets), id


def test_a_sample_is_the_same_in_any_company():
    samples = world_samples("draw_two", 4)
    together, alone = encoder().segments(samples), encoder().segments(samples[2:3])
    ours, theirs = together[2][-1], alone[0][-1]
    assert isinstance(ours, VaeImage) and isinstance(theirs, VaeImage) and ours.t == theirs.t
    assert torch.allclose(ours.frames[0].tokens, theirs.frames[0].tokens, atol=5e-6)


def test_latents_are_encoded_once_and_do_not_depend_on_what_is_cached(tmp_path: Path):
    samples, plain = world_samples("edit_recolour", 4), encoder()
    assert plain.autoencoder

    def latents(folder: str, samples: list[Sample]) -> torch.Tensor:
        assert plain.autoencoder
        cached = replace(plain, cache=LatentCache(tmp_path / folder, plain.autoencoder))
        images = [part for parts in cached.segments(samples) for part in parts if isinstance(part, VaeImage)]
        return torch.cat([frame.tokens for image in images for frame in image.frames])

    latents("some", samples[1:2])
    once = latents("some", samples)
    assert torch.equal(latents("none", samples), once)
    whole, empty, *_ = sorted((tmp_path / "some").rglob("*.npy"))
    whole.write_bytes(whole.read_bytes()[:-9])
    empty.write_bytes(b"")
    assert torch.equal(latents("some", samples), once)
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as told:
        assert torch.equal(latents("file", samples), once)
    assert ["latents are not kept: Not a directory" in str(warning.message) for warning in told] == [True]
    plain.autoencoder.encoder.register_forward_pre_hook(lambda *_: pytest.fail("encoded again"))
    assert torch.equal(latents("some", samples), once)


def test_copies_share_their_context_and_spread_their_times():
    for segments in encoder().segments(world_samples("draw_two", 8, copies=4)):
        copies = [s for s in segments if isinstance(s, VaeImage) and s.hidden]
        assert len(copies) == 4 and [c.t for c in copies] == sorted({c.t for c in copies})


# the autoencoder --------------------------------------------------------------------------------------------


def test_autoencoder_training_resumes_and_its_last_steps_leave_the_encoder_alone(tmp_path: Path):
    vae = small().config.vae
    assert vae
    settings = AutoencoderTraining(train=Training(steps=4, ema=None), samples=1, decoder_steps=2)
    runs: list[AutoencoderTrainer] = []
    for name, budgets in {"a": (None,), "b": (0.0, None)}.items():
        for minutes in budgets:
            changed = replace(settings, train=replace(settings.train, max_minutes=minutes))
            place = Place(folder=tmp_path / name, checkpoints=tmp_path / name / "c", ranks=Ranks("cpu"))
            runs.append(AutoencoderTrainer(vae, nano_world(), changed, place))
            runs[-1].run()
    straight, cut, resumed = runs
    assert (straight.step, cut.step, resumed.step) == (4, 1, 4)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    scale, shift = resumed.latent_statistics()
    assert scale > 0 and abs(shift) < 1
    resumed.step, encoder = 2, resumed.model.encoder.conv_in.weight.clone()
    resumed.train_step()
    assert torch.equal(resumed.model.encoder.conv_in.weight, encoder)
    resumed.step = 0
    resumed.train_step()
    assert not torch.equal(resumed.model.encoder.conv_in.weight, encoder)


# recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_understood(path: Path):
    assert read_recipe(path, ["train.steps=3"]).train.steps == 3


def test_numbers_as_people_write_them():
    assert read_recipe(RECIPES / "nano_finetuning.yaml", ["train.schedule.lr=2e-5"]).train.schedule.lr == 2e-5


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ValueError, match="'stepz'.*'steps'"):
        read_recipe(RECIPES / "nano_finetuning.yaml", ["train.stepz=3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("train.steps", "no override"),
        ("data.mixture={", "'data.mixture={' is no override: the value is no YAML"),
        ("train.steps=5 train.steps.x=1", "train.steps.x lies below a key with a value"),
        ("train.steps=5 train.steps.x.y=1", "train.steps.x.y lies below a key with a value"),
        ("overfit=-3", "overfit -3 must be at least 0"),
        ("start.weights=emma", "start.weights 'emma' is none of ema, model; did you mean 'ema'"),
        ("train.ema=2", "ema 2.0 must be below 1"),
        ("train.ema=-1", "ema -1.0 must be at least 0"),
        ("train.max_grad_norm=0", "max_grad_norm 0.0 must be"),
        ("train.timestep_shift=0", "timestep_shift 0.0 must be"),
        ("train.schedule.lr=-1", "lr -1.0 must be at least 0"),
        ("train.schedule.warmup=-3", "warmup -3 must be at least 0"),
        ("guard.max_bad_steps=-1", "max_bad_steps -1 must be at least 0"),
    ],
)
def test_what_cannot_be_is_told_before_the_run(changes: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_recipe(RECIPES / "nano_finetuning.yaml", changes.split())


def test_weights_that_the_folder_lacks_are_told(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors; set start\.weights to ema"):
        train(recipe(start, tmp_path, start__weights="model"), quiet)


def test_a_stage_fills_in_what_a_recipe_leaves_open():
    made = recipe_from({"folder": "x", "stage": "finetuning", "train": {"steps": 7}})
    assert made.train.steps == 7 and made.train.schedule.lr == 2.5e-5 and made.train.ema == 0.995
    assert made.data.packing.max_num_tokens == 45 * 1024
