"""Tokenising text in pieces, so that the pieces joined are the tokens of the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of ``text`` alone: no BOS, no EOS, nothing cut."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def encode_after(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> list[int]:
    """The tokens that ``text`` adds behind ``context``: sentencepiece puts a space before a text that stands alone."""
    whole = encode(tokenizer, context + text)
    return whole[shared_prefix(encode(tokenizer, context), whole) :]


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the beginning."""
    shortest = min(len(left), len(right))
    return next((i for i in range(shortest) if left[i] != right[i]), shortest)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[BOS]`` where the tokenizer itself starts every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("", verbose=False)["input_ids"][:1] == [bos] else []


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The EOS token.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, which ends every document; set eos_token in its config")
    return tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how this tokenizer turns rows into tokens."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by whoever called the tokenizer last; rendering sets both itself.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    described = json.dumps([content, special, opening(tokenizer), tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
