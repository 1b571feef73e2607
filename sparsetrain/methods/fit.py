"""The interface for fitting a method's weights to text before training, in closed form, with dense attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Unpack

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions


class LayerFit(ABC):
    """The fit of one layer: it collects the layer's calls, and then writes the weights."""

    @abstractmethod
    def add(
        self,
        hidden: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> None:
        """Add one call of the layer, which uses dense attention during the fit.

        Args:
            hidden: The layer's input ``[B, N, hidden_size]``.
            query: ``[B, Hq, N, D]``.
            key, value: ``[B, Hkv, N, D]``.
            options: As in :meth:`~sparsetrain.methods.base.Method.attend`.
        """

    @abstractmethod
    def finish(self) -> None:
        """Solve the fit and write the weights into the layer's modules.

        Raises:
            ModelError: The calls have too few usable tokens.
        """
