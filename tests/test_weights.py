"""Checkpoint folders: round trips in every layout, strictness, and what is read from where."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openbagel.config import BagelConfig, Experts, official_settings
from openbagel.images import sincos_table
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.sequence import Text, VitImage
from openbagel.train.parallel import Ranks
from openbagel.train.stages import begin_from
from openbagel.weights import INDEX_FILE, Checkpoint, TensorFiles, load_checkpoint, save_checkpoint
from tests import tiny
from tests.train.test_trainer import quiet, recipe

EMA = "ema.safetensors"


def same(ours: nn.Module | None, theirs: nn.Module | None) -> bool:
    """Whether two modules hold the same tensors, bit for bit and of the same type."""
    if ours is None or theirs is None:
        return ours is theirs
    a, b = ours.state_dict(), theirs.state_dict()
    return list(a) == list(b) and all(a[k].dtype is b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def identical(ours: Checkpoint, theirs: Checkpoint) -> bool:
    alike = same(ours.model, theirs.model) and same(ours.autoencoder, theirs.autoencoder)
    return alike and ours.config == theirs.config


def starts_alike(start: Path, run: Path, **origin: Any) -> bool:
    """Whether training begins with the weights that loading gives, whole or read one by one as ranks do."""
    given = {f"start__{key}": value for key, value in origin.items()}
    begin = begin_from(recipe(start, run, **given), Ranks("cpu", report=quiet))
    model = load_checkpoint(start, dtype=torch.float32).model
    stored = {n: tensor for n, tensor in model.state_dict().items() if not n.endswith("pos_embed")}
    read = all(torch.equal(begin.read(name).float(), tensor) for name, tensor in stored.items())
    return same(begin.checkpoint.model, model) and read


@cache
def official_like() -> Checkpoint:
    """A checkpoint whose facts are all in its tensors or equal to the 7B's."""
    vae = replace(tiny.VAE, ch=32, groups=32, scale=0.3611, shift=0.1159)
    config = replace(tiny.config(), vae=vae, settings=official_settings())
    model = tiny.randomised(BagelModel(config))
    return Checkpoint(config, model, tiny.randomised(AutoEncoder(vae)), tiny.codec())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, tiny.checkpoint())
    return tmp_path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [None, 60_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("experts", Experts)
def test_round_trip(tmp_path: Path, experts: Experts, shard_bytes: int | None) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint(experts), shard_bytes=shard_bytes)
    assert identical(load_checkpoint(tmp_path), tiny.checkpoint(experts))
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert bool(shards) == (shard_bytes is not None)
    assert len(shards) > 3 or shard_bytes is None


def test_round_trip_in_bfloat16(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint(), dtype=torch.bfloat16)
    loaded = load_checkpoint(tmp_path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    for name, tensor in tiny.model().state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.bfloat16()), name
    again = tmp_path / "again"
    save_checkpoint(again, loaded)
    assert identical(load_checkpoint(again), loaded)


def test_dtype_is_the_one_asked_for(folder: Path) -> None:
    loaded = load_checkpoint(folder, dtype=torch.float16)
    assert loaded.autoencoder is not None
    assert {p.dtype for m in (loaded.model, loaded.autoencoder) for p in m.parameters()} == {torch.float16}


def test_without_parts_and_norms(tmp_path: Path) -> None:
    config = replace(tiny.config(), vit=None, llm=replace(tiny.config().llm, qk_norm=False))
    drawing_only = replace(tiny.checkpoint(), config=config, model=tiny.randomised(BagelModel(config)))
    save_checkpoint(tmp_path, drawing_only)
    assert identical(load_checkpoint(tmp_path), drawing_only)


def test_loaded_models_train_as_built_ones_do(folder: Path) -> None:
    frozen = [name for name, p in load_checkpoint(folder).model.named_parameters() if not p.requires_grad]
    assert sorted(frozen) == ["latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"]


def test_codec_comes_along(folder: Path) -> None:
    codec = load_checkpoint(folder).codec
    assert codec.encode("a red circle <|im_end|>") == tiny.codec().encode("a red circle <|im_end|>")


@pytest.mark.parametrize("shard_bytes", [None, 60_000], ids=["one file", "sharded"])
@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_files_have_the_mode_that_open_gives(tmp_path: Path, shard_bytes: int | None) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "model", tiny.checkpoint(), shard_bytes=shard_bytes)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o640}, modes


# other layouts ----------------------------------------------------------------------------------------------


def test_last_weights_where_there_are_no_averaged_ones(folder: Path) -> None:
    (folder / EMA).rename(folder / "model.safetensors")
    assert identical(load_checkpoint(folder), tiny.checkpoint())


