"""The whole model: segments in, hidden states, logits, velocities and losses out. One forward for everything.

Shapes: T tokens of a pack, U and G of them owned by the understanding and the generation expert, D width; V
patches; C channels of a latent token; L labels; M latent tokens with a target.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.attention import Cache, Execution, attention_for, rotary_tables
from openbagel.config import BagelConfig
from openbagel.images import sincos_table
from openbagel.model.transformer import LanguageModel, RMSNorm, Route
from openbagel.model.vit import VisionModel
from openbagel.sequence import PackedSequence

TIME_CHANNELS = 256


class TimestepEmbedder(nn.Module):
    """Times in [0, 1], not scaled, to float[frames, D]; the sinusoids are [cos | sin] with periods up to
    10,000.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        half = TIME_CHANNELS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=times.device) / half
        angles = times.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """A frozen 2-D sin-cos table, kept in the checkpoint: float[side·side, D]."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(self.side, self.pos_embed.shape[1]))

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.pos_embed[position_ids]


class Connector(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inner, outer)
        self.fc2 = nn.Linear(outer, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class BagelModel(nn.Module):
    """The transformer with its encoders and heads; the autoencoder stands apart (`model/vae.py`).

    Modules carry the official names, so that a state dict is a checkpoint. Parts that the configuration
    leaves out (no ViT, no VAE) are not built.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.language_model = LanguageModel(config.llm, config.layer_module)
        if config.vit:
            side = config.vit_max_num_patch_per_side
            self.vit_model = VisionModel(config)
            self.connector = Connector(config.vit.hidden_size, width)
            self.vit_pos_embed = PositionTable(side, width)
        if config.vae:
            self.time_embedder = TimestepEmbedder(width)
            self.vae2llm = nn.Linear(config.latent_channels, width)
            self.llm2vae = nn.Linear(width, config.latent_channels)
            self.latent_pos_embed = PositionTable(config.max_latent_size, width)

    def forward(
        self,
        sequence: PackedSequence,
        *,
        execution: Execution = Execution.SPLITS,
        caches: Sequence[Cache] | None = None,
        freeze_und: bool = False,
    ) -> Tensor:
        """Hidden states float[T, D] in stored order, before the final norm.

        caches: one conversation per sample whose past its tokens see; they are read and filled, nothing else
        changes.
        """
        llm = self.config.llm
        rotary = rotary_tables(sequence.position_ids, llm.head_dim, llm.rope_theta)
        attend = attention_for(sequence, rotary, execution=execution, caches=caches)
        route = Route(sequence.num_und, freeze_und)
        return self.language_model.model(self.embed(sequence), route, attend)

    def embed(self, sequence: PackedSequence) -> Tensor:
        """Token embeddings float[T, D], stored order."""
        x_UD = self.language_model.model.embed_tokens(sequence.text_ids)
        if len(sequence.patches):
            x_VD = self.look(sequence)
            x_UD = x_UD.new_empty(sequence.num_und, x_UD.shape[1]).index_copy(0, sequence.text_places, x_UD)
            x_UD = x_UD.index_copy(0, sequence.patch_places, x_VD.to(x_UD.dtype))
        if not len(sequence.latents):
            return x_UD
        return torch.cat([x_UD, self.embed_latents(sequence)])

    def look(self, sequence: PackedSequence) -> Tensor:
        """What the model sees of its pictures: float[V, D], ViT, connector and 2-D positions."""
        ids = sequence.patch_position_ids
        features = self.vit_model(sequence.patches, ids, sequence.patch_counts)
        return self.connector(features) + self.vit_pos_embed(ids)

    def embed_latents(self, sequence: PackedSequence) -> Tensor:
        """float[G, D]: projected latents, the time of their frame and their 2-D position."""
        x_GD = self.vae2llm(sequence.latents.to(self.vae2llm.weight.dtype))
        time = self.time_embedder(sequence.times)
        if len(time) > 1:
            time = time[sequence.latent_frames]
        return x_GD + time + self.latent_pos_embed(sequence.latent_position_ids)

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """float[L, vocabulary] of hidden states of understanding tokens."""
        return self.language_model.lm_head(self.language_model.model.norms[0](hidden_LD))

    def velocity(self, hidden_MD: Tensor) -> Tensor:
        """float[M, C] of hidden states of latent tokens."""
        return self.llm2vae(self.language_model.model.norms[1](hidden_MD))

    def losses(
        self, sequence: PackedSequence, *, execution: Execution = Execution.SPLITS, freeze_und: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Unreduced losses: cross-entropy float32[L] per label, squared velocity error float32[M, C] per
        latent token.
        """
        hidden_TD = self(sequence, execution=execution, freeze_und=freeze_und)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_und):
            labelled_LD = self.language_model.model.norms[0](hidden_TD[sequence.label_places])
        logits = self.language_model.lm_head(labelled_LD)
        ce = F.cross_entropy(logits.float(), sequence.labels, reduction="none")
        if not len(sequence.targets):
            return ce, sequence.targets
        velocity = self.velocity(hidden_TD[sequence.num_und + sequence.target_places])
        return ce, (velocity.float() - sequence.targets).square()

    def initialise(self, generator: torch.Generator) -> None:
        """Random weights for training from nothing: both experts alike, `llm2vae` zero, norms one.

        Matrices are normal with variance 1 / inputs, those that write into the residual stream smaller by
        √(2·layers). The ViT's positions are as large as its patches, else it sees them as a set for long.
        """
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, PositionTable):
                    module.reset_parameters()
                elif isinstance(module, nn.Embedding):
                    module.weight.normal_(0, 1 if "position" in name else 0.02, generator=generator)
                elif isinstance(module, nn.Linear):
                    self._initialise_linear(name, module, generator)
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
                elif isinstance(module, RMSNorm):
                    module.weight.fill_(1)
            self.copy_understanding_expert()
            if self.config.vae:
                self.llm2vae.weight.zero_()

    def _initialise_linear(self, name: str, linear: nn.Linear, generator: torch.Generator) -> None:
        std = linear.in_features**-0.5
        if name.endswith(("o_proj", "o_proj_moe_gen", "down_proj", "out_proj", "fc2")):
            std /= math.sqrt(2 * self.config.llm.num_hidden_layers)
        linear.weight.normal_(0, std, generator=generator)
        if linear.bias is not None:
            linear.bias.zero_()

    def copy_understanding_expert(self) -> None:
        """Gives the generation expert the understanding expert's weights."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if "_moe_gen" in name:
                    parameter.copy_(parameters[name.replace("_moe_gen", "")])
