"""Decoding: attention of the last few tokens of each sequence over a list of keys of its paged cache."""

from sparsetrain_kernels.list_decode.op import listed_decode

__all__ = ["listed_decode"]
