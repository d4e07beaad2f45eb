"""What requests feed to the model, seen from the engine, beside what training makes of the same data."""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from openbagel.data.samples import Part, Sample, SampleId, decode
from openbagel.data.tasks import NEVER, TaskSetting
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read
from openbagel.inference.pipeline import Bagel
from openbagel.sequence import Segment, Text, VaeImage
from openbagel.train.latents import LatentEncoder
from tests import tiny


def photo(seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class Decided(random.Random):
    """Takes the last of what randint offers and the first of what randrange offers; never drops."""

    def random(self) -> float:
        return 0.99

    def randint(self, a: int, b: int) -> int:
        return b

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 0


def trained_on(
    task: Callable[[dict[str, Any], TaskSetting], list[Part]],
    row: dict[str, Any],
    epoch: int = 0,
    window: int | None = None,
) -> list[Segment]:
    """The segments that training makes of a row, the tiny model's own way, with nothing dropped."""
    settings = tiny.config().settings
    setting = TaskSetting(
        codec=tiny.codec(),
        vae=settings.vae_limits,
        vit=settings.vit_limits,
        dropout=NEVER,
        rng=Decided(),
        noisy_history=0.0,
        window=window,
    )
    sample = Sample(SampleId("row", epoch, 0), decode(task(row, setting)))
    encoder = LatentEncoder(tiny.checkpoint().autoencoder, tiny.config(), seed=0)
    return encoder.segments([sample])[0]


class Spy:
    """Steps of an engine: what the first context was fed, and every denoising with its velocities."""

    def __init__(self) -> None:
        self.cond: Context | None = None
        self.fed: list[Segment] = []
        self.drawings: list[tuple[list[Segment], Forward, list[Tensor]]] = []
        """What the first context held, the forward, its velocities."""

    def saw(self, forward: Forward, outputs: list[Tensor | None]) -> None:
        self.cond = self.cond or forward.rows[0].context
        if forward.rows[0].read is Read.VELOCITY:
            velocities = [output for output in outputs if output is not None]
            self.drawings.append((list(self.fed), forward, velocities))
        for row in forward.rows:
            if row.keep and row.context is self.cond:
                self.fed += row.segments


@contextmanager
def spied(bagel: Bagel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    """Records what one request does."""
    spy, step = Spy(), bagel.engine.step

    def recorded(forwards: Sequence[Forward]) -> list[Any]:
        results = step(forwards)
        for forward, found in zip(forwards, results, strict=True):
            spy.saw(forward, [result.output for result in found])
        return results

    with monkeypatch.context() as patch:
        patch.setattr(bagel.engine, "step", recorded)
        yield spy


def joined(segments: Sequence[Segment]) -> list[Segment]:
    """The same with texts that were written token by token as one segment."""
    whole: list[Segment] = []
    for segment in segments:
        last = whole[-1] if whole else None
        if isinstance(segment, Text) and segment.bare and isinstance(last, Text) and last.bare:
            whole[-1] = Text(last.ids + segment.ids, bare=True)
        else:
            whole.append(segment)
    return whole


def layout(segments: Sequence[Segment]) -> list[Any]:
    """All that the packer makes of segments but the numbers in the latents and what is learned."""
    pack = tiny.packer().pack([joined(segments)])
    texts = pack.text_ids.tolist()
    facts = [pack.position_ids, pack.full, pack.hidden, pack.latent_position_ids, pack.patches, pack.order]
    return [texts, pack.spans, *(fact.tolist() for fact in facts)]


def visible(segments: Sequence[Segment]) -> list[Segment]:
    """Without the hidden targets that something follows."""
    return [s for s in segments[:-1] if not (isinstance(s, VaeImage) and s.hidden)] + list(segments[-1:])


@torch.inference_mode()
def uncached(bagel: Bagel, segments: Sequence[Segment]) -> Tensor:
    """The velocity of the latents of the last segment, without any cache."""
    pack = bagel.engine.packer.pack([joined(segments)])
    (last,) = [segment for segment in segments[-1:] if isinstance(segment, VaeImage)]
    hidden = bagel.model(pack)[pack.num_und :]
    return bagel.model.velocity(hidden[-sum(len(frame.tokens) for frame in last.frames) :]).float()


def assert_uncached(
    bagel: Bagel, forward: Forward, velocities: list[Tensor], *seen: Sequence[Segment]
) -> None:
    """The branches of a denoising step, in order of their rows, see just this."""
    assert len(velocities) == len(seen)
    for row, velocity, segments in zip(forward.rows, velocities, seen, strict=True):
        expected = uncached(bagel, [*segments, *row.segments])
        assert torch.linalg.vector_norm(velocity - expected) <= 1e-4 * torch.linalg.vector_norm(expected)
