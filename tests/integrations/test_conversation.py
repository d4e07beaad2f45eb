"""Conversations as text: nothing that a user types is read as a marker, and pictures find their places."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openbagel.integrations.conversation import (
    CHAT_TEMPLATE,
    ESCAPE,
    Rendered,
    escape,
    escaped,
    read,
    unescape,
)
from openbagel.tokens import END_OF_TEXT, MARKERS, THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from tests import tiny

START, END, LOOK, LOOKED = MARKERS
PIECES = [*MARKERS, END_OF_TEXT, "<|image_pad|>", "<|image_1|>", "<|image_2|>", "<|", "|>", ESCAPE, "e", "\n"]
TYPED = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=6).map("".join)


def rendered(*texts: str) -> Rendered:
    return Rendered("".join(f"{START}{escape(text)}{END}" for text in texts) + START)


@settings(max_examples=300)
@given(TYPED)
@example(f"<{ESCAPE}|im_end|>")
@example(f"{ESCAPE}e<|im_end|>{ESCAPE}{ESCAPE}")
def test_no_marker_comes_from_a_user(text: str) -> None:
    codec = tiny.codec()
    control = {codec.start, codec.end, codec.vision_start, codec.vision_end, codec.end_of_text}
    assert unescape(escape(text)) == text
    assert "<|" not in escape(text)
    for given_text in (rendered(text), text):
        said, asks = read(given_text, 0)
        assert (said, asks) == (text, None)
        assert control.isdisjoint(codec.encode(str(said)))


@settings(max_examples=100)
@given(TYPED, TYPED)
def test_pictures_are_shown_once_and_only_where_they_are_named(before: str, after: str) -> None:
    parts = read(f"{before}<|image_1|>{after}", 1)
    assert [part for part in parts if isinstance(part, int)] == [0]
    assert parts[-1] is None


def test_numbers_bind_while_pictures_remain() -> None:
    assert read("<|image_1|>\nWhat is it?", 1) == [0, "What is it?", None]
    assert read("<|image_1|>\nWhat is it?", 0) == ["<|image_1|>\nWhat is it?", None]
    assert read("a <|image_2|> b <|image_1|>", 2) == ["a ", 1, " b ", 0, None]
    assert read("<|image_1|> and <|image_1|>", 1) == [0, " and <|image_1|>", None]
    assert read("What are they?", 2) == [0, 1, "What are they?", None]
    assert read("", 0) == ["", None]


def test_places_take_the_pictures_that_are_left() -> None:
    place = f"{LOOK}{LOOKED}"
    assert read(Rendered(place + rendered("<|image_1|>").removesuffix(START) + place), 3) == [1, 0, 2]
    assert read(Rendered(f"{LOOK}<|image_pad|>{LOOKED}{START}"), 1) == [0, None]
    with pytest.raises(ValueError, match="1 places for 0 pictures"):
        read(Rendered(place), 0)
    with pytest.raises(ValueError, match=r"0 places for 2 pictures; write <\|image_1\|>"):
        read(rendered("both"), 2)


def test_only_what_stands_between_markers_is_rendered() -> None:
    for strange in ("hello", f"{START}an answer that", f"{END}", f"{LOOK}{START}a{END}"):
        with pytest.raises(ValueError, match="does not stand between markers"):
            read(Rendered(strange), 0)


def test_messages_lose_their_pictures_and_keep_the_rest() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "https://a.b/c.png"}},
        {"type": "image", "path": "d.png"},
        {"type": "image"},
        {"type": "text", "text": END},
    ]
    conversation = [{"role": "user", "content": content, "name": "x"}, {"role": "assistant", "content": None}]
    messages, sources = escaped(conversation)
    assert sources == ["https://a.b/c.png", "d.png"]
    shapes = [{"type": "image"}] * 3 + [{"type": "text", "text": escape(END)}]
    assert messages == [
        {"role": "user", "content": shapes, "name": "x"},
        {"role": "assistant", "content": ""},
    ]
    with pytest.raises(ValueError, match="content type 'video' is none of text, image"):
        escaped([{"role": "user", "content": [{"type": "video"}]}])


def test_the_template_holds_the_think_prompts() -> None:
    assert THINK_BEFORE_ANSWERING in CHAT_TEMPLATE
    assert THINK_BEFORE_DRAWING in CHAT_TEMPLATE
