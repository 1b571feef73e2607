"""The step of RefreshKV that reads all keys and chooses by their exact weights, as rows of training do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparsetrain_kernels.block_decode import block_pattern_decode
from torch import Tensor

from sparsetrain.generation.selectors import Places
from sparsetrain.patterns import Pattern


class WholeStep(NamedTuple):
    """A step that has read all keys."""

    output: Tensor
    """``[B, Hq, 1, D]``; zeros of rows that were not due."""
    lse: Tensor
    """Log-sum-exp of the logits, the learned sink among them, fp32 ``[B, Hq, 1]``."""
    due: Tensor | None
    """bool ``[B]``, the rows that were asked for; None for all."""

    def rows(self, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``[B, Hq, 1, D]`` and log-sum-exp ``[B, Hq, 1]``: this step's in the rows that were due, and those
        given in the others."""
        if self.due is None:
            return self.output, self.lse
        due = self.due[:, None, None]
        return torch.where(due[..., None], self.output, output), torch.where(due, self.lse, lse)


def whole_step(
    query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern, places: Places, options: dict[str, Any]
) -> WholeStep:
    """Attention of one token a row to all keys.

    Args:
        query: ``[B, Hq, 1, D]``.
        keys, values: ``[pages, Hkv, block, D]``.
        pattern: full attention in blocks of a page.
        places: where the keys are, and which rows are due.
        options: ``scale``, ``softcap`` and ``sink_logits``.
    """
    # Of a row without keys nothing is read.
    lengths = places.lengths if places.due is None else places.lengths.where(places.due, 0)
    given = {"lengths": lengths, "block_table": places.block_table, "max_length": places.max_length, **options}
    return WholeStep(*block_pattern_decode(query, keys, values, pattern, return_lse=True, **given), places.due)


def keys_only(lse: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The log-sum-exp of the keys alone, fp32 ``[B, Hq]``, of one that has a learned sink in it, ``[B, Hq, 1]``."""
    lse = lse[..., 0].float()
    if sink_logits is None:
        return lse
    return lse + torch.log1p(-(sink_logits.float() - lse).exp().clamp(max=1 - 2**-20))
