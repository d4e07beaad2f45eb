"""A model joined from published parts: a Qwen2.5 folder, a SigLIP folder and FLUX's `ae.safetensors`.

    Qwen2.5   model.layers.L.…           both experts (the generation expert begins as a copy)
              embed_tokens, lm_head      as stored; tied embeddings are copied into a head of their own
    SigLIP    patch convolution          a linear layer over (row, column, channel)
              position table             as stored, or interpolated to the wanted side
              encoder layers             all but the last: features are read before it; pooling is left out
    FLUX      autoencoder                as stored
    new       q and k norms ones, `llm2vae` zero; connector, `vae2llm` and `time_embedder` random

Source: reference/architecture.md §1.3-1.5. Tensors are memory-mapped and made one by one, by name, so that a
rank may ask for some of them only; random ones depend on the seed and their name alone.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openbagel import weights
from openbagel.config import Activation, BagelConfig, Experts, from_json, official_settings, to_json
from openbagel.files import read_json
from openbagel.images import ImageLimits
from openbagel.model.transformer import GEN
from openbagel.tokens import TextCodec

EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
PATCHES = f"{weights.VIT}embeddings.patch_embedding.weight"
NEW_NORMS = ("q_norm.weight", "k_norm.weight")
VIT_UNUSED = ("head.", "text_model.", "logit_scale", "logit_bias", "embeddings.position_ids")
"""The pooling head and the text tower of SigLIP: nothing of BAGEL reads them."""
SIGLIP_BASE: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
)
"""What a SigLIP config.json means where it is silent."""
SIGLIP: dict[str, tuple[Any, ...]] = {
    "model_type": ("siglip_vision_model", "siglip"),
    "hidden_act": ("gelu_pytorch_tanh",),
    "layer_norm_eps": (1e-6,),
    "num_channels": (3,),
}
"""Values of a SigLIP configuration that are supported; where it is silent it means the first."""
EMBEDDING_STD = 0.02


Stored = dict[str, tuple[weights.TensorFiles, str]]
"""By our name, the files that hold a tensor and its name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Where the parts are and how they are joined. Without vit the model does not look, without vae it does
    not draw.

    llm and vit are folders, vae is FLUX's file. vit_select_layer -2 reads the features before the last
    layer. seed draws what no part stores.
    """

    llm: str
    vit: str | None
    vae: str | None
    layer_module: Experts
    max_latent_size: int
    qk_norm: bool = True
    latent_patch_size: int = 2
    vit_max_num_patch_per_side: int = 70
    vit_select_layer: int = -2
    connector_act: Activation = Activation.GELU_TANH
    interpolate_pos: bool = False
    copy_experts: bool = True
    """False draws the generation expert at random instead."""
    seed: int = 0


class JoinedTensors(weights.TensorFiles):
    """The tensors of a joined model under our names; `stored` says in which file and under which name each
    one is, `wanted` what shape the model gives it. A tensor shares its memory with its twin.
    """

    def __init__(self, stored: Stored, wanted: weights.Shapes, twins: dict[str, str], parts: Parts) -> None:
        super().__init__([], " with ".join(filter(None, (parts.llm, parts.vit))))
        self.stored, self.wanted, self.twins, self.seed = stored, wanted, twins, parts.seed

    def shapes(self) -> weights.Shapes:
        """Of every tensor that is stored or can be made; a stored one that the model lacks is among them."""
        made = {name: shape for name, shape in self.wanted.items() if self._is_made(name)}
        return made | {name: tuple(self[name].shape) for name in self.stored}

    def __getitem__(self, name: str) -> Tensor:
        name = self.twins.get(name, name)
        if name not in self.stored:
            return self._drawn(name)
        files, stored_name = self.stored[name]
        tensor = files[stored_name]
        if name == PATCHES:
            return tensor.permute(0, 2, 3, 1).flatten(1)
        if name == weights.POSITIONS:
            return _resampled(tensor, math.isqrt(self.wanted[name][0]))
        if name in (EMBEDDINGS, HEAD) and (lacking := self.wanted[name][0] - len(tensor)) > 0:
            added = torch.randn(lacking, tensor.shape[1], generator=self._generator(name))
            return torch.cat([tensor, (added * EMBEDDING_STD).to(tensor.dtype)])
        return tensor

    def _is_made(self, name: str) -> bool:
        origin = self.twins.get(name, name)
        published = origin.startswith(("language_model.", "vit_model."))
        return not published or origin.endswith(NEW_NORMS) or GEN in origin or origin in self.stored

    def _drawn(self, name: str) -> Tensor:
        """float32: sin-cos tables, ones for norms, zeros for `llm2vae`, else uniform within 1 / √inputs."""
        shape = self.wanted[name]
        if name in weights.MAY_BE_MISSING:
            return weights.position_table(shape)
        if "norm" in name:
            return torch.ones(shape)
        if name.startswith("llm2vae."):
            return torch.zeros(shape)
        bound = self.wanted[name.rpartition(".")[0] + ".weight"][1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name))

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(random.Random(f"{self.seed}/{name}").getrandbits(62))


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """A model that is described, its tensors still on disk; vae holds the autoencoder's."""

    config: BagelConfig
    tensors: JoinedTensors
    vae: weights.TensorFiles
    codec: TextCodec

    def load(self, *, device: torch.device | str = "cpu") -> weights.Checkpoint:
        """The model in float32; on the device "meta" the transformer alone stays without memory.

        ValueError lists every tensor that a part lacks, or stores and the model has no place for.
        """
        files = self.tensors, self.vae
        joined = weights.build(self.config, files, self.codec, dtype=torch.float32, device=device)
        for name, parameter in joined.model.named_parameters():
            if name in self.tensors.twins:
                parameter.data = parameter.data.clone()  # the two are trained apart
        return joined


