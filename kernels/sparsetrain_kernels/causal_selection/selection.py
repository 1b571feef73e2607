"""The result of the causal selection: a few numbers a token, never a table of rows by keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CausalSelection(NamedTuple):
    """Which keys compete for and win the ``topk`` places of each row. All ``[B, H, N]``; rows are indices along N."""

    threshold: Tensor
    """Of row i: the sum of ``clip(u_j - threshold_i, 0, 1)`` over its candidates is ``topk``; the smallest such number.
    ``-inf`` where it has at most ``topk`` candidates. In the scores' dtype, non-decreasing within a document."""
    exit: Tensor
    """int32: key j is among the top k of the rows ``[j + window, exit_j)``; of sinks and of keys that never leave the
    window, the end of their document."""
    interior_start: Tensor
    """int32: key j has ``0 < u_j - threshold_i < 1`` in the rows ``[start_j, end_j)``, in the top k or not."""
    interior_end: Tensor
    """int32."""
    interior_size: Tensor
    """int32, of a row: candidates with ``0 < u_j - threshold_i < 1``."""
    saturated_size: Tensor
    """int32, of a row: candidates with ``u_j - threshold_i >= 1``."""
