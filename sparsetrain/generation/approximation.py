"""How close attention to some keys comes to attention to all: the error of its output, and the weight that it read."""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(out: Tensor, whole: Tensor, read: Tensor, lengths: Tensor) -> Tensor:
    """The norm of an output's error over the norm of the output of all keys, fp32 ``[B, Hq]``; 0 where all were read:
    what is left there is the error of rounding.

    Args:
        out: ``[B, Hq, 1, D]``.
        whole: that of all keys.
        read: int32 ``[B, Hkv]``: keys that were read.
        lengths: int32 ``[B]``: keys that there are.
    """
    norm = whole.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = ((out.float() - whole.float()).norm(dim=-1) / norm)[..., 0]
    everything = (read == lengths[:, None]).repeat_interleave(out.shape[1] // read.shape[1], dim=1)
    return error.masked_fill(everything, 0.0)


def weight_share(read: Tensor, whole: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The share of the softmax weight of all keys that some of them hold, fp32 ``[B, Hq]``. A learned sink is no key.

    Args:
        read: log-sum-exp of these keys and the sink, fp32 ``[B, Hq, 1]``.
        whole: that of all keys and the sink.
        sink_logits: ``[Hq]``, or None.
    """
    share = (read - whole)[..., 0].double().exp()
    if sink_logits is not None:
        sink = (sink_logits.double() - whole[..., 0]).exp()
        # Where the sink has all of the weight there is nothing to tell keys by.
        share = ((share - sink) / (1 - sink)).nan_to_num(1.0, 1.0, 1.0).clamp(0, 1)
    return share.float()
