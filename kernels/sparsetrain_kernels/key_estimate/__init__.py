"""Which keys matter to a query: scores from 4-bit codes, upper bounds of 16 tokens, and the exact weights."""

from sparsetrain_kernels.key_estimate.op import center_logits, estimate_scores, key_weights, page_scores

__all__ = ["center_logits", "estimate_scores", "key_weights", "page_scores"]
