"""The attention rule and its executions.

The rule in words: a token sees its own sample's past; inside an image split it sees the whole split; a hidden
(noised) split is visible to itself alone. `visible` is the rule; every execution below is tested against it::

                      keys   a  b  c │ noised │ clean  │ d  e         a token row may look at the # columns
      queries    a  b  c     ◣       │        │        │              text: causal
                 noised      ####### │ ###### │        │              sees the text and itself, nobody sees it
                 clean       ####### │        │ ###### │              sees the text and itself
                 d  e        ####### │        │ ###### │ ◣            sees all but the noised copy

Shapes: T tokens of a pack, N query heads, K key-value heads, H head width, S samples, Q tokens of the longest
sample.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openbagel.sequence import PackedSequence, Span

PADDING = 16
"""Samples whose lengths round up to the same multiple of this share a batch in the dense execution."""


class Execution(StrEnum):
    """How attention is computed. SPLITS runs anywhere, trains anywhere and is the only one that reads a KV
    cache.
    """

    SPLITS = "splits"
    DENSE = "dense"
    FLEX = "flex"


class Attend(Protocol):
    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """One layer's attention: rotary positions, mask and cache applied; float[T, N, H], stored order."""
        ...


class Cache(Protocol):
    """The keys and values of a conversation so far, all visible to whatever comes next."""

    def join(self, layer: int, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """The cached keys and values followed by the given ones, [cached + T, K, H]; valid until the next
        call.
        """
        ...

    def __len__(self) -> int: ...


def visible(sequence: PackedSequence, q: Tensor, k: Tensor) -> Tensor:
    """Whether token q may see token k: bool, broadcast over two int64 tensors of stored places."""
    s = sequence
    same = s.split[q] == s.split[k]
    past = (s.order[k] <= s.order[q]) & (~s.hidden[k] | same)
    return (s.sample[q] == s.sample[k]) & (past | (same & s.full[q]))


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin, float32[T, 1, H], for `rotate`."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[:, None, None] * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32; the halves of a head are its two coordinates."""
    half = x_TNH.shape[-1] // 2
    swapped = torch.cat([x_TNH[..., half:], x_TNH[..., :half]], dim=-1)
    return torch.addcmul(x_TNH * cos, swapped, sin)


def attention_for(
    sequence: PackedSequence,
    rotary: tuple[Tensor, Tensor],
    *,
    execution: Execution = Execution.SPLITS,
    caches: Sequence[Cache] | None = None,
) -> Attend:
    """The chosen execution, prepared once per forward. caches (one a sample) need SPLITS."""
    assert caches is None or execution is Execution.SPLITS, "only the per-split execution reads a cache"
    match execution:
        case Execution.SPLITS:
            return SplitAttention(sequence, rotary, caches)
        case Execution.DENSE:
            return DenseAttention(sequence, rotary)
        case Execution.FLEX:
            return FlexAttention(sequence, rotary)


def _sdpa(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention over one run of tokens, or over a batch of runs [S, Q, …] with a mask."""
    q, k, v = (t.transpose(-3, -2) for t in (q_TNH, k_TKH, v_TKH))
    if q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa).transpose(1, 2)
    return out[0] if q_TNH.dim() == 3 else out


class SplitAttention:
    """Each split attends to its visible prefix and itself with plain or causal attention: no mask, no wasted
    pairs.
    """

    def __init__(
        self, sequence: PackedSequence, rotary: tuple[Tensor, Tensor], caches: Sequence[Cache] | None = None
    ) -> None:
        order = sequence.attention_order
        inverse = None if order is None else torch.argsort(order)
        self.tables = {rotary[0].device: (*rotary, order, inverse)}
        self.samples = sequence.spans
        self.lengths = sequence.lengths
        self.caches = caches

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        cos, sin, order, inverse = self._tables_on(q_TNH.device)
        q, k = (rotate(t, cos, sin).to(v_TKH.dtype) for t in (q_TNH, k_TKH))
        v = v_TKH
        if order is not None:
            q, k, v = (t.index_select(0, order) for t in (q, k, v))
        outputs: list[Tensor] = []
        # split, not sliced: the gradient of a slice of the pack is a tensor as long as the pack
        parts = zip(*(t.split(self.lengths) for t in (q, k, v)), strict=True)
        for index, (spans, qkv) in enumerate(zip(self.samples, parts, strict=True)):
            outputs += self._sample(layer, index, spans, qkv)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out if inverse is None else out.index_select(0, inverse)

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """cos, sin, the order and its inverse on a layer's device; copied once a forward for each device."""
        if device not in self.tables:
            cos, sin, order, inverse = next(iter(self.tables.values()))
            moved = [None if table is None else table.to(device) for table in (order, inverse)]
            self.tables[device] = (cos.to(device), sin.to(device), moved[0], moved[1])
        return self.tables[device]

    def _sample(
        self, layer: int, index: int, spans: tuple[Span, ...], qkv: tuple[Tensor, Tensor, Tensor]
    ) -> list[Tensor]:
        """One sample's outputs in attention order; its keys are [cached | visible splits | hidden splits]."""
        if not spans:
            return []
        q, k, v = qkv
        stored = sorted(spans, key=lambda span: span.start)
        base, cached = stored[0].start, 0
        queries = q.split([span.length for span in stored])
        query_of = {span.start: query for span, query in zip(stored, queries, strict=True)}
        if self.caches is not None:
            cached = len(self.caches[index])
            k, v = self.caches[index].join(layer, k, v)
        outputs: dict[int, Tensor] = {}
        prefix = cached
        for span in spans:
            start = cached + span.start - base
            end = start + span.length
            if not span.hidden or start == prefix:
                keys, values = k[:end], v[:end]
            else:
                keys, values = torch.cat([k[:prefix], k[start:end]]), torch.cat([v[:prefix], v[start:end]])
            outputs[span.start] = _span_attention(query_of[span.start], keys, values, span.causal)
            prefix = prefix if span.hidden else end
        return [outputs[start] for start in sorted(outputs)]


def _span_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, causal: bool) -> Tensor:
    num_q, num_k = len(q_TNH), len(k_TKH)
    if not causal or num_q == 1:
        return _sdpa(q_TNH, k_TKH, v_TKH)
    if num_q == num_k:
        return _sdpa(q_TNH, k_TKH, v_TKH, causal=True)
    mask = torch.ones(num_q, num_k, dtype=torch.bool, device=q_TNH.device).tril(num_k - num_q)
    return _sdpa(q_TNH, k_TKH, v_TKH, mask)


class DenseAttention:
    """One mask per sample; samples of similar length form a padded batch. Quickest for many short samples."""

    def __init__(self, sequence: PackedSequence, rotary: tuple[Tensor, Tensor]) -> None:
        self.rotary = rotary
        device = sequence.position_ids.device
        by_sample = torch.argsort(sequence.sample, stable=True).split(sequence.lengths)
        rounded: dict[int, list[Tensor]] = {}
        for places in by_sample:
            rounded.setdefault(-(-len(places) // PADDING), []).append(places)
        self.batches = [_dense_batch(sequence, samples) for samples in rounded.values()]
        kept = torch.cat([index[inside] for index, inside, _ in self.batches])
        positions = torch.cat([inside.flatten() for _, inside, _ in self.batches]).nonzero().flatten()
        self.back = torch.empty(len(sequence), dtype=torch.int64, device=device)
        self.back[kept] = positions

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        q, k = (rotate(t, *self.rotary).to(v_TKH.dtype) for t in (q_TNH, k_TKH))
        outputs = []
        for index, _, mask in self.batches:
            q_SQNH, k_SQKH, v_SQKH = (
                t.index_select(0, index.flatten()).unflatten(0, index.shape) for t in (q, k, v_TKH)
            )
            outputs.append(_sdpa(q_SQNH, k_SQKH, v_SQKH, mask).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.back)


def _dense_batch(sequence: PackedSequence, samples: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Stored places [S, Q], which of them are no padding [S, Q], and the mask [S, 1, Q, Q]."""
    places = pad_sequence(samples, batch_first=True, padding_value=-1)
    inside = places >= 0
    places = places.clamp(min=0)
    seen = visible(sequence, places[:, :, None], places[:, None, :]) & inside[:, None, :]
    return places, inside, (seen | ~inside[:, :, None])[:, None]


class FlexAttention:
    """FlexAttention with a block mask from the rule; compiled on CUDA. On a CPU it has no backward (torch
    2.13).
    """

    def __init__(self, sequence: PackedSequence, rotary: tuple[Tensor, Tensor]) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.rotary = rotary
        tokens, device = len(sequence), sequence.position_ids.device

        def rule(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return visible(sequence, q, k)

        self.mask = create_block_mask(rule, None, None, tokens, tokens, device=str(device))
        self.run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        q, k = (rotate(t, *self.rotary).to(v_TKH.dtype) for t in (q_TNH, k_TKH))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v_TKH))
        gqa = q.shape[1] != k.shape[1]
        out = self.run(q, k, v, block_mask=self.mask, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)
