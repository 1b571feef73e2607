"""Differentiable attention operations: tensors in, tensors out. They know no model, no recipe, no Hugging Face."""

from sparsetrain_kernels.block_decode import block_pattern_decode
from sparsetrain_kernels.block_pattern import BlockPattern, block_pattern_attention, block_pattern_attention_dense
from sparsetrain_kernels.causal_selection import CausalSelection, causal_sparsek
from sparsetrain_kernels.dense import causal_attention, causal_attention_dense
from sparsetrain_kernels.key_choice import top_k_keys, top_p_keys
from sparsetrain_kernels.key_estimate import center_logits, estimate_scores, key_weights, page_scores
from sparsetrain_kernels.key_mirror import KeyMirror, PageBounds, append_codes, append_tokens, key_statistics
from sparsetrain_kernels.list_decode import listed_decode
from sparsetrain_kernels.listed_keys import listed_attention, listed_attention_dense, put_rows, take_rows
from sparsetrain_kernels.selected_keys import selected_attention, selected_attention_dense, sparsek_attention
from sparsetrain_kernels.sparsek_decode import SparseKSlots, sparsek_decode_attention, sparsek_decode_update
from sparsetrain_kernels.sparsek_projection import sparsek, sparsek_threshold
from sparsetrain_kernels.top_p_selection import PositionLists, top_k_lists, top_p_lists
from sparsetrain_kernels.top_p_softmax import top_p_attention

__all__ = [
    "BlockPattern",
    "CausalSelection",
    "KeyMirror",
    "PageBounds",
    "PositionLists",
    "SparseKSlots",
    "append_codes",
    "append_tokens",
    "block_pattern_attention",
    "block_pattern_attention_dense",
    "block_pattern_decode",
    "causal_attention",
    "causal_attention_dense",
    "causal_sparsek",
    "center_logits",
    "estimate_scores",
    "key_statistics",
    "key_weights",
    "listed_attention",
    "listed_attention_dense",
    "listed_decode",
    "page_scores",
    "put_rows",
    "selected_attention",
    "selected_attention_dense",
    "sparsek",
    "sparsek_attention",
    "sparsek_decode_attention",
    "sparsek_decode_update",
    "sparsek_threshold",
    "take_rows",
    "top_k_keys",
    "top_k_lists",
    "top_p_attention",
    "top_p_keys",
    "top_p_lists",
]
