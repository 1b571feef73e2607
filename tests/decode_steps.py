"""Prompts of several lengths, and what ``generate`` computes in each step behind them."""

from __future__ import annotations

from typing import Any

import torch


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded on the left."""
    torch.manual_seed(1)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(1, 97, (length,))
        mask[row, width - length :] = 1
    return ids, mask


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int = 12, **arguments: Any) -> Any:
    """Of every step, ``[B, count, vocabulary]``, the tokens, and the cache."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    return torch.stack(out.logits, dim=1), out.sequences[:, ids.shape[1] :], out.past_key_values
