"""Full causal attention: the baseline of every sparse run, on the same training path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

from sparsetrain.methods.base import Expected, Method, MethodConfig
from sparsetrain.methods.costs import NO_PARAMETERS, AttentionCosts, AttentionRate, LayerShape
from sparsetrain.methods.dense_oracle import expected_at_the_start

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from torch import nn

    from sparsetrain.patterns import Pattern

RATE = AttentionRate(forward=(605e12, 463e12), backward=(540e12, 425e12))
"""SDPA with cuDNN at 32,768 tokens (heads of 128: 14.5 ms forward, 55.1 both) and 131,072 (heads of 64: 152, 566); one
H200, bf16, 2026-11-24, by the commands in docs/performance.md."""

BYTES = 8.06
"""Bytes for each element of the queries: 4,128 MiB for 131,072 tokens of 32 heads of 128 (cuDNN), at every length."""


class FullConfig(MethodConfig):
    """Every token reads all earlier tokens of its document."""

    method: Literal["full"] = "full"
    """Full causal attention."""

    def pattern(self, num_kv_heads: int = 1) -> None:
        """None: full attention has no blocks."""
        return None

    def build(self, num_kv_heads: int = 1) -> FullMethod:
        """Dense attention."""
        return FullMethod()

    def costs(self, shape: LayerShape) -> AttentionCosts:
        """The costs of cuDNN's kernels."""
        return AttentionCosts(RATE, BYTES * shape.heads * shape.head_dim, 0.0, False, NO_PARAMETERS)

    def pattern_drawn(self, length: int, num_kv_heads: int = 1) -> Pattern:
        """All earlier blocks, with a block size that gives about 64 blocks."""
        from sparsetrain.patterns import FullPattern

        return FullPattern(block=max(1, length // 64))


class FullMethod(Method):
    """Attends to every earlier token."""

    dense = True

    def density(self, length: int) -> float:
        """All causal pairs."""
        return 1.0

    def keys_read(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rows: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.keys_read`, bool ``[1, R, N]``: all keys up to the token itself."""
        import torch

        return (torch.arange(key.shape[2], device=key.device) <= rows[:, None])[None]

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.attend`."""
        from sparsetrain_kernels.dense import causal_attention

        return causal_attention(query, key, value, **options)

    def expected(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        document: slice,
        **options: Unpack[AttentionOptions],
    ) -> Expected:
        """See :meth:`Method.expected`: a causal mask over all pairs, at the first tokens of the document.

        ``query`` ``[1, Hq, N, D]``; ``key``, ``value`` ``[1, Hkv, N, D]``; fp64 output ``[1, Hq, R, D]``.
        """
        from sparsetrain_kernels import causal_attention_dense

        return expected_at_the_start(causal_attention_dense, query, key, value, document, options)
