"""Add a recipe's control tokens to a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Add tokens that are never split or merged with text; returns those that the tokenizer did not have."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab() if tokens else {}
    new = [token for token in tokens if token not in known]
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return new
