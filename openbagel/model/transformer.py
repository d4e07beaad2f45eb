"""The decoder: two experts per block, one attention.

A block owns its modules under the official names; an `Expert` gathers those of one side. `Route` sends each
token through the expert that owns it. Source: paper §2.2, §2.4, reference/qwen2_navit.py.

Shapes: T tokens, D width, N query heads, K key-value heads, H head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.attention import Attend
from openbagel.config import Experts, LLMConfig

GEN = "_moe_gen"
"""Suffix of the generation expert's modules in the official names."""

E = TypeVar("E")
Out = TypeVar("Out", Tensor, tuple[Tensor, Tensor, Tensor])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Projections(nn.Module):
    """The attention's weights, of one expert or of both."""

    def __init__(self, config: LLMConfig, suffixes: tuple[str, ...]) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        kv = config.num_key_value_heads * head
        for suffix in suffixes:
            self.add_module("q_proj" + suffix, nn.Linear(width, config.num_attention_heads * head))
            self.add_module("k_proj" + suffix, nn.Linear(width, kv))
            self.add_module("v_proj" + suffix, nn.Linear(width, kv))
            self.add_module(
                "o_proj" + suffix, nn.Linear(config.num_attention_heads * head, width, bias=False)
            )
            for name in ("q_norm", "k_norm") if config.qk_norm else ():
                self.add_module(name + suffix, RMSNorm(head, config.rms_norm_eps))


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One side of a block: references to modules that the block owns."""

    input_norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o_proj: nn.Module
    output_norm: nn.Module
    mlp: nn.Module
    head_dim: int

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries float[T, N, H], keys and values float[T, K, H], before rotary positions."""
        x_TD = self.input_norm(x_TD)
        q, k, v = (
            proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q) if self.q_norm else q, self.k_norm(k) if self.k_norm else k, v

    def output(self, x_TNH: Tensor) -> Tensor:
        return self.o_proj(x_TNH.flatten(1))

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        return self.mlp(self.output_norm(x_TD))


@dataclass(frozen=True, slots=True)
class Route:
    """Who owns which token: the first num_und belong to the understanding expert, the rest to the generation
    expert.

    freeze_und computes the understanding side without gradients, so that only the generation side learns.
    """

    num_und: int
    freeze_und: bool = False

    def __call__(self, experts: tuple[E, E], function: Callable[[E, Tensor], Out], x: Tensor) -> Out:
        und, gen = experts
        if und is gen:
            return function(und, x)
        parts: list[Out] = []
        if self.num_und:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_und):
                parts.append(function(und, x[: self.num_und]))
        if self.num_und < len(x):
            parts.append(function(gen, x[self.num_und :]))
        return parts[0] if len(parts) == 1 else _joined(*parts)


def _joined(und: Out, gen: Out) -> Out:
    if isinstance(und, Tensor) and isinstance(gen, Tensor):
        return torch.cat([und, gen])
    return tuple(torch.cat(pair) for pair in zip(und, gen, strict=True))  # pyright: ignore


class Block(nn.Module):
    def __init__(self, config: LLMConfig, experts: Experts) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_suffixes = ("", GEN) if experts is Experts.MOT else ("",)
        self.mlp_suffixes = ("",) if experts is Experts.DENSE else ("", GEN)
        self.self_attn = Projections(config, self.attention_suffixes)
        for suffix in self.attention_suffixes:
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(name + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))
        for suffix in self.mlp_suffixes:
            self.add_module("mlp" + suffix, MLP(config))

    @property
    def experts(self) -> tuple[Expert, Expert]:
        """Both sides; one and the same in the dense variant. Read anew, so that modules may be replaced from
        outside.
        """
        und = self._expert("", "")
        if len(self.mlp_suffixes) == 1:
            return und, und
        return und, self._expert(self.attention_suffixes[-1], GEN)

    def _expert(self, suffix: str, mlp_suffix: str) -> Expert:
        own, attention = self._modules, self.self_attn._modules
        return Expert(
            input_norm=own["input_layernorm" + suffix],  # pyright: ignore[reportArgumentType]
            output_norm=own["post_attention_layernorm" + suffix],  # pyright: ignore[reportArgumentType]
            mlp=own["mlp" + mlp_suffix],  # pyright: ignore[reportArgumentType]
            q_norm=attention.get("q_norm" + suffix),
            k_norm=attention.get("k_norm" + suffix),
            head_dim=self.head_dim,
            **{name: attention[name + suffix] for name in ("q_proj", "k_proj", "v_proj", "o_proj")},  # pyright: ignore
        )

    def forward(
        self, x_TD: Tensor, route: Route, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        experts = self.experts
        q_TNH, k_TKH, v_TKH = route(experts, Expert.project, x_TD)
        x_TD = x_TD + route(experts, Expert.output, attend(q_TNH, k_TKH, v_TKH))
        return x_TD + route(experts, Expert.feed_forward, x_TD)


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """Without initial values: to draw them on the meta device torch imports its compiler, for a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Decoder(nn.Module):
    def __init__(self, config: LLMConfig, experts: Experts) -> None:
        super().__init__()
        self.embed_tokens = empty_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, experts) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if experts is not Experts.DENSE:
            self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.norm, self._modules.get("norm_moe_gen") or self.norm

    def forward(self, x_TD: Tensor, route: Route, attend: Attend) -> Tensor:
        """Hidden states float[T, D] of the last block, before the final norm."""
        for index, block in enumerate(self.layers):
            x_TD = block(x_TD, route, partial(attend, index))
        return x_TD


class LanguageModel(nn.Module):
    """The wrapper that gives the official names their `language_model.` part."""

    def __init__(self, config: LLMConfig, experts: Experts) -> None:
        super().__init__()
        self.model = Decoder(config, experts)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
