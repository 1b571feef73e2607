"""Tokenise long text in pieces, with the same result as for the whole text."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Rendered = tuple[list[int], list[tuple[int, int]]]
"""Tokens, and the half-open spans of them that carry loss."""

PIECE = 2**20
"""Characters tokenised at once. A tokenizer takes hundreds of bytes for each, and ends the process if it gets none."""
CONTEXT = 2**12
"""Characters around a cut that show whether tokens reach over it."""
LONG = 2**14
"""Characters of a text that is not tokenised again from its beginning for each place in it."""
LONGEST = 2**30
"""Characters of a document; a longer one is refused."""

REPORT_EVERY = 10.0
"""Seconds between two lines that say how far a long document is."""

# Between words, or where a line begins.
_CUTS = re.compile(r"(?<=\S)(?=\s)|(?<=\n)(?=\S)")
_CUTS_TRIED = 100


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of ``text`` without BOS and EOS, never truncated.

    Raises:
        MalformedRow: It is longer than :data:`LONGEST`, or has a stretch without white space that is too long to
            tokenise.
    """
    if len(text) <= PIECE:
        return _encode(tokenizer, text)
    if len(text) > LONGEST:
        raise MalformedRow(f"a document of {len(text):,} characters; cut it into ones of at most {LONGEST:,}")
    input_ids: list[int] = []
    start, reported = 0, time.monotonic()
    for stop in _cuts(tokenizer, text):
        if time.monotonic() - reported >= REPORT_EVERY:
            reported = time.monotonic()
            logger.info(
                "tokenising a document of %s characters: %.0f %% done", f"{len(text):,}", 100 * start / len(text)
            )
        before = text[max(0, start - CONTEXT) : start]
        input_ids += _encode_behind(tokenizer, before, text[start:stop])
        start = stop
    return input_ids


def _cuts(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[int]:
    """Positions about :data:`PIECE` apart that no token spans, and the end of the text."""
    start = 0
    while len(text) - start > PIECE:
        start = _cut(tokenizer, text, start)
        yield start
    yield len(text)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    end = start + PIECE
    for low, high in ((end - 16 * CONTEXT, end), (start + PIECE // 2, end), (end, end + 3 * PIECE)):
        places = [low + match.start() for match in _CUTS.finditer(text[low:high])]
        for place in places[: -_CUTS_TRIED - 1 : -1]:
            before, behind = text[place - CONTEXT : place], text[place : place + CONTEXT]
            known, whole = (_encode(tokenizer, part) for part in (before, before + behind))
            if whole[: len(known)] == known:
                return place
    if len(text) - start <= 4 * PIECE:
        return len(text)
    raise MalformedRow(
        f"the {4 * PIECE:,} characters from character {start:,} on have no white space at which they could be cut, and "
        f"no more than {PIECE:,} are tokenised at once"
    )


def _encode_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """The tokens of ``text`` after ``before``, if no token spans the boundary."""
    return _encode(tokenizer, before + text)[len(_encode(tokenizer, before)) :] if before else _encode(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenized(tokenizer, text)["input_ids"]


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, *, offsets: bool = False) -> BatchEncoding:
    """The tokenizer's output for ``text`` without special tokens, with ``offsets`` also the characters of each token.

    Raises:
        MalformedRow: The tokenizer fails, for example because its regular expression backtracks without end.
    """
    try:
        return tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=offsets, verbose=False
        )
    except BaseException as problem:
        # A panic of the Rust library; it is no Exception, and its class has no name that could be imported.
        if type(problem).__name__ != "PanicException":
            raise
        raise MalformedRow(f"the tokenizer fails on its text: {first_line(problem)}") from problem


class Stripped(NamedTuple):
    """A text, and whether it contains BOS and EOS itself."""

    text: str
    """With no more than one BOS at its beginning and one EOS at its end."""
    opened: bool
    """Whether it begins with BOS."""
    ended: bool
    """Whether it ends with EOS."""

    def empty(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether nothing stands between the two."""
        text = self.text.strip()
        text = text.removeprefix(str(tokenizer.bos_token)) if self.opened else text
        text = text.removesuffix(str(tokenizer.eos_token)) if self.ended else text
        return not text.strip()


def strip_ends(text: str, tokenizer: PreTrainedTokenizerBase, *, end: bool = True) -> Stripped:
    """Remove duplicate BOS and EOS, and white space outside of them, from a text that may have been rendered before.

    Args:
        end: Whether the text is the end of its document; otherwise an EOS at its end is kept.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    opened = bool(bos) and text.lstrip().startswith(bos) and _is_token(tokenizer, bos)
    while opened and (behind := text.lstrip()[len(bos) :].lstrip()).startswith(bos):
        text = behind
    text = text.lstrip() if opened else text
    ended = end and bool(eos) and text.rstrip().endswith(eos) and _is_token(tokenizer, eos)
    while ended and (before := text.rstrip().removesuffix(eos).rstrip()).endswith(eos):
        text = before
    return Stripped(text.rstrip() if ended else text, opened, ended)


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer takes this text for one special token."""
    found = _encode(tokenizer, text)
    return len(found) == 1 and found[0] in tokenizer.all_special_ids


def encode_after(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> list[int]:
    """The tokens that ``text`` adds after ``context``: sentencepiece adds a space before a text without context."""
    whole = encode(tokenizer, context + text)
    return whole[shared_prefix(encode(tokenizer, context), whole) :]


def shared_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """The length of the common prefix of two sequences."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def tokens_up_to(
    tokenizer: PreTrainedTokenizerBase, text: str, input_ids: Sequence[int], edges: Sequence[int]
) -> list[int]:
    """For positions in a text, the number of its tokens that equal those of the text up to there.

    A control token is never merged with preceding text. Therefore only the text after the last control token before a
    position is tokenised again.

    Args:
        input_ids: The tokens of the whole text.
    """
    anchors = _anchors(tokenizer, text, input_ids) if len(text) > LONG else []
    return [_tokens_up_to(tokenizer, text, input_ids, edge, anchors) for edge in edges]


def _tokens_up_to(
    tokenizer: PreTrainedTokenizerBase, text: str, input_ids: Sequence[int], edge: int, anchors: list[_Anchor]
) -> int:
    number = bisect_right(anchors, edge, key=lambda anchor: anchor.stop) - 1
    place, known = (anchors[number].start, anchors[number].token) if number >= 0 else (0, 0)
    found = encode(tokenizer, text[place:edge])
    if number >= 0 and found[:1] != [input_ids[known]]:
        place, known, found = 0, 0, encode(tokenizer, text[:edge])
    return known + shared_prefix(found, input_ids[known : known + len(found)])


class _Anchor(NamedTuple):
    """A control token in a text: its characters, and its number among the tokens."""

    start: int
    stop: int
    token: int


def _anchors(tokenizer: PreTrainedTokenizerBase, text: str, input_ids: Sequence[int]) -> list[_Anchor]:
    """The control tokens of a text; empty if their characters cannot be determined."""
    names = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not names:
        return []
    longest_first = sorted(names.values(), key=len, reverse=True)
    written = list(re.finditer("|".join(map(re.escape, longest_first)), text))
    tokens = [number for number, token in enumerate(input_ids) if token in names]
    if [names[input_ids[number]] for number in tokens] != [match.group() for match in written]:
        return []
    return [_Anchor(*match.span(), number) for match, number in zip(written, tokens)]


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
    """A digest of everything in the tokenizer that affects the tokens of rows."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # State from an earlier call of the tokenizer; rendering sets both itself.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    described = json.dumps([content, special, opening(tokenizer), tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
