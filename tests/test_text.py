"""Writing text: how a token is chosen, when a text ends, and how it is streamed."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openbagel.config import Sampling
from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read, Result
from openbagel.inference.text import Speech, choose, split_thought, write
from openbagel.sequence import Text
from openbagel.tokens import TextCodec
from tests import tiny

WARM = Sampling(temperature=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int = 0, size: int = 20) -> Tensor:
    return torch.randn(size, generator=generator(seed)) * 2


def draws(scores: Tensor, sampling: Sampling, count: int = 300) -> list[int]:
    source = generator()
    return [choose(scores, sampling, source) for _ in range(count)]


# choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), replace(WARM, top_k=1), replace(WARM, top_p=1e-6)]
    + [replace(WARM, temperature=cold) for cold in (1e-3, 2e-20, 1e-40, 1e-320)],
    ids=["greedy", "top-k 1", "top-p tiny", "cold", "colder", "subnormal", "next to nothing"],
)
def test_the_largest_is_chosen(seed: int, sampling: Sampling) -> None:
    scores = logits(seed)
    assert choose(scores, sampling, generator()) == scores.argmax()


def test_top_k_keeps_the_k_largest() -> None:
    scores = logits()
    assert set(draws(scores, replace(WARM, temperature=5.0, top_k=3))) == set(scores.topk(3).indices.tolist())


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p: float) -> None:
    scores = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])]
    kept = {0.3: {1}, 0.6: {1, 3}, 0.9: {0, 1, 3}}[top_p]
    assert set(draws(scores, replace(WARM, top_p=top_p - 1e-3))) == kept


def test_top_p_stops_once_the_mass_is_reached() -> None:
    assert len(set(draws(torch.zeros(2), replace(WARM, top_p=0.5)))) == 1


def test_draws_follow_the_tempered_distribution() -> None:
    scores = logits(size=5)
    counts = torch.bincount(torch.tensor(draws(scores, replace(WARM, temperature=2.0), 4000)), minlength=5)
    torch.testing.assert_close(counts / 4000, (scores / 2).softmax(0), atol=0.03, rtol=0)


def test_draws_depend_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = draws(logits(), WARM, 20)
    torch.manual_seed(2)
    assert draws(logits(), WARM, 20) == first


def test_more_than_all_is_all() -> None:
    assert len(set(draws(logits(size=4), replace(WARM, temperature=9.0, top_k=99, top_p=1.0)))) == 4


# writing ----------------------------------------------------------------------------------------------------


def scripted(ids: Sequence[int], max_tokens: int) -> tuple[tuple[int, ...], list[tuple[int, ...]], str]:
    """Drives `write` with a model that says these ids: (what it returns, what it feeds, what it streams)."""
    context, codec = Context(tiny.config().llm), tiny.codec()
    request = write(context, codec, sampling=Sampling(), max_tokens=max_tokens, generator=generator())
    fed: list[tuple[int, ...]] = []
    streamed, coming = "", iter(ids)
    results: tuple[Result, ...] | None = None
    while True:
        try:
            item = next(request) if results is None else request.send(results)
        except StopIteration as stop:
            return stop.value, fed, streamed
        results = None
        if isinstance(item, events.Text):
            streamed += item.text
        elif isinstance(item, Forward):
            (row,) = item.rows
            (segment,) = row.segments
            assert isinstance(segment, Text)
            assert row.keep and segment.bare
            fed.append(segment.ids)
            wanted = torch.zeros(len(codec))
            if row.read is Read.LOGITS:
                wanted[next(coming)] = 1.0
            results = (Result(wanted),)


def test_writing_ends_at_the_end_marker() -> None:
    c = tiny.codec()
    ids = c.encode("a red circle")
    returned, fed, streamed = scripted([*ids, c.end], 50)
    assert returned == ids
    assert streamed == "a red circle"
    assert [token for part in fed for token in part] == [c.start, *ids, c.end]


def test_writing_ends_at_the_limit_and_closes_the_text() -> None:
    c = tiny.codec()
    ids = c.encode("a red circle above a blue square")
    returned, fed, streamed = scripted(ids, 3)
    assert returned == ids[:3]
    assert streamed == c.decode(ids[:3])
    assert [token for part in fed for token in part] == [c.start, *ids[:3], c.end]


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_empty_text_is_two_markers(max_tokens: int) -> None:
    c = tiny.codec()
    returned, fed, streamed = scripted([c.end], max_tokens)
    assert (returned, streamed) == ((), "")
    assert [token for part in fed for token in part] == [c.start, c.end]


# streaming --------------------------------------------------------------------------------------------------


def said(codec: TextCodec, ids: Sequence[int], thinking: bool) -> tuple[str, str]:
    """(thought, text) as they were streamed."""
    speech = Speech(codec, thinking)
    heard = [event for token in ids for event in speech.say(token)] + list(speech.finish())
    thought = "".join(e.text for e in heard if isinstance(e, events.Thought))
    return thought, "".join(e.text for e in heard if isinstance(e, events.Text))


@given(st.lists(st.integers(0, len(tiny.codec()) - 1), max_size=20))
def test_pieces_of_any_ids_make_the_whole(ids: list[int]) -> None:
    assert said(tiny.codec(), ids, thinking=False) == ("", tiny.codec().decode(ids))


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=8))
def test_characters_are_never_cut(text: str) -> None:
    codec = tiny.codec()
    speech = Speech(codec, thinking=False)
    ids = [codec.tokenizer.token_to_id(c) for c in bytes_as_tokens(text)]
    pieces = [event.text for token in ids for event in speech.say(token) if isinstance(event, events.Text)]
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def bytes_as_tokens(text: str) -> list[str]:
    """One token per byte, in the byte-level alphabet of the tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    return [character for piece, _ in splitter.pre_tokenize_str(text) for character in piece]


THOUGHTS = [
    ("<think>plan</think>answer", "plan", "answer"),
    ("<think></think>answer", "", "answer"),
    ("plan</think>answer", "plan", "answer"),
    ("<think>a < b and a </b> c</think> yes <think>", "a < b and a </b> c", " yes <think>"),
    ("<think>never closed", "never closed", ""),
    ("<think>cut off</thin", "cut off</thin", ""),
    ("<think>a</think>b</think>c", "a", "b</think>c"),
    ("no tags at all", "no tags at all", ""),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "thought", "answer"), THOUGHTS)
def test_thoughts_are_streamed_apart(text: str, thought: str, answer: str) -> None:
    codec = tiny.codec()
    byte_by_byte = [codec.tokenizer.token_to_id(c) for c in bytes_as_tokens(text)]
    for ids in (byte_by_byte, codec.encode(text)):
        assert said(codec, ids, thinking=True) == (thought, answer)


def test_tags_are_text_where_nobody_thinks() -> None:
    codec = tiny.codec()
    text = "<think>plan</think>answer"
    assert said(codec, codec.encode(text), thinking=False) == ("", text)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think> plan </think> answer ", "plan", "answer"),
        ("plan</think>answer", "plan", "answer"),
        ("<think>never closed", "never closed", ""),
        ("no tags", None, "no tags"),
        ("", None, ""),
        ("<think></think>", "", ""),
        ("\n<think>plan</think>\nanswer", "plan", "answer"),
        ("\n<think>never closed", "never closed", ""),
    ],
)
def test_split_thought(text: str, thought: str | None, answer: str) -> None:
    assert split_thought(text) == (thought, answer)
