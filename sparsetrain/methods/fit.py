"""Weights that a method fits to text before training, in closed form, while the model attends densely."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Unpack

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions


class LayerFit(ABC):
    """The fit of one layer: it sees the layer's calls, and then writes the weights."""

    @abstractmethod
    def add(
        self,
        hidden: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> None:
        """Take in one call of the layer, which attends densely meanwhile.

        Args:
            hidden: the layer's input ``[B, N, width]``.
            query: ``[B, Hq, N, D]``.
            key, value: ``[B, Hkv, N, D]``.
            options: as in :meth:`~sparsetrain.methods.base.Method.attend`.
        """

    @abstractmethod
    def finish(self) -> None:
        """Write what was found into the layer's modules.

        Raises:
            ModelError: the calls told too little.
        """
