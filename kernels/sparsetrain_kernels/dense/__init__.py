"""Dense causal attention, with a sliding window where asked."""

from sparsetrain_kernels.dense.op import causal_attention, causal_attention_dense

__all__ = ["causal_attention", "causal_attention_dense"]
