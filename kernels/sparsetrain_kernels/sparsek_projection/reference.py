"""SPARSEK of the rows of a matrix in plain PyTorch: the definition (2406.16747, section 3.1 and Algorithm 1).

``-inf`` stands for an entry that is not there. A threshold is the sum of two numbers, the second of which is what the
first one's rounding left: gates are as precise at scores of ten thousand as at scores of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

INFINITY = float("inf")
BISECTIONS = 64
"""Halvings of an fp64 interval: of a thousand, to less than the gates' own rounding."""


def project(z: Tensor, k: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The projection of each row onto ``{0 <= p <= 1, sum p = k}``. Thresholds are found in fp64.

    Args:
        z: ``[R, M]``, ``-inf`` where there is no entry.
        k: ``[R]``, positive.
        method: ``"sort"`` or ``"bisect"``.

    Returns:
        ``p [R, M]`` in z's dtype, and the two parts of the threshold, ``[R]`` each in fp32 or for fp64 fp64. It is
        ``-inf`` where a row has at most k entries and NaN where one of them is NaN or ``inf``.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    missing = z == -INFINITY
    peak = z.amax(-1).double()
    centred = z.double() - peak[:, None]
    # Entries that are not there lie so far below the others that they get nothing at any threshold that may come out.
    centred = centred.where(~missing, (centred.where(~missing, 0.0).amin(-1) - 2)[:, None])
    threshold = peak + {"sort": _by_sorting, "bisect": _by_bisection}[method](centred, k.double())
    threshold = threshold.where((~missing).sum(-1) > k, -INFINITY)
    threshold = threshold.where(peak < INFINITY, float("nan"))
    tau = threshold.to(dtype)
    rest = (threshold - tau.double()).where(tau > -INFINITY, 0.0).to(dtype)
    p = _margin(z, tau, rest).clamp(0, 1).where(~missing, 0.0)
    return p.to(z.dtype), tau, rest


def project_backward(grad: Tensor, z: Tensor, tau: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The product with the Jacobian ``Diag(1_M) - 1_M 1_M^T / |M|``, where M are the entries strictly between 0 and 1.

    Args:
        grad: ``[R, M]``, the gradient of p.
        z, tau, rest: as of :func:`project`.

    Returns:
        The gradients of ``z`` and, in the dtype of ``tau``, of ``k``.
    """
    margin = _margin(z, tau, rest)
    interior = (margin > 0) & (margin < 1)
    inner = grad.to(tau.dtype).where(interior, 0.0)
    mean = inner.sum(-1) / interior.sum(-1).clamp(min=1)
    mean = mean.where(~tau.isnan(), float("nan"))
    # Outside it is zero, and NaN in a row of NaN.
    grad_z = torch.where(interior, inner - mean[:, None], (mean - mean)[:, None])
    return grad_z.to(z.dtype), mean


def _margin(z: Tensor, tau: Tensor, rest: Tensor) -> Tensor:
    return z.to(tau.dtype) - tau[:, None] - rest[:, None]


def _by_sorting(z: Tensor, k: Tensor) -> Tensor:
    """The threshold between the two neighbouring kinks where the sum of the gates crosses k, ``O(M log M)``."""
    entries = z.shape[-1]
    ascending = z.sort(dim=-1).values
    # of_largest[i] is the sum of the i largest.
    of_largest = torch.nn.functional.pad(ascending.flip(-1).cumsum(-1), (1, 0))
    lower = ascending - 1
    kinks = torch.cat([lower, ascending], dim=-1)
    support = entries - torch.searchsorted(ascending, kinks, right=True)
    saturated = entries - torch.searchsorted(lower, kinks)
    total = saturated + of_largest.gather(-1, support) - of_largest.gather(-1, saturated)
    total -= (support - saturated) * kinks
    # The last kink with a sum above k. Beyond it the sum falls by one for each key inside, and on to k.
    last = kinks.where(total > k[:, None], -INFINITY).argmax(-1, keepdim=True)
    kink = kinks.gather(-1, last)
    inside = support.gather(-1, last) - entries + torch.searchsorted(lower, kink, right=True)
    return (kink + (total.gather(-1, last) - k[:, None]) / inside.clamp(min=1)).squeeze(-1)


def _by_bisection(z: Tensor, k: Tensor) -> Tensor:
    """Halve the interval of the threshold until no kink is likely to be left in it, then solve for what is inside."""
    low, high = z.amin(-1) - 1, torch.zeros_like(k)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = _surplus(z, middle, k)[0] > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    surplus, inside = _surplus(z, high, k)
    return high + surplus / inside.clamp(min=1)


def _surplus(z: Tensor, threshold: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the gates less k, and the number of gates between 0 and 1."""
    margin = z - threshold[:, None]
    return margin.clamp(0, 1).sum(-1) - k, ((margin > 0) & (margin < 1)).sum(-1)
