"""Clips: groups of frames, each drawn together and then kept, clean, in the context of the next.

    branch   sees                                                 drawn          then kept in cond and text
    cond     [given frames, clean][looks][prompt]                 [group 1 ░░]   [group 1, clean][looks]
    text     [given frames, clean][looks]                         [group 2 ░░]   [group 2, clean][looks]
    image    [prompt]                                             …

The frames of a group are noised alike and see each other (paper §2.3); what is drawn later sees them clean,
as in training with a clean history. With a window every group begins anew, from the texts and then the last
frames alone as one group: a long clip needs no more memory than a short one.
"""

from collections.abc import Sequence

from PIL import Image

from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import Request
from openbagel.inference.image import Branches, frames_of
from openbagel.inference.pictures import Brush
from openbagel.sequence import Segment, Text, VaeImage, VitImage

Heard = Sequence[Sequence[Segment]]


def film(
    heard: Heard, brush: Brush, *, num_frames: int, group: int, window: int | None = None
) -> Request[list[Image.Image]]:
    """Takes in texts and given clips, then draws num_frames frames, at most `group` of them at a time, after
    all frames before them or the last `window`.
    """
    branches = Branches.of(Context(brush.codec.config.llm))
    if window is None:
        yield from branches.hear(heard)
    made, kept = list[Image.Image](), list[Segment]()
    while True:
        if window is not None:
            texts, clip = _latest([*heard, kept], window)
            branches, heard = Branches.of(Context(brush.codec.config.llm)), [*texts, clip]
            yield from branches.hear(texts)
            if clip:
                yield from branches.filmed(clip)
        pictures, tokens = yield from brush.draw(branches, min(group, num_frames - len(made)))
        made += pictures
        if len(made) == num_frames:
            yield events.Done()
            return made
        kept = brush.kept(pictures, tokens)
        if window is None:
            yield from branches.filmed(kept)


def _latest(heard: Heard, window: int) -> tuple[list[list[Segment]], list[Segment]]:
    """The texts, and the last frames as one clip; what is older is forgotten."""
    segments = [segment for part in heard for segment in part]
    frames = [frame for image in segments if isinstance(image, VaeImage) for frame in image.frames][-window:]
    looks = [segment for segment in segments if isinstance(segment, VitImage)][-window:]
    clip = VaeImage(frames_of([frame.tokens for frame in frames], frames[-1].grid)) if frames else None
    texts = [[*part] for part in heard if all(isinstance(segment, Text) for segment in part)]
    return texts, [clip, *looks] if clip else []
