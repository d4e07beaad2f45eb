"""The SigLIP encoder at native resolution: pictures packed one after another, each attending to itself alone.

Its last stored layer is not built; the final norm is applied. Source: paper §2.2, reference/siglip_navit.py.

Shapes: V patches of a pack, P values of a patch, D width, N heads, H head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.config import BagelConfig, ViTConfig
from openbagel.model.transformer import empty_embedding


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_VD: Tensor, counts: Sequence[int]) -> Tensor:
        heads = (x_VD.shape[0], self.num_heads, -1)
        q, k, v = (proj(x_VD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if len(set(counts)) == 1:  # pictures of one size: a batch
            shape = (len(counts), counts[0])
            q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.out_proj(out.reshape_as(x_VD))
        pictures = zip(*(t.transpose(0, 1)[None].split(list(counts), dim=2) for t in (q, k, v)), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in pictures], dim=2)
        return self.out_proj(out[0].transpose(0, 1).reshape_as(x_VD))


class MLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_VD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_VD), approximate="tanh"))


class EncoderLayer(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x_VD: Tensor, counts: Sequence[int]) -> Tensor:
        x_VD = x_VD + self.self_attn(self.layer_norm1(x_VD), counts)
        return x_VD + self.mlp(self.layer_norm2(x_VD))


class Embeddings(nn.Module):
    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = empty_embedding(side**2, config.hidden_size)

    def forward(self, patches_VP: Tensor, position_ids_V: Tensor) -> Tensor:
        embedded = self.patch_embedding(patches_VP.to(self.patch_embedding.weight.dtype))
        return embedded + self.position_embedding(position_ids_V)


class Encoder(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_used_layers))


class VisionTransformer(nn.Module):
    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, side)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)

    def forward(self, patches_VP: Tensor, position_ids_V: Tensor, counts: Sequence[int]) -> Tensor:
        """float[V, P] patches of pictures with `counts` patches each to float[V, D] features."""
        x_VD = self.embeddings(patches_VP, position_ids_V)
        for layer in self.encoder.layers:
            x_VD = layer(x_VD, counts)
        return self.post_layernorm(x_VD)


class VisionModel(nn.Module):
    """The wrapper that gives the official names their `vision_model.` part."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        assert config.vit is not None
        self.vision_model = VisionTransformer(config.vit, config.vit_max_num_patch_per_side)

    def forward(self, patches_VP: Tensor, position_ids_V: Tensor, counts: Sequence[int]) -> Tensor:
        return self.vision_model(patches_VP, position_ids_V, counts)
