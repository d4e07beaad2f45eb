"""Learning-rate schedules and the exponential moving average of the weights."""

import math

from torch import Tensor, nn


def learning_rate(step: int, *, peak: float, warmup: int, total: int, decay: int) -> float:
    """Linear warm-up to the peak, constant, then half a cosine down to zero over the last `decay` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - (total - decay)) / max(decay, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class EMA:
    """A float32 average of the trainable parameters: average ← d·average + (1 - d)·parameter.

    d rises to `decay` as (1 + step) / (10 + step), so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {k: p.detach().float().clone() for k, p in model.named_parameters() if p.requires_grad}

    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().float(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])
