"""SPARSEK, the differentiable top-k of SparseK attention (2406.16747), along one dimension of a tensor."""

from sparsetrain_kernels.sparsek_projection.op import sparsek, sparsek_threshold

__all__ = ["sparsek", "sparsek_threshold"]
