"""Drawing: the guidance branches, the denoising loop, and what a picture is to the model.

    branch   sees                                          used for
    cond     everything                                    the prompt's velocity
    text     everything but the last text and the thought  text guidance: away from "no instruction"
    image    the texts (and the system prompt) only        image guidance: away from "no picture"

Branches whose contexts are equal by lineage are computed once.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openbagel.config import Sampling
from openbagel.flow import Guidance, euler, guide, schedule
from openbagel.inference import events
from openbagel.inference.accelerate import TaylorSeer
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read, Request, Result, Row
from openbagel.sequence import Segment, Text, VaeImage


@dataclass(slots=True)
class Branches:
    """The contexts of one drawing."""

    cond: Context
    text: Context
    image: Context

    @classmethod
    def of(cls, start: Context) -> "Branches":
        return cls(start, start.fork(), start.fork())

    def hear(self, parts: Sequence[Sequence[Segment]]) -> Request[None]:
        """Takes in parts in order, each one text or the segments of one picture.

        The text branch lags behind: it is what cond was before the last text, or all of it after a picture.
        """
        for part in parts:
            is_text = all(isinstance(segment, Text) for segment in part)
            if is_text:
                self.text = self.cond.fork()
            alike = self.image.lineage == self.cond.lineage
            rows = [Row(self.cond, tuple(part), keep=True)]
            if is_text and not alike:
                rows.append(Row(self.image, tuple(part), keep=True))
            yield Forward(tuple(rows))
            if is_text and alike:
                self.image = self.cond.fork()
            if not is_text:
                self.text = self.cond.fork()


def denoise(branches: Branches, noise: Tensor, grid: tuple[int, int], sampling: Sampling) -> Request[Tensor]:
    """Draws one picture: from noise float32[h·w, C] to clean latent tokens of the same shape."""
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
        segment = VaeImage.noised(x, grid, t)
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
        velocities = [by_lineage[context.lineage].output for context in wanted]
        x = euler(x, _combined(guidance, velocities), t, t_next)
        yield events.Preview(step, len(times) - 1, x, grid)
    return x


def _combined(guidance: Guidance, velocities: list[Tensor | None]) -> Tensor:
    cond, *others = [v for v in velocities if v is not None]
    return guide(guidance, cond, others[0], others[1] if len(others) > 1 else None) if others else cond


def _warn_without_effect(branches: Branches, guidance: Guidance) -> None:
    if guidance.text > 1 and branches.text.lineage == branches.cond.lineage:
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
