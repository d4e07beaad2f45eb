"""Conversations in which the model decides what comes next: a text, a picture, or the end.

After each part the logits of its last marker decide, among the three markers that marker loss teaches there::

    … said <|im_end|> ─┬─ <|im_start|>      a text, written to its end
                       ├─ <|vision_start|>  a picture: noised while drawn, then kept clean and looked at
                       └─ <|endoftext|>     the turn is over
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from openbagel.config import Sampling
from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read, Request, Row
from openbagel.inference.image import Branches
from openbagel.inference.pictures import Brush
from openbagel.inference.text import Answer, Speech, answer_of, compose
from openbagel.sequence import Segment, Text
from openbagel.tokens import TextCodec


def next_marker(logits: Tensor, codec: TextCodec) -> int:
    """The likeliest of text start, vision start and end of text, from logits [vocabulary]."""
    assert codec.end_of_text is not None
    choices = [codec.start, codec.vision_start, codec.end_of_text]
    return choices[int(logits[choices].argmax())]


def interleave(
    heard: Sequence[Sequence[Segment]],
    brush: Brush,
    *,
    codec: TextCodec,
    writing: Sampling,
    think: bool,
    max_parts: int,
) -> Request[list[Answer | Image.Image]]:
    """Takes in texts and pictures, then writes and draws until the model ends its turn or made max_parts.

    It begins with a text where nothing was said, and with think; a thought that stands alone then goes with
    the first part that is made.
    """
    branches = Branches.of(Context(brush.codec.config.llm))
    logits = yield from branches.hear(heard, Read.LOGITS)
    made: list[Answer | Image.Image] = []
    thought, thinking = None, think
    while len(made) < max_parts:
        marker = codec.start if thinking or logits is None else next_marker(logits, codec)
        if marker == codec.end_of_text:
            break
        if marker == codec.vision_start:
            (picture,), tokens = yield from brush.draw(branches, thought=thought)
            made.append(picture)
            thought = None
            logits = yield from branches.hear([brush.kept([picture], tokens)], Read.LOGITS)
            continue
        before = branches.cond.fork()
        budget = writing.max_tokens + (writing.max_think_tokens if thinking else 0)
        ids, end = yield from compose(
            branches.cond,
            Speech(codec, thinking),
            sampling=writing,
            max_tokens=budget,
            generator=brush.generator,
        )
        (result,) = yield Forward((Row(branches.cond, (end,), keep=True, read=Read.LOGITS),))
        logits, answer = result.output, answer_of(ids, codec, budget=budget, thinking=thinking)
        planned, thinking = answer.thought, False
        thought = answer.thought = planned or thought
        if answer or not planned:
            made.append(answer)
            thought = None
            yield from branches.wrote(Text(ids), before)
    yield events.Done()
    return made
