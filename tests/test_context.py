"""The KV cache against the uncached forward: whatever is said, forked, trimmed and looked at."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Read, Row
from openbagel.sequence import Segment, Text, VaeImage
from tests import tiny


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the storages that operators create."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {t.untyped_storage()._cdata: t for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.bytes += sum(t.untyped_storage().nbytes() for key, t in made.items() if key not in known)
        self.calls += 1
        return out


@dataclass(slots=True, eq=False)
class Talk:
    """A context and what was said in it, to be said again without a cache."""

    context: Context
    said: list[Segment] = field(default_factory=list)
    marks: list[tuple[int, int, int]] = field(default_factory=list)
    """(segments, length, position) before each addition: where it can be trimmed to."""


@dataclass(frozen=True, slots=True)
class Turn:
    talk: Talk
    segments: list[Segment]
    keep: bool = True


def new_talk() -> Talk:
    return Talk(Context(tiny.config().llm))


def twin_of(talk: Talk) -> Talk:
    return Talk(talk.context.fork(), list(talk.said), list(talk.marks))


def stays(segment: Segment) -> bool:
    return not (isinstance(segment, VaeImage) and segment.hidden)


@torch.inference_mode()
def cached(turns: list[Turn]) -> list[Tensor]:
    """Hidden states of the new tokens of each turn, all turns packed into one forward."""
    contexts = [turn.talk.context for turn in turns]
    pack = tiny.packer().pack([turn.segments for turn in turns], [c.position for c in contexts])
    for turn, tokens in zip(turns, pack.lengths, strict=True):
        turn.talk.context.prepare(tokens, keep=turn.keep)
    hidden = tiny.in_order(pack, tiny.model()(pack, caches=contexts)).split(list(pack.lengths))
    for turn, spans, position in zip(turns, pack.spans, pack.next_positions, strict=True):
        if turn.keep:
            talk = turn.talk
            talk.marks.append((len(talk.said), talk.context.length, talk.context.position))
            talk.context.commit(sum(span.length for span in spans if not span.hidden), position)
            talk.said += [segment for segment in turn.segments if stays(segment)]
    return list(hidden)


@torch.inference_mode()
def uncached(said: list[Segment], new: list[Segment]) -> Tensor:
    """The same hidden states, all that was said before being said again."""
    pack = tiny.packer().pack([[*said, *new]])
    before = sum(tiny.packer().pack([said]).lengths)
    return tiny.in_order(pack, tiny.model()(pack))[before:]


def check(turns: list[Turn]) -> None:
    expected = [uncached(turn.talk.said, turn.segments) for turn in turns]
    for ours, plain in zip(cached(turns), expected, strict=True):
        assert torch.linalg.vector_norm(ours - plain) <= 1e-5 * torch.linalg.vector_norm(plain)


def pieces(rng: random.Random, sample: list[Segment]) -> Iterator[list[Segment]]:
    """A sample cut into forwards at random, also inside texts."""
    chunk: list[Segment] = []
    for segment in sample:
        parts: list[Segment] = [segment]
        if isinstance(segment, Text) and rng.random() < 0.5:
            framed = tiny.packer().pack([[segment]]).text_ids.tolist()
            parts = [Text((token,), bare=True) for token in framed]
        for part in parts:
            chunk.append(part)
            if rng.random() < 0.5:
                yield chunk
                chunk = []
    yield [*chunk, Text((1,), bare=True)]


def has_tokens(segments: list[Segment]) -> bool:
    return bool(sum(tiny.packer().pack([segments]).lengths))


@pytest.mark.parametrize("seed", range(24))
def test_any_cut_equals_the_uncached_forward(seed: int) -> None:
    rng, talk = random.Random(seed), new_talk()
    for chunk in pieces(rng, tiny.segments(rng, 8)):
        if has_tokens(chunk):
            check([Turn(talk, chunk)])


@pytest.mark.parametrize("seed", range(40))
def test_any_history_equals_the_uncached_forward(seed: int) -> None:
    """Talks are extended (some together), forked, trimmed, looked at and dropped at random."""
    rng = random.Random(seed)
    talks = [new_talk()]
    for _ in range(25):
        match rng.choice(("say", "say", "say together", "say together", "fork", "trim", "drop", "reserve")):
            case "say":
                check([Turn(rng.choice(talks), some_segments(rng), keep=rng.random() < 0.7)])
            case "say together":
                chosen = rng.sample(talks, rng.randint(1, len(talks)))
                check([Turn(talk, some_segments(rng), keep=rng.random() < 0.7) for talk in chosen])
            case "fork":
                talks.append(twin_of(rng.choice(talks)))
            case "trim":
                trim(rng, rng.choice(talks))
            case "drop" if len(talks) > 1:
                talks.pop(rng.randrange(len(talks)))
            case "reserve":
                rng.choice(talks).context.reserve(rng.randint(1, 40))


def some_segments(rng: random.Random) -> list[Segment]:
    return [*tiny.segments(rng, rng.randint(0, 2)), Text((rng.randrange(9),), bare=rng.random() < 0.5)]


def trim(rng: random.Random, talk: Talk) -> None:
    if talk.marks:
        keep = rng.randrange(len(talk.marks))
        said, length, position = talk.marks[keep]
        talk.context.trim(length, position)
        talk.said, talk.marks = talk.said[:said], talk.marks[:keep]


WORDS = Text((5, 6, 7))


def test_twins_that_grow_in_one_forward_do_not_meet() -> None:
    talk = new_talk()
    check([Turn(talk, [WORDS])])
    talk.context.reserve(100)
    check([Turn(talk, [WORDS])])  # the storage now has room at its end, which only one twin may take
    twins = [talk, twin_of(talk), twin_of(talk)]
    check([Turn(twin, [Text((i, i))]) for i, twin in enumerate(twins)])
    check([Turn(twin, [WORDS]) for twin in reversed(twins)])


def test_fork_allocates_nothing_and_shares_lineage() -> None:
    talk = new_talk()
    check([Turn(talk, [WORDS])])
    with Allocations() as counted:
        twin = talk.context.fork()
    assert (counted.calls, counted.bytes) == (0, 0)
    assert twin.lineage == talk.context.lineage
    assert (len(twin), twin.position) == (5, 5)
    cached([Turn(talk, [WORDS])])
    assert twin.lineage != talk.context.lineage
    assert (len(twin), len(talk.context)) == (5, 10)


def test_empty_contexts_are_alike() -> None:
    llm = tiny.config().llm
    assert Context(llm).lineage == Context(llm).lineage


def test_looking_leaves_no_trace() -> None:
    talk = new_talk()
    check([Turn(talk, [WORDS])])
    before = (len(talk.context), talk.context.position, talk.context.lineage)
    check([Turn(talk, tiny.segments(random.Random(0), 1, ("noised",)), keep=False)])
    assert (len(talk.context), talk.context.position, talk.context.lineage) == before


@pytest.mark.parametrize("length", [-1, 6])
def test_impossible_trims_are_refused(length: int) -> None:
    talk = new_talk()
    cached([Turn(talk, [WORDS])])
    with pytest.raises(ValueError, match=f"context of 5 tokens to {length}"):
        talk.context.trim(length, 0)


@contextmanager
def one_decoding_step(past: int) -> Iterator[Allocations]:
    """What one decoded token allocates after a past of so many tokens."""
    engine, context = Engine(tiny.model(), tiny.packer()), Context(tiny.config().llm)
    context.reserve(past + 8)
    engine.step([Forward((Row(context, (Text((3,) * past, bare=True),), keep=True),))])
    step = Forward((Row(context, (Text((4,), bare=True),), keep=True, read=Read.LOGITS),))
    engine.step([step])
    with Allocations() as counted:
        engine.step([step])
    yield counted


def test_bytes_per_token_do_not_grow_with_the_context() -> None:
    with one_decoding_step(16) as short, one_decoding_step(512) as long:
        assert short.bytes > 0
        assert (long.bytes, long.calls) == (short.bytes, short.calls)


def test_hidden_segments_are_seen_once() -> None:
    """A kept forward with a noised split in its middle leaves the split out of the context."""
    talk, rng = new_talk(), random.Random(2)
    noised, clean, words = (s for kind in ("noised", "clean", "text") for s in tiny.segments(rng, 1, (kind,)))
    check([Turn(talk, [WORDS, noised, clean, words])])
    assert talk.said == [WORDS, clean, words]
    assert len(talk.context) == sum(tiny.packer().pack([talk.said]).lengths)
    check([Turn(talk, [replace(WORDS, bare=True)])])
