"""A preview of how rows are read: the form, and a document with the learned spans marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsetrain.data.document import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 60
"""Tokens shown of each stretch that is learned, or is not; of a longer one its ends."""
STRETCHES = 8
"""Stretches shown."""


def preview(label: str, form: str, tokens: Tokens | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines for a log.

    Args:
        label: the source's name.
        form: how its rows are read.
        tokens: its first document; None where it could not be read yet.
    """
    lines = [f"data: {label}: {form}"]
    if tokens is not None and len(tokens.input_ids):
        lines.append(f"data: {label}: first document, learned in «»: {marked(tokens, tokenizer)}")
    return lines


def marked(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a document on one line, with learned spans between « and », and long spans shortened."""
    parts: list[str] = []
    place = 0
    for start, stop in tokens.targets:
        if start > place:
            parts.append(_text(tokens, place, start, tokenizer))
        parts.append(f"«{_text(tokens, start, stop, tokenizer)}»")
        place = stop
    if place < len(tokens.input_ids):
        parts.append(_text(tokens, place, len(tokens.input_ids), tokenizer))
    return "".join(parts[:STRETCHES]) + (" ..." if len(parts) > STRETCHES else "")


def _text(tokens: Tokens, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokens.input_ids[start:stop].tolist()
    half = SHOWN // 2
    pieces = [ids] if len(ids) <= SHOWN else [ids[:half], ids[-half:]]
    # The backend's own: that of transformers imports torch, which takes seconds.
    decode = tokenizer.backend_tokenizer.decode if tokenizer.is_fast else tokenizer.decode
    text = " ... ".join(str(decode(piece, skip_special_tokens=False)) for piece in pieces)
    # Line ends and what would move a terminal's cursor are written out; other letters stay as they are.
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
