"""How many positions a model has: rotary ones go on, and a table of learned ones ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.recipe.heads import positions_fault

MOST_OFFSET = 2
"""Rows that some tables (OPT's) have before that of the first position."""


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Refuse rows longer than the model's config says it can read: rotary positions would go on, but what is exported
    would not say so, and learned positions would run out.

    Raises:
        ModelError: names both numbers and the setting.
    """
    check_learned_positions(model, {"sequence.length": [length]})
    fault = positions_fault(length, _limit(model))
    if fault is not None:
        raise ModelError(f"sequence.length={fault}")


def check_learned_positions(model: PreTrainedModel, lengths: Mapping[str, Sequence[int]]) -> None:
    """Refuse lengths beyond a table of learned positions.

    Args:
        lengths: how many tokens the model is to see at once, by the setting that says so.

    Raises:
        ModelError: names the setting, the length, and the table.
    """
    limit, table = _limit(model), _table(model)
    for field, asked in lengths.items():
        if table is not None and limit is not None and max(asked, default=0) > limit:
            raise ModelError(
                f"{field}: {max(asked)} is beyond the {limit} learned positions of the model ({table}), which end "
                f"there; ask for at most {limit} tokens, or take a model of rotary positions"
            )


def _limit(model: PreTrainedModel) -> int | None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _table(model: PreTrainedModel) -> str | None:
    """The name of the table of learned positions; None where there is none."""
    limit = _limit(model)
    if limit is None:
        return None
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        learned = isinstance(module, nn.Embedding) and ("position" in own or own == "wpe")
        if learned and limit <= module.num_embeddings <= limit + MOST_OFFSET:
            return name
    return None
