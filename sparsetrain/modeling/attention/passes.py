"""What a method needs to know about the documents of a pass, on its way from the batch to the layers.

It travels as a keyword argument, like ``cu_seqlens``, so that layers which are recomputed get it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from sparsetrain.methods.base import Method, PassDocuments

PLANNED_ARGUMENT = "sparsetrain_planned"
"""Keyword argument that passes the result of :meth:`~sparsetrain.methods.base.Method.plan_pass` to the layers."""


class PackedRow(Protocol):
    """A batch of packed documents, such as :class:`~sparsetrain.data.batch.Batch`."""

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 ``[documents + 1]``."""

    @property
    def prompts(self) -> Sequence[int]:
        """Tokens of each document before its first target."""

    @property
    def origin(self) -> Sequence[str]:
        """Name of each document."""


def planned_arguments(
    methods: Iterable[Method], row: PackedRow, *, seed: int | None = None, step: int = 0
) -> dict[str, Any]:
    """Arguments of a model's forward by which its layers learn about the documents of a row.

    Args:
        methods: those of the model's layers; a model has one.
        row: the documents, of the whole sequence where ranks share it.
        seed: of a training pass; None in evaluation.
        step: of a training pass, 0-based.

    Returns:
        Empty if the method needs nothing.
    """
    for method in methods:
        if method.pass_input is not None:
            bounds = row.cu_seqlens.tolist()
            found = method.plan_pass(PassDocuments(bounds, row.prompts, row.origin, seed, step))
            return {} if found is None else {PLANNED_ARGUMENT: found}
    return {}
