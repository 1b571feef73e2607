"""SPARSEK, the differentiable top-k of SparseK attention (2406.16747): of a vector, and of every causal prefix; and the
scores that compete there."""

from sparsetrain_kernels.sparsek.causal import causal_sparsek
from sparsetrain_kernels.sparsek.causal_selection import CausalSelection
from sparsetrain_kernels.sparsek.op import sparsek, sparsek_threshold
from sparsetrain_kernels.sparsek.placement import find_places, place_scores
from sparsetrain_kernels.sparsek.placement_reference import Moments, Places
from sparsetrain_kernels.sparsek.statistics import topk_statistics

__all__ = [
    "CausalSelection",
    "Moments",
    "Places",
    "causal_sparsek",
    "find_places",
    "place_scores",
    "sparsek",
    "sparsek_threshold",
    "topk_statistics",
]
