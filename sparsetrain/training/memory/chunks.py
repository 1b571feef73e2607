"""Split the tokens of a pass into a number of chunks that is equal on all ranks."""

from __future__ import annotations

import math

import torch


def chunks_of(tokens: int, chunk: int | None) -> int:
    """The number of chunks of at most ``chunk`` tokens in a pass of at most ``tokens``; ``chunk=None`` means one."""
    return 1 if chunk is None else math.ceil(tokens / chunk)


def split_evenly(tensor: torch.Tensor, num_chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """``torch.tensor_split`` of ``[..., N, ...]`` along ``dim``, with a gradient that is concatenated once.

    In torch's own backward each chunk has a gradient of the whole tensor's size, zero elsewhere, and these are summed.
    The result always has ``num_chunks`` chunks ``[..., n, ...]``: under ZeRO-3 each chunk gathers weights, which all
    ranks must do equally often. The last ones may be empty.
    """
    whole, longer = divmod(tensor.shape[dim], num_chunks)
    return tensor.split_with_sizes([whole + (index < longer) for index in range(num_chunks)], dim)
