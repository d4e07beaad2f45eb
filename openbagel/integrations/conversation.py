"""Conversations as text: what a chat template makes of messages, and how it is read again.

A template mixes its own markers with what users typed. So that the two stay apart, user text is escaped
before it is rendered, and no string is read as rendered unless it says so by its type.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openbagel.checks import check_choice
from openbagel.tokens import MARKERS

START, END, LOOK, LOOKED = MARKERS
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text("utf-8")
ESCAPE = "\ue000"
SEGMENT = re.compile(  # what a text says (None: a lone start marker), or the number of a picture
    r"(?s)<\|im_start\|>(?:(.*?)<\|im_end\|>|\Z)|<\|vision_start\|>(?:<\|image_pad\|>)?([0-9]*)<\|vision_end\|>"
)
SLOT = re.compile(rf"\n*<{ESCAPE}\|image_([1-9][0-9]{{0,3}})\|>\n*")


class Rendered(str):
    """Text whose markers are markers, as a template makes it. Those of any other string are what they look
    like.
    """


def escape(text: str) -> str:
    """A user's text without anything that reads as a marker; `unescape` is its inverse."""
    return text.replace(ESCAPE, ESCAPE + "e").replace("<|", f"<{ESCAPE}|")


def unescape(text: str) -> str:
    return text.replace(f"<{ESCAPE}|", "<|").replace(ESCAPE + "e", ESCAPE)


def escaped(conversation: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages of OpenAI's or Hugging Face's shape as a template takes them, and their pictures' sources."""
    messages: list[dict[str, Any]] = []
    sources: list[Any] = []
    for message in conversation:
        content = message.get("content") or ""
        parts: list[dict[str, Any]] = []
        for part in [] if isinstance(content, str) else content:
            check_choice("content type", part["type"], ("text", "image", "image_url"))
            text = {"text": escape(part["text"])} if part["type"] == "text" else {}
            parts.append({"type": "text" if text else "image", **text})
            given = [part[name] for name in ("image", "url", "path", "image_url") if part.get(name)]
            sources += [one["url"] if isinstance(one, Mapping) else one for one in given[:1]]
        messages.append({**message, "content": escape(content) if isinstance(content, str) else parts})
    return messages, sources


def read(text: str, pictures: int) -> list[str | int | None]:
    """A conversation's parts: texts, pictures by number from 0, None where an answer is asked for.

    `<|image_n|>` in a text is picture n, as long as it is not shown yet; other places take the pictures that
    are left, in order. A string that is not `Rendered` is one text that asks for an answer; it follows the
    pictures that it does not name. ValueError when places and pictures differ in number.
    """
    left = list(range(pictures))

    def show(slot: re.Match[str]) -> str:
        number = int(slot[1]) - 1
        if number not in left:
            return slot[0]
        left.remove(number)
        return f"{END}{LOOK}{number}{LOOKED}{START}"

    rendered = text if isinstance(text, Rendered) else f"{START}{escape(text)}{END}{START}"
    if (bound := SLOT.sub(show, rendered)) != rendered:
        bound = bound.replace(START + END, "")
    if not isinstance(text, Rendered):
        bound, left = "".join(f"{LOOK}{number}{LOOKED}" for number in left) + bound, []
    if strange := SEGMENT.sub("", bound):
        raise ValueError(f"{strange[:40]!r} does not stand between markers; an answer cannot be continued")
    segments = [segment.groups() for segment in SEGMENT.finditer(bound)]
    if (places := segments.count((None, ""))) != len(left):
        raise ValueError(f"{places} places for {len(left)} pictures; write <|image_1|> where a picture is")
    return [
        said and unescape(said) if number is None else int(number or left.pop(0)) for said, number in segments
    ]
