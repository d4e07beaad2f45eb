"""Writing text, token by token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from openbagel.config import Sampling
from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read, Request, Row
from openbagel.sequence import Text
from openbagel.tokens import TextCodec

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Answer(str):
    """An answer; `thought` is what came before it when the model was asked to think, `ids` all that it wrote,
    the end marker too.
    """

    thought: str | None
    ids: tuple[int, ...]

    def __new__(cls, text: str, thought: str | None = None, ids: tuple[int, ...] = ()) -> "Answer":
        answer = super().__new__(cls, text)
        answer.thought, answer.ids = thought, ids
        return answer


def write(
    context: Context,
    codec: TextCodec,
    *,
    sampling: Sampling,
    max_tokens: int,
    generator: torch.Generator,
    thinking: bool = False,
) -> Request[tuple[int, ...]]:
    """Continues a context with one text of at most max_tokens ids and returns them, without markers.

    The context afterwards holds the whole text, markers included. thinking: what stands in think tags, or
    comes before their end, is reported as a thought.
    """
    speech = Speech(codec, thinking)
    ids, end = yield from compose(
        context, speech, sampling=sampling, max_tokens=max_tokens, generator=generator
    )
    yield Forward((Row(context, (end,), keep=True),))
    return ids


def compose(
    context: Context, speech: "Speech", *, sampling: Sampling, max_tokens: int, generator: torch.Generator
) -> Request[tuple[tuple[int, ...], Text]]:
    """As `write`, but the context still lacks the text's end, which is returned beside the ids."""
    context.reserve(max_tokens + 2)
    codec, ids = speech.codec, []
    fed = codec.start
    while len(ids) < max_tokens:
        (result,) = yield Forward((Row(context, (Text((fed,), bare=True),), keep=True, read=Read.LOGITS),))
        assert result.output is not None
        fed = choose(result.output, sampling, generator)
        if fed == codec.end:
            break
        ids.append(fed)
        yield from speech.say(fed)
    yield from speech.finish()
    end = (fed,) if fed == codec.end else (fed, codec.end)
    return tuple(ids), Text(end, bare=True)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next id from float32 logits [vocabulary]: the largest at temperature 0 (or next to it), else a draw
    after top-k and top-p.
    """
    if sampling.temperature < 1e-20:  # dividing by less than that would overflow
        return int(logits.argmax())
    values, ids = (logits.cpu() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    probabilities = values.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    probabilities[(before >= sampling.top_p) & (before > 0)] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


class Speech:
    """Turns ids into text events as soon as their characters are complete, thoughts apart."""

    def __init__(self, codec: TextCodec, thinking: bool) -> None:
        self.codec, self.thinking = codec, thinking
        self.pending: list[int] = []
        self.text = ""

    def say(self, token: int) -> Iterator[events.Event]:
        self.pending.append(token)
        piece = self.codec.decode(self.pending)
        if not piece.endswith("\ufffd"):
            self.pending = []
            self.text += piece
            yield from self._emit(hold_back=True)

    def finish(self) -> Iterator[events.Event]:
        """What is left when the text ends."""
        self.text += self.codec.decode(self.pending)
        self.pending = []
        yield from self._emit(hold_back=False)

    def _emit(self, *, hold_back: bool) -> Iterator[events.Event]:
        if self.thinking:
            self.text = self.text.removeprefix(THINK_OPEN)
            thought, closed, rest = self.text.partition(THINK_CLOSE)
            if not closed and hold_back and _may_become_tag(self.text):
                return
            if thought:
                yield events.Thought(thought)
            self.text = rest
            self.thinking = not closed
        if self.text and not self.thinking:
            yield events.Text(self.text)
            self.text = ""


def answer_of(ids: tuple[int, ...], codec: TextCodec, *, budget: int, thinking: bool) -> Answer:
    """What was written, ended by the model unless it ran into the budget."""
    text = codec.decode(ids)
    thought, said = split_thought(text) if thinking else (None, text)
    return Answer(said, thought, ids if len(ids) == budget else (*ids, codec.end))


def _may_become_tag(text: str) -> bool:
    """Whether the text's end is a beginning of a think tag."""
    tail = text[text.rfind("<") :] if "<" in text else ""
    return bool(tail) and (THINK_OPEN.startswith(tail) or THINK_CLOSE.startswith(tail))


def split_thought(text: str) -> tuple[str | None, str]:
    """(thought, answer) of a text; the thought is None where there are no think tags."""
    before, closed, answer = text.lstrip().partition(THINK_CLOSE)
    if not closed:
        answer = "" if before.startswith(THINK_OPEN) else text
    thought = before.removeprefix(THINK_OPEN).strip()
    return (None, answer) if answer is text else (thought, answer.strip())
