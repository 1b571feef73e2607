"""Attention of segments of rows over a list of keys each, and over themselves."""

from sparsetrain_kernels.listed_keys.op import listed_attention, listed_attention_dense

__all__ = ["listed_attention", "listed_attention_dense"]
