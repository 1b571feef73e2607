"""Next-token predictions on packed rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sparsetrain.data import Batch
from sparsetrain.data.batch import IGNORE
from sparsetrain.modeling import has_plain_head, sparse_layers
from sparsetrain.modeling.attention.passes import planned_arguments

CHUNK = 2048
"""Number of positions whose logits are computed at once."""


def predictions(
    model: PreTrainedModel, batch: Batch, device: torch.device, num_chunks: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The model's predictions for every labelled token of a packed row, computed in chunks.

    The logits of the whole row never exist, unless the model changes them after its output projection (soft-capping,
    say) and so must compute them itself.

    Args:
        model: gone through :func:`sparsetrain.sparsify` (method ``full`` for dense attention), which teaches it
            ``cu_seqlens``; a plain transformers model does not know that argument.
        num_chunks: equal on all ranks. Under ZeRO-3 each use of the output projection gathers it, which all ranks must
            do together. A chunk may be empty.

    Yields:
        fp32 logits ``[c, vocabulary]``, the labels ``[c]`` they should predict, and the document ``[c]`` of each.
    """
    batch = batch.to(device)
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    labels = batch.labels[0, positions + 1]
    documents = torch.searchsorted(batch.cu_seqlens, positions.int(), right=True) - 1
    yield from zip(
        logits_at(model, batch, device, positions, num_chunks),
        labels.tensor_split(num_chunks),
        documents.tensor_split(num_chunks),
        strict=True,
    )


def logits_at(
    model: PreTrainedModel, batch: Batch, device: torch.device, positions: torch.Tensor, num_chunks: int
) -> Iterator[torch.Tensor]:
    """The model's logits at some positions of a packed row, computed in chunks; see :func:`predictions`.

    Args:
        positions: int64 ``[p]``, ascending, on ``device``.

    Yields:
        fp32 logits ``[c, vocabulary]``.
    """
    batch = batch.to(device)
    methods = [method for _, _, method in sparse_layers(model) if method is not None]
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "use_cache": False,
        **planned_arguments(methods, batch),
    }
    if has_plain_head(model):
        head = model.get_output_embeddings()
        hidden = model.get_decoder()(**inputs).last_hidden_state[0, positions]
        logits = (head(part) for part in hidden.tensor_split(num_chunks))
    else:
        logits = iter(model(**inputs).logits[0, positions].tensor_split(num_chunks))
    for part in logits:
        yield part.float()
