"""Which keys matter to a query, from little of the cache: scores from 4-bit codes, upper bounds of 16 tokens."""

from sparsetrain_kernels.key_estimate.op import center_logits, estimate_scores, page_scores

__all__ = ["center_logits", "estimate_scores", "page_scores"]
