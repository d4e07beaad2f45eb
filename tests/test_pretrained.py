"""Models joined from parts that transformers wrote: equal outputs, equal experts, and strictness."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from openbagel.config import Experts, from_json, to_json
from openbagel.images import sincos_table
from openbagel.model.vae import AutoEncoder
from openbagel.pretrained import HEAD, Parts, join
from openbagel.sequence import Packer, Text, VitImage
from openbagel.weights import POSITIONS, Checkpoint, load_checkpoint, save_checkpoint
from tests import tiny

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}


def qwen_folder(
    folder: Path, *, tied: bool = False, shards: str = "1GB", vocabulary: int | None = None
) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary or len(tiny.codec()) + 7,  # padded, as Qwen's is
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5e4,
        tie_word_embeddings=tied,
    )
    model = tiny.randomised(Qwen2ForCausalLM(config))
    model.save_pretrained(folder, max_shard_size=shards)
    tiny.codec().save(folder)
    return folder


def siglip_folder(folder: Path, whole: bool = False) -> Path:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    if whole:
        config = SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=VISION)
        tiny.randomised(SiglipModel(config)).save_pretrained(folder)
    else:
        tiny.randomised(SiglipVisionModel(SiglipVisionConfig(**VISION))).save_pretrained(folder)
    return folder


def flux_file(path: Path) -> Path:
    vae = replace(tiny.VAE, ch=32, groups=32, scale=0.3611, shift=0.1159)
    save_file(tiny.randomised(AutoEncoder(vae), seed=1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    qwen_folder(folder / "qwen")
    siglip_folder(folder / "siglip")
    flux_file(folder / "ae.safetensors")
    return folder


def parts(home: Path, **changes: Any) -> Parts:
    made = Parts(
        llm=str(home / "qwen"),
        vit=str(home / "siglip"),
        vae=str(home / "ae.safetensors"),
        layer_module=Experts.MOT,
        max_latent_size=8,
        vit_max_num_patch_per_side=8,
    )
    return replace(made, **changes)


def load(made: Parts) -> Checkpoint:
    return join(made).load()


def change(path: Path, edit: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# what the parts computed, the joined model computes ---------------------------------------------------------


@pytest.mark.parametrize("shards", ["1GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_qwen(tmp_path: Path, home: Path, tied: bool, shards: str) -> None:
    folder = qwen_folder(tmp_path / "qwen", tied=tied, shards=shards)
    assert (folder / "model.safetensors.index.json").is_file() == (shards == "60KB")
    ids = tiny.codec().encode("a red circle above a blue square")
    with torch.inference_mode():
        expected = Qwen2ForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]  # pyright: ignore
        joined = load(parts(home, llm=str(folder), qk_norm=False))
        pack = Packer(joined.config, joined.codec).pack([[Text(ids, loss=False, bare=True)]])
        ours = joined.model.logits(joined.model(pack))
    assert joined.config.llm.rope_theta == 5e4
    assert ours.shape == expected.shape and expected.std() > 0.1
    assert torch.allclose(ours, expected, atol=1e-5), (ours - expected).abs().max()


@pytest.mark.parametrize("whole", [False, True], ids=["vision model", "both towers"])
@pytest.mark.parametrize("select", [-1, -2, -3])
def test_features_are_those_of_siglip(tmp_path: Path, home: Path, whole: bool, select: int) -> None:
    folder = siglip_folder(tmp_path / "siglip", whole)
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    joined = load(parts(home, vit=str(folder), vit_select_layer=select))
    theirs = SiglipVisionModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = theirs(picture[None], output_hidden_states=True).hidden_states[select]
        tower = getattr(theirs, "vision_model", theirs)
        expected = tower.post_layernorm(hidden)[0]
        pack = Packer(joined.config, joined.codec).pack([[VitImage(picture)]])
        ours = joined.model.vit_model(pack.patches, pack.patch_position_ids, pack.patch_counts)
        unlike = tower.post_layernorm(theirs(picture[None], output_hidden_states=True).hidden_states[0])[0]
    assert torch.allclose(ours, expected, atol=1e-5), (ours - expected).abs().max()
    assert not torch.allclose(ours, unlike, atol=1e-2)


def test_a_small_picture_reads_the_corner_of_the_position_table(home: Path) -> None:
    joined = load(parts(home))
    pack = Packer(joined.config, joined.codec).pack([[VitImage(torch.zeros(3, 8, 12))]])
    assert pack.patch_position_ids.tolist() == [0, 1, 2, 8, 9, 10]


# how they are joined ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", Experts)
def test_experts_begin_equal_and_apart(home: Path, experts: Experts) -> None:
    state = load(parts(home, layer_module=experts)).model.state_dict()
    copies = [name for name in state if "_moe_gen" in name]
    assert bool(copies) == (experts is not Experts.DENSE)
    for name in copies:
        twin = state[name.replace("_moe_gen", "")]
        assert torch.equal(state[name], twin), name
        assert state[name].data_ptr() != twin.data_ptr(), f"{name} shares its memory with its twin"


def test_a_tied_head_is_a_copy_of_the_embeddings(tmp_path: Path, home: Path) -> None:
    folder = qwen_folder(tmp_path / "qwen", tied=True)
    model = load(parts(home, llm=str(folder))).model.language_model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.model.embed_tokens.weight.abs().sum() > 0


def test_what_no_part_stores(home: Path) -> None:
    a, again, other = (load(parts(home, seed=seed)).model for seed in (1, 1, 2))
    state = a.state_dict()
    for name in ("q_norm", "k_norm", "q_norm_moe_gen", "k_norm_moe_gen"):
        assert torch.equal(state[f"language_model.model.layers.1.self_attn.{name}.weight"], torch.ones(16))
    assert not state["llm2vae.weight"].any() and not state["llm2vae.bias"].any()
    assert torch.equal(state["latent_pos_embed.pos_embed"], sincos_table(8, 64))
    assert torch.equal(state["vit_pos_embed.pos_embed"], sincos_table(8, 64))
    for name in ("connector.fc1", "connector.fc2", "vae2llm", "time_embedder.mlp.0", "time_embedder.mlp.2"):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
        assert torch.equal(weight, again.state_dict()[f"{name}.weight"])
        assert not torch.equal(weight, other.state_dict()[f"{name}.weight"])


def test_experts_drawn_at_random(home: Path) -> None:
    state = load(parts(home, copy_experts=False)).model.state_dict()
    drawn = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    assert not torch.equal(state[drawn], state[drawn.replace("_moe_gen", "")])
    assert torch.equal(state["language_model.model.norm_moe_gen.weight"], torch.ones(64))


def test_the_position_table_is_stretched(home: Path) -> None:
    stored = load_file(home / "siglip" / "model.safetensors")
    table = next(tensor for name, tensor in stored.items() if name.endswith("position_embedding.weight"))
    joined = join(parts(home, vit_max_num_patch_per_side=16))
    stretched = joined.tensors[POSITIONS].reshape(16, 16, -1)
    assert joined.tensors.shapes()[POSITIONS] == (256, 32)
    middle = (stretched[7, 7] + stretched[7, 8] + stretched[8, 7] + stretched[8, 8]) / 4
    around = table.reshape(8, 8, -1)[3:5, 3:5].mean(dim=(0, 1))
    assert (middle - around).abs().mean() < 0.4 * table.std()
    assert joined.config.settings.vit_limits.max_size == 64
    assert torch.equal(join(parts(home)).tensors[POSITIONS], table)


def test_markers_that_the_tokenizer_lacks_get_rows(tmp_path: Path, home: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    size = tokenizer.get_vocab_size()
    folder = qwen_folder(tmp_path / "qwen", vocabulary=size)
    tokenizer.save(str(folder / "tokenizer.json"))
    joined = load(parts(home, llm=str(folder)))
    assert joined.config.llm.vocab_size == size + 4 == joined.codec.vision_end + 1
    stored = load_file(folder / "model.safetensors")
    for name, ours in (
        ("model.embed_tokens.weight", joined.model.language_model.model.embed_tokens.weight),
        ("lm_head.weight", joined.model.language_model.lm_head.weight),
    ):
        assert torch.equal(ours[:size], stored[name])
        assert 0 < ours[size:].std() < 0.1


def test_a_padded_vocabulary_is_never_shrunk(home: Path) -> None:
    assert load(parts(home)).config.llm.vocab_size == len(tiny.codec()) + 7


def test_parts_may_be_left_out(home: Path) -> None:
    blind = load(parts(home, vit=None))
    mute = load(parts(home, vae=None, layer_module=Experts.DENSE))
    assert blind.config.vit is None and blind.autoencoder is not None
    assert mute.config.vae is None and mute.autoencoder is None
    assert not [name for name in mute.model.state_dict() if name.startswith(("vae2llm", "latent_pos"))]


def test_a_joined_model_is_an_official_folder(tmp_path: Path, home: Path) -> None:
    joined = load(parts(home))
    save_checkpoint(tmp_path / "joined", joined)
    again = load_checkpoint(tmp_path / "joined")
    assert again.config == joined.config
    for name, tensor in joined.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    limits = joined.config.settings.vae_limits
    assert limits.max_size == 8 * joined.config.latent_stride == joined.config.settings.size[0]
    assert joined.config.settings.vit_limits.max_size == 32


def test_parts_are_read_from_json(home: Path) -> None:
    assert from_json(Parts, to_json(parts(home)), "start.parts") == parts(home)


def test_tensors_come_one_by_one(home: Path) -> None:
    """A rank may ask for any of them, in any order, and meets the numbers of the whole."""
    whole = load(parts(home)).model.state_dict()
    joined = join(parts(home))
    tensors, empty = joined.tensors, joined.load(device="meta")
    assert all(parameter.is_meta for parameter in empty.model.parameters())
    assert empty.autoencoder and not any(p.is_meta for p in empty.autoencoder.parameters())
    assert set(tensors.shapes()) == set(whole)
    for name in reversed(list(tensors.shapes())):
        assert torch.equal(tensors[name].float(), whole[name]), name
        assert tensors.shapes()[name] == tuple(whole[name].shape)


# strictness -------------------------------------------------------------------------------------------------


def spoilt(tmp_path: Path, part: str, edit: Any) -> Parts:
    qwen_folder(tmp_path / "qwen")
    siglip_folder(tmp_path / "siglip")
    flux_file(tmp_path / "ae.safetensors")
    file = tmp_path / part if part.endswith("safetensors") else tmp_path / part / "model.safetensors"
    change(file, edit)
    return parts(tmp_path)


def drop(name: str) -> Any:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[next(stored for stored in tensors if stored.endswith(name))]

    return edit


@pytest.mark.parametrize(
    ("part", "edit", "message"),
    [
        ("qwen", drop("layers.1.mlp.up_proj.weight"), r"2 missing: .*layers\.1\.mlp\.up_proj\.weight"),
        ("qwen", drop("lm_head.weight"), rf"1 missing: {HEAD}"),
        ("qwen", lambda t: t.update(extra=torch.ones(2)), r"1 unexpected: language_model\.extra"),
        ("siglip", drop("layers.0.mlp.fc1.bias"), r"missing: vit_model.*layers\.0\.mlp\.fc1\.bias"),
        ("siglip", lambda t: t.update(strange=torch.ones(2)), r"1 unexpected: vit_model\..*strange"),
        ("ae.safetensors", drop("decoder.conv_out.bias"), r"ae\.safetensors .*1 missing: decoder"),
        ("ae.safetensors", drop("encoder.down.0.block.0.conv1.weight"), "original layout"),
    ],
)
def test_every_tensor_is_used_or_named(tmp_path: Path, part: str, edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(spoilt(tmp_path, part, edit))


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("qwen", {"model_type": "llama"}, "model_type='llama' is not supported"),
        (
            "qwen",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            r"rope_scaling=.*yarn.* is not supported",
        ),
        ("qwen", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("qwen", {"intermediate_size": 100}, r"misshapen: .*gate_proj"),
        ("siglip", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("siglip", {"model_type": "clip_vision_model"}, "model_type='clip_vision_model' is not supported"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, part: str, fields: dict[str, Any], message: str) -> None:
    unchanged = spoilt(tmp_path, "qwen", lambda tensors: None)
    change_config(tmp_path / part, **fields)
    with pytest.raises(ValueError, match=message):
        load(unchanged)


def test_old_configurations_read_alike(tmp_path: Path) -> None:
    """Before version 5 of transformers rope_theta stood at the top, and SigLIP left its defaults out."""
    made = spoilt(tmp_path, "qwen", lambda tensors: None)
    path = tmp_path / "qwen" / "config.json"
    fields = json.loads(path.read_text())
    theta = fields.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(fields | {"rope_theta": theta, "rope_scaling": None}))
    assert join(made).config.llm.rope_theta == theta
    (tmp_path / "siglip" / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 14}}))
    vit = join(made).config.vit
    assert vit and (vit.hidden_size, vit.num_hidden_layers, vit.patch_size) == (768, 12, 14)


def test_missing_parts_say_so(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder"):
        join(parts(home, llm=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"nowhere\.safetensors"):
        join(parts(home, vae=str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(ValueError, match="between -3 and -1"):
        join(parts(home, vit_select_layer=-4))
