"""Every execution of the attention rule against softmax over a mask, written out plainly."""

import pytest
import torch
from torch import Tensor

from openbagel.attention import Execution, attention_for, rotary_tables, rotate, visible
from openbagel.sequence import PackedSequence, Segment, Text, VitImage
from tests import tiny

SEEDS = range(20)
HEADS, KV_HEADS, WIDTH, THETA = 4, 2, 16, 1e4


def split_lengths(sample: list[Segment]) -> list[tuple[int, str]]:
    """(tokens, attention mode) of each split that has tokens."""
    lengths = []
    for segment in sample:
        if isinstance(segment, Text):
            lengths.append((len(segment.ids) + (0 if segment.bare else 2), "causal"))
        elif isinstance(segment, VitImage):
            if segment.pixels is not None:
                patches = segment.pixels[0].numel() // tiny.VIT.patch_size**2
                lengths.append((patches + 2, "full"))
        elif segment.frames:
            mode = "noise" if segment.hidden else "full"
            lengths.append((sum(len(frame.tokens) + 2 for frame in segment.frames), mode))
    return lengths


def published_rule(samples: list[list[Segment]]) -> Tensor:
    """The rule of the reference over the plain concatenation of all samples: queries by rows."""
    splits = [(i, *split) for i, sample in enumerate(samples) for split in split_lengths(sample)]
    counts = torch.tensor([tokens for _, tokens, _ in splits])
    sample, split, full, noise = (
        torch.tensor(column).repeat_interleave(counts)
        for column in (
            [i for i, _, _ in splits],
            list(range(len(splits))),
            [mode != "causal" for _, _, mode in splits],
            [mode == "noise" for _, _, mode in splits],
        )
    )
    place = torch.arange(len(sample))
    same_split = split[:, None] == split
    earlier_or_same_image = (place[:, None] >= place) | (same_split & full)
    return (sample[:, None] == sample) & earlier_or_same_image & ~(noise & ~same_split)


def turned(x_TNH: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary positions as complex multiplication."""
    half = x_TNH.shape[-1] // 2
    frequencies = THETA ** -(torch.arange(half) / half)
    turn = torch.polar(torch.ones(len(x_TNH), 1, half), position_ids[:, None, None] * frequencies)
    z = torch.complex(x_TNH[..., :half].contiguous(), x_TNH[..., half:].contiguous()) * turn
    return torch.cat([z.real, z.imag], dim=-1)


def plain_attention(pack: PackedSequence, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over a mask of the whole pack."""
    places = torch.arange(len(pack))
    mask = visible(pack, places[:, None], places)
    group = q.shape[1] // k.shape[1]
    k, v = turned(k, pack.position_ids).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qnh,knh->nqk", turned(q, pack.position_ids), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("nqk,knh->qnh", weights, v)


def random_qkv(pack: PackedSequence, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(pack))
    shapes = [(len(pack), heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def attend(pack: PackedSequence, qkv: list[Tensor], execution: Execution) -> Tensor:
    rotary = rotary_tables(pack.position_ids, WIDTH, THETA)
    return attention_for(pack, rotary, execution=execution)(0, *qkv)


@pytest.mark.parametrize("seed", SEEDS)
def test_rule_is_the_published_one(seed: int) -> None:
    samples = tiny.samples(seed)
    pack = tiny.packer().pack(samples)
    places = torch.argsort(pack.logical)
    assert torch.equal(visible(pack, places[:, None], places), published_rule(samples))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("execution", Execution)
@pytest.mark.parametrize("seed", SEEDS)
def test_executions_follow_the_rule(seed: int, execution: Execution) -> None:
    pack = tiny.packer().pack(tiny.samples(seed))
    qkv = [x.detach() for x in random_qkv(pack, HEADS if seed % 3 == 0 else KV_HEADS)]
    expected = plain_attention(pack, *qkv)
    torch.testing.assert_close(attend(pack, qkv, execution), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", [Execution.SPLITS, Execution.DENSE])
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_follow_the_rule(seed: int, execution: Execution) -> None:
    pack = tiny.packer().pack(tiny.samples(seed))
    qkv = random_qkv(pack, KV_HEADS)
    weights = torch.randn(len(pack), HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))
    ours = torch.autograd.grad((attend(pack, qkv, execution) * weights).sum(), qkv)
    plain = torch.autograd.grad((plain_attention(pack, *qkv) * weights).sum(), qkv)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_rotation_depends_on_distance_alone() -> None:
    x = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    products = []
    for shift in (0, 17):
        tables = rotary_tables(torch.tensor([3, 8]) + shift, WIDTH, THETA)
        q, k = rotate(x, *tables)
        products.append((q * k).sum())
    torch.testing.assert_close(*products)


def test_rotation_is_computed_in_float32() -> None:
    tables = rotary_tables(torch.tensor([5]), WIDTH, THETA)
    assert rotate(torch.ones(1, 1, WIDTH, dtype=torch.bfloat16), *tables).dtype is torch.float32
