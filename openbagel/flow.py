"""Rectified flow: schedule, interpolation, velocity target, Euler step and classifier-free guidance.

A latent at time t is x_t = (1 - t)·x0 + t·noise; the model predicts the velocity noise - x0. t runs from
1 (noise) to 0 (picture), is not scaled by 1000, and everything here is float32. Source: paper §2.2.

Shapes: N latent tokens of one picture, C channels of a token.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from openbagel.checks import check_choice


class Renorm(StrEnum):
    """How a guided velocity is scaled back to the length of the conditional one.

    GLOBAL: one factor per picture. CHANNEL: one factor per token. TEXT_CHANNEL: one per token, on the
    text-guided velocity, before the image guidance is applied.
    """

    GLOBAL = "global"
    CHANNEL = "channel"
    TEXT_CHANNEL = "text_channel"


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance on the text and on the input pictures.

    text, image: scales, 1 switches one off; image guidance acts only where the text scale is above 1.
    interval: (low, high), guidance acts at shifted times low < t <= high.
    renorm: a `Renorm` or its word.
    renorm_min: lower bound of the renormalisation factor in [0, 1]; 1 switches it off.
    """

    text: float = 4.0
    image: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Renorm = Renorm.GLOBAL
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        check_choice("renorm", self.renorm, Renorm)
        object.__setattr__(self, "renorm", Renorm(self.renorm))
        low, high = self.interval
        if not (math.isfinite(self.text) and math.isfinite(self.image)):
            raise ValueError(f"guidance scales must be finite, not text {self.text} and image {self.image}")
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance interval {self.interval} must satisfy 0 <= low <= high <= 1")
        if not 0.0 <= self.renorm_min <= 1.0:
            raise ValueError(f"renorm_min {self.renorm_min} must lie in [0, 1]")

    def acts_at(self, t: float) -> bool:
        """Whether this guidance changes the velocity at the shifted time t (a float32 value)."""
        low, high = torch.tensor(self.interval).tolist()
        return self.text > 1.0 and low < t <= high

    @property
    def uses_image(self) -> bool:
        return self.text > 1.0 and self.image > 1.0


OFFICIAL_APP = Guidance(text=4.0, image=1.5)
"""The text-to-image guidance that the official app runs by accident: its image scale is left at a default of
1.5.
"""


def shifted(t: Tensor, shift: float) -> Tensor:
    """Moves times in [0, 1] towards noise (shift > 1): s·t / (1 + (s - 1)·t)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(num_timesteps: int, shift: float) -> list[float]:
    """Times 1 … 0 as float32 values: num_timesteps points, so num_timesteps - 1 Euler steps."""
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps {num_timesteps} must be at least 2 (steps = num_timesteps - 1)")
    return shifted(torch.linspace(1, 0, num_timesteps), shift).tolist()


def interpolate(x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """The noised latent x_t; t broadcasts against the tokens."""
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0


def euler(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """One step from t down to t_next; the difference is taken in float32."""
    return x - velocity * (torch.tensor(t) - torch.tensor(t_next)).item()


def renoised(x: Tensor, velocity: Tensor, times: tuple[float, float], noise: Tensor, eta: float) -> Tensor:
    """One step from t down to t_next in which noise takes the place of a part of what the velocity says is
    noise in x; eta in [0, 1], 0 is `euler`. The mixture has variance 1, as DDIM's (arXiv 2010.02502, 12).
    """
    t, t_next = times
    x0, old = euler(x, velocity, t, 0.0), euler(x, velocity, t, 1.0)
    return interpolate(x0, math.sqrt(1 - eta**2) * old + eta * noise, t_next)


def guide(guidance: Guidance, cond: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
    """Combines the velocities of one picture's branches: float[N, C] each.

    cond sees everything, text lacks the text, image lacks the pictures (None where image guidance is off)::

        v_text = text + s_text·(cond - text)        v = image + s_image·(v_text - image)        v · ‖cond‖/‖v‖
    """

    def renormed(velocity: Tensor, dims: tuple[int, ...]) -> Tensor:
        norm = torch.linalg.vector_norm(velocity, dim=dims, keepdim=True)
        target = torch.linalg.vector_norm(cond, dim=dims, keepdim=True)
        return velocity * (target / (norm + 1e-8)).clamp(guidance.renorm_min, 1.0)

    velocity = text + guidance.text * (cond - text)
    if guidance.renorm is Renorm.TEXT_CHANNEL:
        velocity = renormed(velocity, (-1,))
    if image is not None:
        velocity = image + guidance.image * (velocity - image)
    if guidance.renorm is Renorm.TEXT_CHANNEL:
        return velocity
    return renormed(velocity, (-1,) if guidance.renorm is Renorm.CHANNEL else (-2, -1))
