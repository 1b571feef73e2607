"""Token perplexity by context length, and loss against position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsetrain.errors import DataError, RecipeError
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.text.definition import define
from sparsetrain.evaluation.text.losses import Losses, joined_losses, row_losses
from sparsetrain.evaluation.text.perplexity import PerplexityResult
from sparsetrain.evaluation.text.positions import Spacing, buckets
from sparsetrain.evaluation.text.section import TextSection
from sparsetrain.section import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.evaluation.text.windows import Scored
    from sparsetrain.world import World


class PerplexitySection(TextSection):
    """Token perplexity by context length: ``exp`` of the mean NLL over windows of each length."""

    result = PerplexityResult

    task: Literal["perplexity"] = "perplexity"
    """Perplexity by context length."""
    stride: Tokens | None = None
    """Tokens by which a window advances; only the new ones are scored, so that each has at least ``length - stride``
    before it (256 in many papers). Null: windows do not overlap; a token has half a window before it in the mean."""
    positions: Spacing = "log"
    """Buckets of the loss against position in the longest windows: ``log`` doubles their width, ``even`` makes 16
    equal ones."""
    trailing: Annotated[float, Field(gt=0.0, le=1.0)] = 0.0625
    """Share of the longest windows, at their end, of which the trailing loss is taken."""

    @classmethod
    def suggested(cls, lengths: list[int]) -> dict[str, Any]:
        """The sources of Python's library that no shipped recipe trains on."""
        source = {"path": "python-stdlib", "split": "validation"}
        return {"lengths": lengths, "tokens": max(65536, *lengths), "source": source}

    def faults(self) -> Iterator[tuple[str, str]]:
        """A stride that passes over tokens too."""
        yield from super().faults()
        most = min(self.lengths) - self.bos
        if self.stride is not None and self.stride > most:
            yield (
                "stride",
                f"windows of {min(self.lengths)} tokens{' with BOS' if self.bos else ''} would pass over tokens; give "
                f"at most {most}, or null for windows that do not overlap",
            )

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Perplexity:
        """The held-out tokens, read."""
        return Perplexity(self, tokenizer)


class Perplexity(BatchedTask):
    """Perplexity of one text, cut into windows of each length (:class:`~sparsetrain.evaluation.text.windows.Windows`).

    The same text is scored at every length (its last window may be shorter). A token that nothing precedes in its
    window is not scored.

    Raises:
        RecipeError: a length is longer than the text, or too short to score anything.
        DataError: the source cannot be read, holds fewer tokens than asked for, or none that is scored.
    """

    def __init__(self, section: PerplexitySection, tokenizer: PreTrainedTokenizerBase) -> None:
        from sparsetrain.data.tokens import held_out_tokens
        from sparsetrain.evaluation.text.windows import Windows

        for length in section.lengths:
            if not 2 <= length <= section.tokens:
                raise RecipeError(
                    f"{section.path('lengths')}: a window of {length} tokens is not between 2 and "
                    f"{section.path('tokens')} ({section.tokens}); change one of the two"
                )
        section.try_inputs(tokenizer)
        self.section = section
        text = held_out_tokens(section.source, tokenizer, section.tokens)
        lengths = sorted(set(section.lengths))
        stretches = None if section.documents == "joined" else text.documents
        if stretches is not None:
            _check_documents(section, lengths[-1], stretches)
        # Short windows share a row, so that every row costs about as much as one window of the greatest length.
        self.windows = {
            length: Windows(
                text,
                length,
                section.stride,
                bos=tokenizer.bos_token_id if section.bos else None,
                stretches=stretches,
                row_tokens=lengths[-1],
            )
            for length in lengths
        }
        self.definition = define(
            text,
            tokenizer,
            self.windows,
            source=section.source.label,
            stride=section.stride,
            bos=section.bos,
            documents=section.documents,
        )

    def batches(self) -> dict[str, list[Scored]]:
        """A row at a time, by length."""
        return {str(length): windows.rows for length, windows in self.windows.items()}

    def measure_batch(self, model: PreTrainedModel, batch: Scored, world: World) -> str:
        """The loss of each token of a row."""
        return row_losses(model, self.windows[batch.length], batch, world.device)

    def result(self, records: Mapping[str, Sequence[str]]) -> PerplexityResult:
        """Perplexity by length, and losses by position at the greatest."""
        losses = {length: joined_losses(records[str(length)]) for length in self.windows}
        longest = max(losses)
        context = self.windows[longest].context
        # Of a window of W tokens the last has W - 1 before it.
        begin = min(longest - 1, math.floor(longest * (1 - self.section.trailing)))
        last = losses[longest][context >= begin]
        summed = {length: Losses.of(found) for length, found in losses.items()}
        return PerplexityResult(
            perplexity={length: each.perplexity() for length, each in summed.items()},
            tokens=self.section.tokens,
            definition=self.definition,
            losses=summed,
            positions=buckets(losses[longest], context, longest, self.section.positions),
            trailing=Losses.of(last) if len(last) else None,
            trailing_from=begin,
        )


def _check_documents(section: PerplexitySection, longest: int, documents: list[tuple[int, int]]) -> None:
    """Refuse windows that no document fills: all lengths beyond would give the same number."""
    most = max(last - first for first, last in documents) + section.bos
    if most < longest:
        raise DataError(
            f"{section.path('lengths')}: no document among the first {section.tokens:,} tokens of "
            f"{section.source.label!r} fills a window of {longest:,}; the longest has {most:,}. Give shorter lengths, "
            f"read more tokens, or set {section.path('documents')}=joined"
        )
