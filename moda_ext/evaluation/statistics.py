"""Intervals of what was counted."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (1927), ``(low, high)`` in 0 to 1; ``(0, 1)`` for n = 0.

    Raises:
        ValueError: successes outside of 0 to n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: successes must lie in 0 to n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, spread = successes / n, z * z / n
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
