"""Attention over the first tokens, a window, and the tokens that SparseK selects."""

from sparsetrain_kernels.selected_keys.op import selected_attention, selected_attention_dense, sparsek_attention

__all__ = ["selected_attention", "selected_attention_dense", "sparsek_attention"]
