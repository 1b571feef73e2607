"""Tokens into a paged cache, with what finds the important keys in it: 4-bit codes of every key, bounds of every 16."""

from sparsetrain_kernels.key_mirror.layout import KeyMirror, PageBounds
from sparsetrain_kernels.key_mirror.op import append_codes, append_tokens
from sparsetrain_kernels.key_mirror.statistics import key_statistics

__all__ = ["KeyMirror", "PageBounds", "append_codes", "append_tokens", "key_statistics"]
