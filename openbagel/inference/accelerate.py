"""TaylorSeer: forecasts the hidden states of denoising steps instead of computing them (approximate).

In a forecast step every layer of the reference's version ignores its input, so only the last layer's features
matter: keeping those alone gives bit for bit the same pictures with one layer's memory. Source:
reference/cache_utils, architecture.md §5.2.
"""

import math

from torch import Tensor

FULL_AT_FIRST = 5
EVERY = 3
MAX_ORDER = 6


class TaylorSeer:
    """One guidance branch of one request."""

    def __init__(self) -> None:
        self.calls = 0
        self.last_full = 0
        self.terms: list[Tensor] = []
        """Finite differences of the hidden states, order 0 first."""

    def forecast(self) -> Tensor | None:
        """The hidden states of this call, or None where they must be computed and given to `record`."""
        n = self.calls
        if n < FULL_AT_FIRST or (n - FULL_AT_FIRST + 1) % EVERY == 0:
            return None
        self.calls += 1
        ahead = n - self.last_full
        return sum(
            (term * (ahead**i / math.factorial(i)) for i, term in enumerate(self.terms[1:], 1)), self.terms[0]
        )

    def record(self, hidden: Tensor) -> None:
        """The computed hidden states of this call."""
        n = self.calls
        terms = [hidden]
        if n > FULL_AT_FIRST - 2:
            for old in self.terms[:MAX_ORDER]:
                terms.append((terms[-1] - old) / (n - self.last_full))
        self.terms, self.last_full = terms, n
        self.calls += 1
