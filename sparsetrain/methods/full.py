"""Full causal attention: the control every sparse run is compared with, on the same training path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

from sparsetrain.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from torch import nn


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


class FullMethod(Method):
    """Attends to every earlier token."""

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
