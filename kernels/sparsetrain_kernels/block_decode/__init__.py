"""Decoding: attention of the last few tokens of each sequence over the listed blocks of its key-value cache."""

from sparsetrain_kernels.block_decode.op import block_pattern_decode, prepare_block_decode

__all__ = ["block_pattern_decode", "prepare_block_decode"]
