"""The presets against the tensor names, shapes and sizes that are published for the official checkpoint."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from openbagel.config import BagelConfig, Experts, VAEConfig, bagel_0_5b, bagel_1_5b, bagel_7b
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder

Shapes = Iterator[tuple[str, tuple[int, ...]]]
GEN = "_moe_gen"
COUNT_7B = 14_607_260_128


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def decoder(config: BagelConfig) -> Shapes:
    llm = config.llm
    width, kv = llm.hidden_size, llm.num_key_value_heads * llm.head_dim
    yield "language_model.model.embed_tokens.weight", (llm.vocab_size, width)
    yield "language_model.lm_head.weight", (llm.vocab_size, width)
    for gen in ("", GEN):
        yield f"language_model.model.norm{gen}.weight", (width,)
        for i in range(llm.num_hidden_layers):
            layer = f"language_model.model.layers.{i}"
            yield f"{layer}.input_layernorm{gen}.weight", (width,)
            yield f"{layer}.post_attention_layernorm{gen}.weight", (width,)
            yield from linear(f"{layer}.self_attn.q_proj{gen}", width, width)
            yield from linear(f"{layer}.self_attn.k_proj{gen}", kv, width)
            yield from linear(f"{layer}.self_attn.v_proj{gen}", kv, width)
            yield from linear(f"{layer}.self_attn.o_proj{gen}", width, width, bias=False)
            yield f"{layer}.self_attn.q_norm{gen}.weight", (llm.head_dim,)
            yield f"{layer}.self_attn.k_norm{gen}.weight", (llm.head_dim,)
            yield from linear(f"{layer}.mlp{gen}.gate_proj", llm.intermediate_size, width, bias=False)
            yield from linear(f"{layer}.mlp{gen}.up_proj", llm.intermediate_size, width, bias=False)
            yield from linear(f"{layer}.mlp{gen}.down_proj", width, llm.intermediate_size, bias=False)


def pictures(width: int) -> Shapes:
    """Everything around the decoder: SigLIP so400m/14 with 26 layers on a 70x70 table, latents on 64x64."""
    yield from linear("time_embedder.mlp.0", width, 256)
    yield from linear("time_embedder.mlp.2", width, width)
    yield from linear("vae2llm", width, 64)
    yield from linear("llm2vae", 64, width)
    yield "latent_pos_embed.pos_embed", (4096, width)
    yield from linear("connector.fc1", width, 1152)
    yield from linear("connector.fc2", width, width)
    yield "vit_pos_embed.pos_embed", (4900, width)
    vit = "vit_model.vision_model"
    yield from linear(f"{vit}.embeddings.patch_embedding", 1152, 588)
    yield f"{vit}.embeddings.position_embedding.weight", (4900, 1152)
    for i in range(26):
        layer = f"{vit}.encoder.layers.{i}"
        yield from norm(f"{layer}.layer_norm1", 1152)
        yield from norm(f"{layer}.layer_norm2", 1152)
        for part in ("q", "k", "v", "out"):
            yield from linear(f"{layer}.self_attn.{part}_proj", 1152, 1152)
        yield from linear(f"{layer}.mlp.fc1", 4304, 1152)
        yield from linear(f"{layer}.mlp.fc2", 1152, 4304)
    yield from norm(f"{vit}.post_layernorm", 1152)


def conv(name: str, outer: int, inner: int, side: int = 3) -> Shapes:
    yield f"{name}.weight", (outer, inner, side, side)
    yield f"{name}.bias", (outer,)


def res_block(name: str, inner: int, outer: int) -> Shapes:
    yield from norm(f"{name}.norm1", inner)
    yield from conv(f"{name}.conv1", outer, inner)
    yield from norm(f"{name}.norm2", outer)
    yield from conv(f"{name}.conv2", outer, outer)
    if inner != outer:
        yield from conv(f"{name}.nin_shortcut", outer, inner, 1)


def middle(name: str) -> Shapes:
    yield from res_block(f"{name}.block_1", 512, 512)
    yield from norm(f"{name}.attn_1.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        yield from conv(f"{name}.attn_1.{part}", 512, 512, 1)
    yield from res_block(f"{name}.block_2", 512, 512)


def flux_autoencoder() -> Shapes:
    yield from conv("encoder.conv_in", 128, 3)
    yield from conv("decoder.conv_in", 512, 16)
    yield from conv("encoder.conv_out", 32, 512)
    yield from conv("decoder.conv_out", 3, 128)
    yield from norm("encoder.norm_out", 512)
    yield from norm("decoder.norm_out", 128)
    yield from middle("encoder.mid")
    yield from middle("decoder.mid")
    widths = [128, 256, 512, 512]
    for i, (inner, outer) in enumerate(zip([128, *widths[:-1]], widths, strict=True)):
        for j in range(2):
            yield from res_block(f"encoder.down.{i}.block.{j}", outer if j else inner, outer)
        if i < 3:
            yield from conv(f"encoder.down.{i}.downsample.conv", outer, outer)
    for i, (inner, outer) in enumerate(zip([*widths[1:], 512], widths, strict=True)):
        for j in range(3):
            yield from res_block(f"decoder.up.{i}.block.{j}", outer if j else inner, outer)
        if i > 0:
            yield from conv(f"decoder.up.{i}.upsample.conv", outer, outer)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def on_meta(config: BagelConfig) -> BagelModel:
    with torch.device("meta"):
        return BagelModel(config)


def test_7b_has_the_official_names_and_shapes() -> None:
    config = bagel_7b()
    assert shapes(on_meta(config)) == dict([*decoder(config), *pictures(3584)])


def test_7b_has_14_607_billion_parameters() -> None:
    count = sum(parameter.numel() for parameter in on_meta(bagel_7b()).parameters())
    assert round(count / 1e9, 3) == 14.607
    assert count == COUNT_7B


def test_autoencoder_has_the_official_names_and_shapes() -> None:
    config = bagel_7b().vae
    assert isinstance(config, VAEConfig)
    with torch.device("meta"):
        autoencoder = AutoEncoder(config)
    assert shapes(autoencoder) == dict(flux_autoencoder())
    assert round(sum(p.numel() for p in autoencoder.parameters()) / 1e6) == 84


@pytest.mark.parametrize(
    ("config", "language", "per_layer"),
    [(bagel_7b(), 14.141, 233_058_048), (bagel_1_5b(), 3.087, 46_798_080), (bagel_0_5b(), 0.988, 14_912_512)],
    ids=["7B", "1.5B", "0.5B"],
)
def test_presets_have_the_published_sizes(config: BagelConfig, language: float, per_layer: int) -> None:
    model = on_meta(config).language_model
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == language
    expert = [p for name, p in model.model.layers[0].named_parameters() if GEN not in name]
    assert sum(p.numel() for p in expert) == per_layer
    assert config.layer_module is Experts.MOT
    assert (config.latent_stride, config.latent_channels) == (16, 64)
