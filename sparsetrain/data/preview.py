"""What is read and learned of rows: lines for a log, and the text of a row with the learned spans marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparsetrain.counted import counted
from sparsetrain.data.document import IGNORE, PairTokens, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.data.batch import Row

SHOWN = 60
"""Tokens shown in a log of each stretch that is learned, or is not; of a longer one its ends."""
STRETCHES = 8
"""Stretches shown in a log."""


class Stretch(NamedTuple):
    """Neighbouring tokens of a document that are alike."""

    text: str
    learned: bool
    control: bool
    """Whether they are control tokens."""


def preview(label: str, form: str, tokens: Tokens | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines for a log.

    Args:
        label: the source's name.
        form: how its rows are read.
        tokens: its first document; None where it could not be read yet.
    """
    lines = [f"data: {label}: {form}"]
    if tokens is not None and len(tokens.input_ids):
        what = "pair" if isinstance(tokens, PairTokens) else "document"
        lines.append(f"data: {label}: first {what}, learned in «»: {marked(tokens, tokenizer)}")
    return lines


def describe_row(row: Row) -> str:
    """The numbers of a row: tokens, documents, and what is learned."""
    learned = int((row.labels != IGNORE).sum())
    return f"{counted(len(row.input_ids), 'token')}, {counted(len(row.lengths), 'document')}, {learned:,} learned"


def row_tokens(row: Row) -> Tokens:
    """The tokens of a row, and the spans of them with loss."""
    edges = np.flatnonzero(np.diff((row.labels != IGNORE).astype(np.int8), prepend=0, append=0)).tolist()
    return Tokens(row.input_ids, list(zip(edges[::2], edges[1::2], strict=True)))


def marked(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, *, whole: bool = False) -> str:
    """The text of a document with learned spans between « and »; on one line and shortened, unless ``whole``."""
    write = _text if whole else _shortened
    parts: list[str] = []
    place = 0
    for start, stop in tokens.targets:
        if start > place:
            parts.append(write(tokens.input_ids, place, start, tokenizer))
        parts.append(f"«{write(tokens.input_ids, start, stop, tokenizer)}»")
        place = stop
    if place < len(tokens.input_ids):
        parts.append(write(tokens.input_ids, place, len(tokens.input_ids), tokenizer))
    shown = len(parts) if whole else STRETCHES
    return "".join(parts[:shown]) + (" ..." if len(parts) > shown else "")


def stretches(
    input_ids: np.ndarray, labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, control: set[int]
) -> Iterator[Stretch]:
    """The text of a document in stretches.

    Args:
        input_ids, labels: integers ``[n]``; ``-100`` means no loss.
        control: the tokens that are no text.
    """
    kinds = (labels != IGNORE) * 2 + np.isin(input_ids, list(control))
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(input_ids)]
    for start, stop in pairwise(edges):
        if start < stop:
            yield Stretch(_text(input_ids, start, stop, tokenizer), bool(kinds[start] & 2), bool(kinds[start] & 1))


def _shortened(input_ids: np.ndarray, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    half = SHOWN // 2
    pieces = [(start, stop)] if stop - start <= SHOWN else [(start, start + half), (stop - half, stop)]
    text = " ... ".join(_text(input_ids, *piece, tokenizer) for piece in pieces)
    # Line ends and what would move a terminal's cursor are written out; other letters stay as they are.
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _text(input_ids: np.ndarray, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of some tokens as it stands behind the token before: sentencepiece writes no space at a beginning."""
    # The backend's own: that of transformers imports torch, which takes seconds.
    decode = tokenizer.backend_tokenizer.decode if tokenizer.is_fast else tokenizer.decode
    own, before = input_ids[start:stop].tolist(), input_ids[max(0, start - 1) : start].tolist()
    known, whole = (str(decode(ids, skip_special_tokens=False)) for ids in (before, [*before, *own]))
    return whole.removeprefix(known) if whole.startswith(known) else str(decode(own, skip_special_tokens=False))