def join(parts: Parts) -> Joined:
    """Reads configurations, headers and the tokenizer; ValueError says which part cannot be used and why."""
    llm_files = weights.TensorFiles(weights.weight_files(Path(parts.llm)))
    vit_files = weights.TensorFiles(weights.weight_files(Path(parts.vit)) if parts.vit else [])
    vae_files = weights.TensorFiles([Path(parts.vae)] if parts.vae else [])
    codec = TextCodec.load(parts.llm)
    llm_fields = read_json(Path(parts.llm) / "config.json")
    tree = {
        "llm": _llm(parts, llm_fields, len(codec)),
        "vit": _vit(parts, parts.vit) if parts.vit else None,
        "vae": _vae(vae_files, parts.vae) if parts.vae else None,
        "settings": to_json(official_settings()),
        **{name: getattr(parts, name) for name in weights.TOP_LEVEL},
    }
    config = _sized(from_json(BagelConfig, tree, parts.llm))
    stored: Stored = {f"language_model.{name}": (llm_files, name) for name in llm_files.handles}
    if config.vit:
        stored |= dict(_vit_tensors(vit_files, config.vit.num_used_layers))
    wanted = weights.model_shapes(config)
    twins = {name: name.replace(GEN, "") for name in wanted if GEN in name and parts.copy_experts}
    if llm_fields.get("tie_word_embeddings") and HEAD not in stored:
        twins[HEAD] = EMBEDDINGS
    return Joined(config, JoinedTensors(stored, wanted, twins, parts), vae_files, codec)


def _llm(parts: Parts, fields: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The decoder; its vocabulary grows for markers that the tokenizer lacked and never shrinks."""
    rope = fields.get("rope_parameters") or {}  # where transformers keeps it since version 5
    if rope:
        scaling = None if rope.get("rope_type", "default") == "default" else rope
        fields = fields | {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling}
    own = {"qk_norm": parts.qk_norm, "vocab_size": max(fields["vocab_size"], num_tokens)}
    return weights.llm_fields_of(fields, {}, parts.llm) | own


def _vit(parts: Parts, folder: str) -> dict[str, Any]:
    stored = read_json(Path(folder) / "config.json")
    fields = SIGLIP_BASE | stored.get("vision_config", stored)  # the vision tower's, where there are two
    weights.require_values(fields, SIGLIP, folder)
    layers, select = fields["num_hidden_layers"], parts.vit_select_layer
    if not -layers <= select <= -1:
        raise ValueError(f"vit_select_layer {select} must lie between -{layers} and -1 for {folder}")
    return {name: fields[name] for name in SIGLIP_BASE} | {"num_hidden_layers": layers + 2 + select}


def _vae(files: weights.TensorFiles, where: str) -> dict[str, Any]:
    if "encoder.down.0.block.0.conv1.weight" not in files.handles:
        raise ValueError(f"{where} is not FLUX's ae.safetensors in its original layout (not diffusers')")
    return weights.vae_fields_of({}, files.shapes())


def _vit_tensors(files: weights.TensorFiles, layers: int) -> Iterator[tuple[str, tuple[Any, str]]]:
    """By our names, without the text tower, pooling and the layers after the selected one."""
    for stored in files.handles:
        leaf = stored.removeprefix("vision_model.")
        layer = leaf.removeprefix("encoder.layers.").partition(".")[0]
        if not leaf.startswith(VIT_UNUSED) and not (layer.isdecimal() and int(layer) >= layers):
            yield weights.VIT + leaf, (files, stored)


def _sized(config: BagelConfig) -> BagelConfig:
    """With pictures no larger than the position tables."""
    settings = config.settings
    patch = config.vit.patch_size if config.vit else settings.vit_limits.stride
    drawn = min(settings.vae_limits.max_size, config.max_latent_size * config.latent_stride)
    seen = min(settings.vit_limits.max_size, config.vit_max_num_patch_per_side * patch)
    vae = ImageLimits(drawn, drawn // 2, config.latent_stride)
    vit = ImageLimits(seen, min(settings.vit_limits.min_size, seen), patch)
    return replace(config, settings=replace(settings, size=(drawn, drawn), vae_limits=vae, vit_limits=vit))


def _resampled(table: Tensor, side: int) -> Tensor:
    """float[n·n, D] to float[side·side, D], bicubic, as the paper stretches its 384-pixel table to 980."""
    old = math.isqrt(len(table))
    if old == side:
        return table
    grid = table.float().T.reshape(1, -1, old, old)
    return F.interpolate(grid, (side, side), mode="bicubic").flatten(2)[0].T.to(table.dtype)
