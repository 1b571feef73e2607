"""Prompts as a batch for ``generate``, and where the texts behind them end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def left_padded(prompts: Sequence[Any], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 ``[prompts, tokens]``.

    Args:
        prompts: token ids of each, a sequence or an array ``[n]``; they may differ in length.
        padding: the token in front of shorter ones.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    return {end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)}


def line_breaks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that break the line."""
    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token for token, piece in enumerate(pieces) if "\n" in piece}


@contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """``generate`` fills what it is not given from the model's own generation config: penalties, sampling, chunks of a
    prompt, tokens never written. Within it there is none of that."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
