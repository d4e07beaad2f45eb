"""Clips: groups of frames, each drawn together and then kept, clean, in the context of the next.

    branch   sees                                                 drawn          then kept in cond and text
    cond     [given frames, clean][looks][prompt]                 [group 1 ░░]   [group 1, clean][looks]
    text     [given frames, clean][looks]                         [group 2 ░░]   [group 2, clean][looks]
    image    [prompt]                                             …

The frames of a group are noised alike and see each other (paper §2.3); what is drawn later sees them clean,
as in training with a clean history.
"""

from collections.abc import Sequence

from PIL import Image

from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import Request
from openbagel.inference.image import Branches
from openbagel.inference.pictures import Brush
from openbagel.sequence import Segment


def film(
    heard: Sequence[Sequence[Segment]], brush: Brush, *, num_frames: int, group: int
) -> Request[list[Image.Image]]:
    """Takes in texts and given clips, then draws num_frames frames, at most `group` of them at a time."""
    branches = Branches.of(Context(brush.codec.config.llm))
    yield from branches.hear(heard)
    made: list[Image.Image] = []
    while len(made) < num_frames:
        pictures, tokens = yield from brush.draw(branches, min(group, num_frames - len(made)))
        made += pictures
        if len(made) < num_frames:
            yield from branches.filmed(brush.kept(pictures, tokens))
    yield events.Done()
    return made
