"""Drawing: the guidance branches, the denoising loop, and what a picture is to the model.

    branch   sees                                          used for
    cond     everything                                    the prompt's velocity
    text     everything but the last text and the thought  text guidance: away from "no instruction", or
             (a negative prompt in their place)            from the negative prompt
    image    the texts (and the system prompt) only        image guidance: away from "no picture"

Branches whose contexts are equal by lineage are computed once.
"""

import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openbagel.config import Sampling
from openbagel.flow import Guidance, euler, guide, renoised, schedule
from openbagel.inference import events
from openbagel.inference.accelerate import TaylorSeer
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read, Request, Result, Row, take_in
from openbagel.sequence import Frame, Segment, Text, VaeImage


@dataclass(slots=True)
class Branches:
    """The contexts of one drawing."""

    cond: Context
    text: Context
    image: Context

    @classmethod
    def of(cls, start: Context) -> "Branches":
        return cls(start, start.fork(), start.fork())

    def hear(self, parts: Sequence[Sequence[Segment]], read: Read = Read.NOTHING) -> Request[Tensor | None]:
        """Takes in parts in order, each one text (or its pieces), or the segments of one picture or group of
        frames.

        The text branch lags behind: it is what cond was before the last text, or all of it after a picture.
        Returns what is read after the last part.
        """
        output = None
        for number, part in enumerate(parts, 1):
            reading = read if number == len(parts) else Read.NOTHING
            if all(isinstance(segment, Text) for segment in part):
                self.text = self.cond.fork()
                output, self.image = yield from self._take_in(part, self.image, reading)
            else:
                output, self.text = yield from self._take_in(part, self.cond, reading)
        return output

    def avoiding(self, text: Sequence[Text]) -> Request["Branches"]:
        """The same for one picture that shall not show what a text says."""
        negative = self.text.fork()
        yield from take_in([negative], text)
        return replace(self, text=negative)

    def filmed(self, part: Sequence[Segment]) -> Request[None]:
        """Takes in frames just drawn, to go on with the same text: the text branch sees them too."""
        _, self.text = yield from self._take_in(part, self.text)

    def wrote(self, text: Text, before: Context) -> Request[None]:
        """Takes note of a text that cond has written since it was `before`."""
        self.text = before
        if self.image.lineage == before.lineage:
            self.image = self.cond.fork()
        else:
            yield from take_in([self.image], [text])

    def _take_in(
        self, part: Sequence[Segment], other: Context, read: Read = Read.NOTHING
    ) -> Request[tuple[Tensor | None, Context]]:
        """cond takes in a part, and so does another branch; once for both where they are alike.

        Returns what is read from cond, and the other branch.
        """
        alike = other.lineage == self.cond.lineage
        output = yield from take_in([self.cond] if alike else [self.cond, other], part, read)
        return output, self.cond.fork() if alike else other


def denoise(
    branches: Branches, noise: Tensor, grid: tuple[int, int], sampling: Sampling, generator: torch.Generator
) -> Request[Tensor]:
    """Draws one picture, or the frames of one group together: from noise float32[h·w, C], or
    float32[frames, h·w, C], to clean latent tokens of the same shape. generator: of the noise on the way.
    """
    guidance = sampling.guidance
    _warn_without_effect(branches, guidance)
    times = schedule(sampling.num_timesteps, sampling.timestep_shift)
    seers: dict[object, TaylorSeer] = {}
    x = noise
    for step, (t, t_next) in enumerate(itertools.pairwise(times), 1):
        wanted = [branches.cond]
        if guidance.acts_at(t):
            wanted += [branches.text, branches.image] if guidance.uses_image else [branches.text]
        distinct = {context.lineage: context for context in reversed(wanted)}
        if sampling.taylorseer:
            seers = {lineage: seers.get(lineage) or TaylorSeer() for lineage in (*seers, *distinct)}
        frames = frames_of(x[None] if x.dim() == 2 else x, grid)
        segment = VaeImage(frames, t, hidden=len(frames) == 1)
        forecasts = {lineage: seers[lineage].forecast() if seers else None for lineage in distinct}
        results = yield Forward(
            tuple(
                Row(c, (segment,), read=Read.VELOCITY, forecast=forecasts[key]) for key, c in distinct.items()
            )
        )
        by_lineage: dict[object, Result] = dict(zip(distinct, results, strict=True))
        for lineage, result in by_lineage.items():
            if seers and forecasts[lineage] is None and result.hidden is not None:
                seers[lineage].record(result.hidden)
        outputs = [by_lineage[context.lineage].output for context in wanted]
        velocities = [output.reshape(x.shape) for output in outputs if output is not None]
        velocity = _combined(guidance, velocities)
        yield events.Preview(step, len(times) - 1, euler(x, velocity, t, 0.0), grid)
        if sampling.eta:
            fresh = torch.randn(x.shape, generator=generator).to(x.device)
            x = renoised(x, velocity, (t, t_next), fresh, sampling.eta)
        else:
            x = euler(x, velocity, t, t_next)
    return x


def frames_of(tokens: Iterable[Tensor], grid: tuple[int, int]) -> tuple[Frame, ...]:
    """The frames of one group, one rotary position apart, from tokens float[h·w, C] of each."""
    *others, last = [Frame(one, grid, position_step=1) for one in tokens]
    return (*others, replace(last, position_step=0))


def _combined(guidance: Guidance, velocities: list[Tensor]) -> Tensor:
    cond, *others = velocities
    return guide(guidance, cond, others[0], others[1] if len(others) > 1 else None) if others else cond


def _warn_without_effect(branches: Branches, guidance: Guidance) -> None:
    if guidance.text > 1 and not guidance.uses_image and branches.text.lineage == branches.cond.lineage:
        warnings.warn(
            "text guidance has no effect: the input ends with a picture, or has no text", stacklevel=2
        )
    if guidance.image > 1 and guidance.text <= 1:
        warnings.warn(
            "image guidance has no effect: it acts only where the text guidance is above 1", stacklevel=2
        )


def draw_noise(grid: tuple[int, int], channels: int, generator: torch.Generator) -> Tensor:
    """float32[h·w, C], drawn on the CPU so that a seed gives the same picture on every device."""
    return torch.randn(grid[0] * grid[1], channels, generator=generator)
