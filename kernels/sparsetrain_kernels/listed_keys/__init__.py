"""Attention of segments of rows over a list of keys each, and over themselves."""

from sparsetrain_kernels.listed_keys.op import listed_attention, listed_attention_dense
from sparsetrain_kernels.listed_keys.skipped_rows import put_rows, take_rows

__all__ = ["listed_attention", "listed_attention_dense", "put_rows", "take_rows"]
