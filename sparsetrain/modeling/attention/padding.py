"""Rows with padding: each starts at its first real token, so that blocks of keys count from there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrain.errors import ModelError
from sparsetrain.modeling.attention.call import AttentionCall

Attend = Callable[..., Tensor]
"""``(query, key, value, **options)``."""


MADE_BY_GENERATE = (
    "Without a mask, generate makes one with zeros where the text holds pad_token_id, and so does an assistant_model, "
    "which is handed none: if those are real tokens, pass attention_mask=torch.ones_like(input_ids), and with an "
    "assistant pad_token_id=eos_token_id"
)


def attend_padded(attend: Attend, call: AttentionCall, padding: Tensor) -> Tensor:
    """Attention of padded rows, ``[B, Hq, N, D]``.

    Padding on the right needs nothing, as no earlier token sees it. Outputs at left padding are zero.

    Args:
        padding: bool ``[B, M]``, False on padding.
    """
    first, _ = _real_tokens(call, padding, call.keys)
    rows_by_start: dict[int, list[int]] = {}
    for row, start in enumerate(first):
        rows_by_start.setdefault(start, []).append(row)
    out = torch.zeros_like(call.query)
    for start, rows in rows_by_start.items():
        skipped = max(0, start - (call.keys - call.tokens))
        if skipped < call.tokens:
            # Extra inputs are of the tokens of this call, as queries are.
            out[rows, :, skipped:] = attend(
                call.query[rows, :, skipped:],
                call.key[rows, :, start:],
                call.value[rows, :, start:],
                cu_seqlens=None,
                q_start=None,
                **{name: tensor[rows, :, skipped:] for name, tensor in call.extra.items()},
            )
    return out


def left_padding(call: AttentionCall, padding: Tensor) -> list[int]:
    """Of each row, how many of the call's tokens are padding on its left, for a layer with a memory.

    Args:
        padding: bool ``[B, all tokens so far]``, False on padding.

    Raises:
        ModelError: there is padding elsewhere.
    """
    width = padding.shape[-1]
    first, last = _real_tokens(call, padding, width)
    if min(last) < width - 1:
        raise ModelError(
            "the batch is padded on the right, and what follows would see the padding; pad on the left. "
            f"{MADE_BY_GENERATE}"
        )
    return [max(0, start - (width - call.tokens)) for start in first]


def _real_tokens(call: AttentionCall, padding: Tensor, num_keys: int) -> tuple[list[int], list[int]]:
    """Index of the first and the last real token of each row among its keys, once it is sure that all between are."""
    if call.cu_seqlens is not None:
        raise ModelError("cu_seqlens is for packed rows without padding; drop the attention mask")
    if padding.shape[1] < num_keys:
        raise ModelError(f"the attention mask covers {padding.shape[1]} tokens, but there are {num_keys} keys")
    mask = padding[:, -num_keys:].int()
    first = mask.argmax(dim=1)
    last = num_keys - 1 - mask.flip(1).argmax(dim=1)
    real = mask.sum(dim=1)
    holey = (real > 0) & (real != last - first + 1)
    if bool(holey.any()):
        row = int(holey.nonzero()[0])
        hole = int(first[row]) + int(mask[row, first[row] :].argmin())
        raise ModelError(
            f"the attention mask has zeros between real tokens (row {row}, at token {hole}), and no key is left out in "
            "the middle of a row; leave such tokens out of the row, keep documents apart by position_ids that restart "
            "or cu_seqlens (transformers' DataCollatorWithFlattening makes such rows), and pad on the left or on the "
            f"right only. {MADE_BY_GENERATE}"
        )
    if call.position_ids is not None:
        both_real = mask[:, 1:].logical_and(mask[:, :-1])[:, 1 - call.tokens :]
        if call.tokens > 1 and bool(((call.position_ids.diff(dim=-1) != 1) & both_real).any()):
            raise ModelError("a padded row holds several documents (its positions restart); pack without padding")
    # A row that is nothing but padding so far starts after it.
    first = torch.where(real > 0, first, num_keys)
    return first.tolist(), torch.where(real > 0, last, num_keys - 1).tolist()
