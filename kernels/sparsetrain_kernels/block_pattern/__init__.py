"""Causal attention over listed blocks of keys."""

from sparsetrain_kernels.block_pattern.op import block_pattern_attention, block_pattern_attention_dense
from sparsetrain_kernels.block_pattern.pattern import BlockPattern

__all__ = ["BlockPattern", "block_pattern_attention", "block_pattern_attention_dense"]
