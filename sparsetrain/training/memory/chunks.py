"""Cutting the tokens of a pass into a number of chunks that all ranks agree on."""

from __future__ import annotations

import math

import torch


def chunks_of(tokens: int, chunk: int | None) -> int:
    """How many chunks of at most ``chunk`` tokens a pass of at most ``tokens`` is cut into; None means one."""
    return 1 if chunk is None else math.ceil(tokens / chunk)


def split_evenly(tensor: torch.Tensor, num_chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """``tensor_split`` whose gradient is put together in one piece.

    torch's own gives every chunk a gradient of the whole tensor's size, zero elsewhere, and adds them up. The number of
    chunks is what is asked for, whatever the length: under ZeRO-3 each of them gathers weights, which all ranks must do
    equally often. The last ones may be empty.
    """
    whole, longer = divmod(tensor.shape[dim], num_chunks)
    return tensor.split_with_sizes([whole + (index < longer) for index in range(num_chunks)], dim)
