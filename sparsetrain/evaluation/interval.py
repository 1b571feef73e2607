"""Confidence intervals of proportions."""

from __future__ import annotations

import math


def wilson_interval(correct: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a proportion, which is valid at 0 and 1, where the normal one has width 0.

    20 of 20 right answers: (0.84, 1.0).
    """
    z = 1.959964
    share = correct / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
