"""Rotary embeddings whose frequencies depend on the length: choose the frequencies of each document separately.

Two kinds of rotary embedding choose their frequencies by the longest position of the call (``longrope``, as in Phi-3,
and ``dynamic``), and the second keeps them for later calls. A document packed or batched with a longer one would be
rotated with the other's frequencies. Here each document is rotated as it would be alone, which is what plain
transformers does with a single document, in a forward pass and in generation.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from sparsetrain.errors import ModelError


def rotate_each_document(decoder: nn.Module) -> None:
    """Make the length-dependent rotary embeddings of a decoder treat each document separately, in place."""
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if any(_depends_on_length(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])):
            module.forward = MethodType(_forward, module)


def _depends_on_length(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def _forward(module: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
    """Call the module's original forward once for each set of frequencies that the call needs.

    Args:
        position_ids: int64 ``[B, N]`` or ``[1, N]``.

    Returns:
        The result of the original forward: tensors ``[B, N, ...]``.
    """
    chosen = {} if layer_type is None else {"layer_type": layer_type}
    own = type(module).forward
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if not _depends_on_length(kind):
        return own(module, x, position_ids, **chosen)
    if position_ids.ndim != 2:
        raise ModelError(
            f"the {kind} rotary embedding chooses its frequencies by length, and positions of shape "
            f"{list(position_ids.shape)} do not give the lengths of documents; not supported"
        )
    lengths = _lengths_of_documents(position_ids)
    # Up to the model's original length, all documents share its original frequencies.
    original = _original_length(module, kind, layer_type)
    sets = lengths.where(lengths > original, 0)
    if kind == "longrope":
        _check_crossing(position_ids, original)
        sets = sets.clamp(max=original + 1)
    result: Any = None
    for each in sets.unique().tolist():
        mine = sets == each
        if kind != "longrope":
            _forget(module, x.device, layer_type)
        # Positions of other documents must not determine the longest position of this call.
        found = own(module, x, position_ids.where(mine, 0), **chosen)
        result = found if result is None else _join(mine[..., None], found, result)
    return result


def _check_crossing(position_ids: torch.Tensor, original: int) -> None:
    """Refuse a batch in which a generated row crosses the length at which frequencies change.

    A single row is processed again with the new frequencies; in a batch this does not happen.

    Raises:
        ModelError: A row of a batch crosses the length.
    """
    if position_ids.shape[0] > 1 and position_ids.shape[1] == 1 and bool((position_ids == original).any()):
        raise ModelError(
            f"a row of the batch grows beyond {original} tokens (original_max_position_embeddings), where the model "
            "chooses other rotary frequencies and its cached keys would keep the old ones; generate such rows one at a "
            "time"
        )


def _lengths_of_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """The length of each token's document: its last position plus one, int64 ``[B, N]``."""
    tokens = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    ends = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (0, 1), value=True)
    end = tokens.where(ends, position_ids.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return position_ids.gather(1, end) + 1


def _original_length(module: Any, kind: str, layer_type: str | None) -> int:
    if kind != "longrope":
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


def _forget(module: Any, device: torch.device, layer_type: str | None) -> None:
    """Restore the model's original frequencies."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = getattr(module, f"{prefix}original_inv_freq").to(device)
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _join(mine: torch.Tensor, found: Any, others: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(torch.where(mine, *pair) for pair in zip(found, others, strict=True))
    return torch.where(mine, found, others)