def test_averaged_weights_are_preferred(folder: Path) -> None:
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    assert identical(load_checkpoint(folder), tiny.checkpoint())


@pytest.mark.parametrize("stored", ["none", "plain Qwen2"])
def test_old_folders(tmp_path: Path, stored: str) -> None:
    """Without a config.json of today, facts come from the tensors, then from the 7B."""
    save_checkpoint(tmp_path, official_like())
    (tmp_path / "config.json").unlink()
    if stored == "plain Qwen2":
        qwen = json.loads((tmp_path / "llm_config.json").read_text()) | {"torch_dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(qwen))
    assert identical(load_checkpoint(tmp_path), official_like())


@pytest.mark.parametrize("experts", [Experts.MOE, Experts.DENSE])
def test_variant_is_seen_in_the_tensors(tmp_path: Path, experts: Experts) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint(experts))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["layer_module"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_checkpoint(tmp_path).config.layer_module is experts


def test_vit_config_may_count_the_used_layers_alone(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    stored["vit_config"]["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(stored))
    assert identical(load_checkpoint(folder), tiny.checkpoint())


def test_folder_without_autoencoder(folder: Path) -> None:
    (folder / "ae.safetensors").unlink()
    loaded = load_checkpoint(folder)
    assert loaded.autoencoder is None
    assert same(loaded.model, tiny.model())


def test_settings_travel_along(tmp_path: Path) -> None:
    settings = replace(tiny.config().settings, size=(12, 20), draws_by_itself=True)
    changed = replace(tiny.config(), settings=settings)
    save_checkpoint(tmp_path, replace(tiny.checkpoint(), config=changed))
    assert load_checkpoint(tmp_path).config.settings == settings


def test_config_json_has_the_known_shape(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    assert stored["model_type"] == "bagel"
    assert stored["architectures"] == ["BagelForConditionalGeneration"]
    assert (stored["visual_gen"], stored["visual_und"]) == (True, True)
    assert stored["vae_config"]["downsample"] == 2
    assert stored["llm_config"] == json.loads((folder / "llm_config.json").read_text())
    assert stored["vit_config"] == json.loads((folder / "vit_config.json").read_text())
    assert stored["llm_config"]["tie_word_embeddings"] is False
    assert "openbagel" in stored


# understanding only -----------------------------------------------------------------------------------------


def test_understanding_only_leaves_the_rest_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = TensorFiles.__getitem__
    monkeypatch.setattr(TensorFiles, "__getitem__", lambda s, name: read.append(name) or get(s, name))
    loaded = load_checkpoint(folder, understanding_only=True)
    generation = (
        "_moe_gen",
        "vae2llm",
        "llm2vae",
        "time_embedder",
        "latent_pos_embed",
        "encoder.down",
        "decoder.",
    )
    assert loaded.autoencoder is None
    assert sorted(read) == sorted(name for name, _ in loaded.model.named_parameters())
    assert [name for name in read if any(part in name for part in generation)] == []
    sample = [VitImage(torch.ones(3, 8, 8)), Text((5, 6, 7), loss=True)]
    with torch.inference_mode():
        ours, _ = loaded.model.losses(tiny.packer().pack([sample]))
        full, _ = tiny.model().losses(tiny.packer().pack([sample]))
    assert torch.equal(ours, full)


# settings ---------------------------------------------------------------------------------------------------


def test_settings_override_config_json(folder: Path) -> None:
    expected = replace(tiny.config(), interpolate_pos=True)
    assert load_checkpoint(folder, settings={"interpolate_pos": True}).config == expected


def test_another_grid_computes_its_positions(folder: Path) -> None:
    """Row and column have the same sines and cosines in a table of any side."""
    larger = load_checkpoint(folder, settings={"max_latent_size": 9}).model.latent_pos_embed.pos_embed
    table = sincos_table(8, 64)
    assert larger.shape == (81, 64)
    assert torch.allclose(larger.reshape(9, 9, -1)[:8, :8], table.reshape(8, 8, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolate_poss": True}, "unknown key 'interpolate_poss'; did you mean 'interpolate_pos'"),
        ({"connector_act": "gelu_pytorch"}, "'gelu_pytorch' is none of .*did you mean 'gelu_pytorch_tanh'"),
        ({"interpolate_pos": "yes"}, "interpolate_pos: expected bool, got 'yes'"),
        ({"layer_module": "Qwen2MoEDecoderLayer"}, "unexpected: .*q_proj_moe_gen"),
    ],
)
def test_wrong_settings(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, settings=settings)


def test_unknown_keys_of_our_own_part_are_refused(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    stored["openbagel"]["draw"]["num_timestep"] = 3
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="unknown key 'num_timestep'; did you mean 'num_timesteps'"):
        load_checkpoint(folder)


# strictness -------------------------------------------------------------------------------------------------

LAYER = "language_model.model.layers.1.self_attn.k_proj_moe_gen"


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{LAYER}.weight"], tensors["vae2llm.bias"]
        tensors["language_model.model.layers.2.stray.weight"] = torch.zeros(1)
        tensors["connector.fc1.weight"] = torch.zeros(2, 3)

    rewrite(folder / EMA, change)
    with pytest.raises(ValueError, match="does not fit its configuration") as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert f"2 missing: {LAYER}.weight, vae2llm.bias" in message
    assert "1 unexpected: language_model.model.layers.2.stray.weight" in message
    assert "1 misshapen: connector.fc1.weight (2, 3), expected (64, 32)" in message


def test_wrong_tensors_of_the_autoencoder_are_listed(folder: Path) -> None:
    rewrite(folder / "ae.safetensors", lambda tensors: tensors.pop("encoder.conv_out.bias"))
    with pytest.raises(ValueError, match="ae.safetensors .* 1 missing: encoder.conv_out.bias"):
        load_checkpoint(folder)


def test_computable_tensors_may_be_missing_or_left_over(folder: Path) -> None:
    tables = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tables:
            del tensors[name]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    rewrite(folder / EMA, change)
    state = load_checkpoint(folder, dtype=torch.bfloat16).model.state_dict()
    for name in tables:
        assert torch.equal(state[name], sincos_table(8, 64).bfloat16())


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def with_content(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def truncated(folder: Path) -> None:
    content = (folder / EMA).read_bytes()
    (folder / EMA).write_bytes(content[: len(content) // 2])


def without_a_shard(folder: Path) -> None:
    (folder / EMA).unlink()
    save_checkpoint(folder, tiny.checkpoint(), shard_bytes=100_000)
    min(folder.glob("model-00002-of-*")).unlink()


def with_part(name: str, **changes: Any) -> Callable[[Path], None]:
    """An old folder, whose part's own file says something else; None removes a field."""

    def change(folder: Path) -> None:
        (folder / "config.json").unlink()
        stored = json.loads((folder / f"{name}.json").read_text()) | changes
        kept = {key: value for key, value in stored.items() if value is not None}
        (folder / f"{name}.json").write_text(json.dumps(kept))

    return change


def renamed(name: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / new)

    return change


BROKEN = {
    "truncated": (truncated, "ema.safetensors is no complete safetensors file .*; download it again"),
    "empty": (
        with_content(EMA, b""),
        "ema.safetensors is no complete safetensors file .*; download it again",
    ),
    "no weights": (
        without(EMA),
        "holds no weights: expected one of ema.safetensors, model.safetensors, model",
    ),
    "a run": (
        renamed(EMA, "checkpoints/ema"),
        "is of a training run; openbagel convert .* OUT makes a model",
    ),
    "a checkpoint": (renamed(EMA, "rank-00000.safetensors"), "is of a training run"),
    "no shard": (without_a_shard, "model-00002-of-.* is no complete safetensors file .*; download it again"),
    "bad json": (with_content("config.json", b"{"), "config.json is no valid JSON"),
    "no llm": (without("config.json", "llm_config.json"), "has neither llm_config.json nor 'llm_config' in"),
    "no tokenizer": (without("tokenizer.json"), "holds no tokenizer"),
    "no theta": (with_part("llm_config", rope_theta=None), "missing key 'rope_theta'"),
    "other activation": (with_part("llm_config", hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "other layers": (with_part("vit_config", num_hidden_layers=9), "=9 does not fit the 2 stored layers"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folders(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder"):
        load_checkpoint(tmp_path / "nowhere")


def test_index_is_used_where_there_is_no_single_file(folder: Path) -> None:
    (folder / EMA).unlink()
    save_checkpoint(folder, tiny.checkpoint(), shard_bytes=100_000)
    index = json.loads((folder / INDEX_FILE).read_text())
    size = sum(t.nbytes for t in tiny.model().state_dict().values())
    assert index["metadata"]["total_size"] == size
    assert set(index["weight_map"]) == set(tiny.model().state_dict())
    assert identical(load_checkpoint(folder), tiny.checkpoint())


def test_config_is_hashable_and_equal_by_value() -> None:
    other: BagelConfig = replace(tiny.config())
    assert other == tiny.config()
    assert hash(other) == hash(tiny.config())
