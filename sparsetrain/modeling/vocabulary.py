"""Add a recipe's tokens to a tokenizer, and rows for them to its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparsetrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import ModelSection

MULTIPLE = 64
"""A larger embedding gets a multiple of so many rows: matrix kernels are faster then."""
NOISE = 0.01
"""Noise of new rows, as a share of the spread of the others: equal rows would stay alike."""


def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: ModelSection, new: list[str]
) -> None:
    """Give a model rows for ``model.add_tokens``, in place.

    Spare rows are used; if there are too few, embedding and head grow to a multiple of :data:`MULTIPLE`. New rows begin
    at the mean of the others, with a little noise that depends on the shape alone.

    Args:
        new: The tokens that the tokenizer did not have.

    Raises:
        ModelError: The model cannot have more rows.
    """
    if not section.add_tokens:
        return
    config = model.config.get_text_config(decoder=True)
    ids: Any = tokenizer.convert_tokens_to_ids(section.add_tokens)
    model.added_token_ids = list(ids)  # type: ignore[assignment]
    before, most = config.vocab_size, max(ids) + 1
    if most > before:
        model.resize_token_embeddings(-(-most // MULTIPLE) * MULTIPLE, mean_resizing=False)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = len(embedding.weight)
    begun: Any = tokenizer.convert_tokens_to_ids(new)
    if fresh := sorted({*begun, *range(before, rows)}):
        _begin(embedding, fresh)
        if head is not None and head.weight is not embedding.weight:
            _begin(head, fresh)
    if rows < most:
        raise ModelError(f"model.add_tokens: {type(model).__name__} cannot take more tokens than {before:,}")


def added_token_ids(model: PreTrainedModel) -> list[int]:
    """The ids of ``model.add_tokens`` in a model that :func:`fit_vocabulary` has fitted; empty if there are none."""
    return list(getattr(model, "added_token_ids", ()))


def _begin(layer: Any, fresh: list[int]) -> None:
    weight = layer.weight.detach()
    if weight.device.type == "meta":
        return
    old = torch.ones(len(weight), dtype=torch.bool)
    old[fresh] = False
    known = weight[old].float()
    mean, spread = known.mean(0), known.std(0)
    draws = torch.randn((len(fresh), weight.shape[1]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight[fresh] = (mean + NOISE * spread * draws).to(weight.dtype)
        if getattr(layer, "bias", None) is not None:
            layer.bias[fresh] = layer.bias[old].mean()
