"""Attention of each row over the heaviest of its keys, for training."""

from sparsetrain_kernels.top_p_softmax.op import top_p_attention

__all__ = ["top_p_attention"]
