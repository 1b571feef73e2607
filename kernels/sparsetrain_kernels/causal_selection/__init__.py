"""SPARSEK of every causal prefix: the keys that each row selects, and its threshold (2406.16747, section 3.2)."""

from sparsetrain_kernels.causal_selection.op import causal_sparsek
from sparsetrain_kernels.causal_selection.selection import CausalSelection
from sparsetrain_kernels.causal_selection.statistics import topk_statistics

__all__ = ["CausalSelection", "causal_sparsek", "topk_statistics"]
