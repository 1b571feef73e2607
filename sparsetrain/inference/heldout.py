"""Held-out text for ``sparsetrain calibrate``: stretches of tokens of one length, from a text or a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrain.data.values import keyed_once
from sparsetrain.errors import DataError, first_line
from sparsetrain.textfile import text_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 8
"""Stretches that are taken."""
USUAL = 4096
"""Tokens of a stretch where no number is given and there are so many."""
PAGE = 16
"""Lengths that nobody has asked for are multiples of it."""


def stretches(
    file: Path, tokenizer: PreTrainedTokenizerBase, tokens: int | None, positions: int | None
) -> list[list[int]]:
    """The first stretches of a file, token ids, all of one length; what is left of a text is not used.

    Args:
        file: a ``.jsonl`` with ``text`` in every line; any other file is one text.
        tokens: of each; None means 4,096, or as many as the model has positions or the longest text has tokens.
        positions: that the model has; None means without an end.

    Raises:
        DataError: the file cannot be read, the model has fewer positions, or no text is so long.
    """
    if tokens is not None and positions is not None and tokens > positions:
        raise DataError(
            f"--tokens {tokens} are more than the {positions} positions of the model (max_position_embeddings); set it "
            f"to at most {positions}"
        )
    length = tokens or min(USUAL, positions or USUAL)
    found: list[list[int]] = []
    longest: list[int] = []
    for text in _texts(file):
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        longest = max(longest, ids, key=len)
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        if len(found) >= MOST:
            return found[:MOST]
    if found:
        return found
    if tokens is not None or len(longest) < PAGE:
        raise DataError(
            f"--data {file}: its longest text has {len(longest):,} tokens, and "
            + (f"--tokens {tokens:,} are needed; lower it, or give longer text" if tokens else "more are needed")
        )
    return [longest[: len(longest) // PAGE * PAGE]]


def _texts(file: Path) -> Iterator[str]:
    """The texts of a file, one at a time."""
    called = f"--data {file}"
    lines = text_lines(file, called, DataError)
    if file.suffix != ".jsonl":
        yield "".join(lines)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _text(line, f"{called}, line {number}")


def _text(line: str, place: str) -> str:
    try:
        row = json.loads(line, object_pairs_hook=keyed_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {first_line(error)}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f'{place}: expected an object with a text, such as {{"text": "..."}}; rename its column to text'
        )
    return text
