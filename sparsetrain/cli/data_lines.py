"""What ``sparsetrain data preview`` prints: of each source, of the mixture, and of each row."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from sparsetrain.counted import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.data import RowStream
    from sparsetrain.data.batch import Row
    from sparsetrain.data.survey import Survey
    from sparsetrain.recipe import Recipe

BARS = 30
"""Characters of the longest bar of a histogram."""
REASONS = 5
"""Reasons named for rows that cannot be read."""
STREAMED_ROWS = 1000
"""Rows packed to count what is drawn of each source, where there is no epoch."""


def print_source(console: Console, found: Survey, recipe: Recipe) -> None:
    """How a source is read, what of it is learned and left out, and how long its documents are."""
    length, source = recipe.sequence.length, found.source
    _say(console, f"{source.label}: {found.form}", "bold")
    total, learned = int(found.lengths.sum()), found.learned
    rows = f"first {found.rows:,} rows" if found.cut_off else counted(found.rows, "row")
    what = "document" if recipe.preference is None else "pair"
    documents = counted(len(found.lengths), what)
    _say(console, f"  {rows}, {documents}, {total:,} tokens, {learned:,} learned ({learned / max(1, total):.1%})")
    for reason, count in found.faults.most_common(REASONS):
        _say(console, f"  cannot be read: {counted(count, 'row')}, such as {found.examples[reason]}", "yellow")
    if len(found.faults) > REASONS:
        _say(console, f"  cannot be read for other reasons: {len(found.faults) - REASONS} kinds of rows", "yellow")
    if found.empty:
        _say(console, f"  left out: {counted(found.empty, 'row')}, empty or with nothing selected to learn", "yellow")
    if found.without_target:
        _say(console, f"  nothing to learn: {counted(found.without_target, what)}", "yellow")
    if longer := found.longer_than(length):
        done = {"split": "split over several rows", "truncate": "truncated to one row", "drop": "dropped"}
        how = f"{done[recipe.data.long_documents]} (data.long_documents={recipe.data.long_documents})"
        _say(console, f"  longer than sequence.length={length:,}: {counted(longer, what)}, {how}", "yellow")
    for line in _histogram(found.lengths):
        _say(console, f"  {line}")


def _histogram(lengths: Any) -> list[str]:
    """Documents by length, in lines; each bucket ends at a power of two."""
    if not len(lengths):
        return []
    import numpy as np

    exponents = np.ceil(np.log2(lengths)).astype(int)
    buckets = range(int(exponents.min()), int(exponents.max()) + 1)
    counts = [int((exponents == each).sum()) for each in buckets]
    width, digits = len(f"{2 ** buckets[-1]:,}"), len(f"{max(counts):,}")
    middle = ", ".join(f"{share} % {int(np.percentile(lengths, share)):,}" for share in (50, 90, 99))
    lines = [
        f"up to {2**each:>{width},} tokens {count:>{digits},} {'#' * -(-BARS * count // max(counts))}".rstrip()
        for each, count in zip(buckets, counts)
    ]
    return [f"lengths: {middle}, longest {int(lengths.max()):,}", *lines]


def print_mixture(console: Console, stream: RowStream, recipe: Recipe, read: dict[str, Survey]) -> None:
    """An epoch, or the first rows where there is none, and what of it comes from each source."""
    sources = recipe.data.sources
    mapped = all(not source.streaming for source in sources) and any(source.path for source in sources)
    count = stream.count(None if mapped else STREAMED_ROWS)
    length = recipe.sequence.length
    what = "an epoch is" if mapped else "of the data, which has no end, the first"
    fill = count.tokens / (count.rows * length)
    _say(
        console,
        f"{what} {counted(count.rows, 'row')} of {length:,} tokens: {count.tokens:,} tokens, {fill:.1%} full",
        "bold",
    )
    for label, passes in count.passes.items():
        if passes and label in read:
            again = f"read {passes + 1:,} times for these rows: a stream begins again at its end"
            _say(console, f"  {label}: {counted(len(read[label].lengths), 'document')}, {again}", "yellow")
    shares = recipe.data.shares()
    for source, share in zip(sources, shares) if len(sources) > 1 else ():
        tokens = count.by_source[source.label]
        _say(console, f"  {source.label}: {tokens / count.tokens:.1%} of the tokens, {share:.1%} of the draws")


def places_of(rows: list[Row], read: dict[str, Survey]) -> dict[str, str]:
    """Where the documents of rows are, by their origin; those of synthetic tasks are nowhere."""
    found: dict[str, dict[str, tuple[int, str]]] = {}
    for origin in (origin for row in rows for origin in row.origin):
        parts = re.fullmatch(r"(.*):(\d+)(?:@(\d+))?", origin, re.S)
        if parts and parts[1] in read:
            found.setdefault(parts[1], {})[origin] = (int(parts[2]), parts[3])
    here, places = f"{os.getcwd()}{os.sep}", {}
    for label, documents in found.items():
        known = read[label].places({number for number, _ in documents.values()})
        for origin, (number, start) in documents.items():
            place = known[number].removeprefix(here)
            # Of a Hub data set the number of the row is all.
            place = f"{label}, {place}" if place.startswith("row ") else place
            places[origin] = f"{place}, from token {int(start):,} on" if start else place
    return places


def print_row(
    console: Console,
    number: int,
    row: Row,
    places: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    shown: int,
    *,
    pairs: bool,
) -> None:
    """The documents of a row, with what is learned of them.

    Args:
        places: where documents are, by their origin, as :func:`places_of` has them.
        shown: tokens at most, half from the beginning; 0 shows all.
        pairs: its documents are pairs of answers.
    """
    from sparsetrain.data.ending import control_tokens
    from sparsetrain.data.preview import describe_row, stretches

    _say(console, f"row {number}: {describe_row(row)}", "bold")
    control, place, left_out = control_tokens(tokenizer), 0, 0
    for document, (name, size) in enumerate(zip(row.origin, row.lengths), 1):
        end = place + size
        parts = _shown_parts(place, end, shown, len(row.input_ids))
        left_out += size - sum(stop - start for start, stop in parts)
        if parts:
            # The answers of a pair are neighbours.
            answer = ("rejected", "chosen")[document % 2] + " of " if pairs else ""
            _say(console, f"-- document {document}: {answer}{places.get(name, name)}, {size:,} tokens", "cyan")
        for start, stop in parts:
            if start > place:
                _say(console, "...", "cyan")
            text = stretches(row.input_ids[start:stop], row.labels[start:stop], tokenizer, control)
            console.print(_styled(text, console.is_terminal))
        if parts and parts[-1][1] < end:
            _say(console, "...", "cyan")
        place = end
    if left_out:
        _say(console, f"-- {left_out:,} tokens in the middle are not shown; --tokens 0 shows all", "cyan")


def _shown_parts(start: int, stop: int, shown: int, total: int) -> list[tuple[int, int]]:
    """What is shown of a document from ``start`` to ``stop`` of a row of ``total`` tokens: what lies in the first or in
    the last half of ``shown`` tokens; all if ``shown`` is 0."""
    if not shown or total <= shown:
        return [(start, stop)]
    half = shown // 2
    parts = [(max(start, first), min(stop, last)) for first, last in ((0, half), (total - half, total))]
    return [(first, last) for first, last in parts if first < last]


def _styled(parts: Any, colour: bool) -> Text:
    from rich.text import Text

    text, learned = Text(), False
    for part in parts:
        if not colour and part.learned != learned:
            text.append("«" if part.learned else "»")
        learned = part.learned
        style = ("green" if part.learned else "") + (" reverse" if part.control else "")
        text.append(_visible(part.text), style=style.strip() if colour else "")
    if learned and not colour:
        text.append("»")
    return text


def _visible(text: str) -> str:
    """The text with what would move a terminal's cursor written out, except line ends."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def _say(console: Console, line: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(_visible(line), style=style))
