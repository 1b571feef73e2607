"""Check lengths against the positions that a model supports: its config's limit, and tables of learned positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.recipe.heads import positions_fault

MOST_OFFSET = 2
"""Rows that some tables (OPT's) have before the row of the first position."""


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Refuse rows longer than ``max_position_embeddings`` of the model's config.

    Rotary positions would work beyond it, but the exported config would be wrong; learned positions end there.

    Raises:
        ModelError: The rows are longer; names both numbers and the setting.
    """
    check_learned_positions(model, {"sequence.length": [length]})
    fault = positions_fault(length, position_limit(model))
    if fault is not None:
        raise ModelError(f"sequence.length={fault}")


def check_learned_positions(model: PreTrainedModel, lengths: Mapping[str, Sequence[int]]) -> None:
    """Refuse lengths beyond a table of learned positions.

    Args:
        lengths: Sequence lengths in tokens, by the setting that asks for them.

    Raises:
        ModelError: A length is too large; names the setting, the length and the table.
    """
    limit, table = position_limit(model), _table(model)
    for field, asked in lengths.items():
        if table is not None and limit is not None and max(asked, default=0) > limit:
            raise ModelError(
                f"{field}: {max(asked)} tokens exceed the {limit} learned positions of the model ({table}); "
                f"use at most {limit} tokens, or a model with rotary positions"
            )


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions that the config of a model's decoder gives it; None if it gives no number."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _table(model: PreTrainedModel) -> str | None:
    """The name of the table of learned positions; None if there is none."""
    limit = position_limit(model)
    if limit is None:
        return None
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        learned = isinstance(module, nn.Embedding) and ("position" in own or own == "wpe")
        if learned and limit <= module.num_embeddings <= limit + MOST_OFFSET:
            return name
    return None
