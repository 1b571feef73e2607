"""The settings that tasks on running text share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsetrain.errors import DataError
from sparsetrain.evaluation.base import TaskSection
from sparsetrain.evaluation.text.definition import Documents
from sparsetrain.section import MOST_LISTED, Bounds, Tokens
from sparsetrain.source_section import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextSection(TaskSection):
    """Windows of each length over held-out text."""

    writes = False

    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)]
    """Tokens of a window."""
    source: DataSource
    """Held-out documents, read in order. Where rows have labels (completions, turns of the assistant), only those
    tokens are scored."""
    tokens: Annotated[int, Field(gt=0), Bounds(10**10, "they are scored one window after another")] = 65536
    """Tokens to read. All are scored at each length, unless rows have labels or a task says otherwise."""
    documents: Documents = "joined"
    """``joined``: windows run over all documents. ``separate``: they begin anew with each document."""
    bos: bool = False
    """Put BOS before every window, as its first token."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """A source without text, or fewer tokens than a window has."""
        yield from super().faults()
        if self.source.synthetic is not None:
            yield "source.synthetic", f"{self.task} is measured on text, not on a synthetic task; give path"
        if max(self.lengths) > self.tokens:
            yield "tokens", f"{self.tokens} tokens hold no window of {self.path('lengths')}={max(self.lengths)}"

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The windows."""
        return {"lengths": self.lengths}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Whether there is the BOS that is asked for."""
        if self.bos and tokenizer.bos_token_id is None:
            raise DataError(f"{self.path('bos')}: the tokenizer has no BOS token; leave it out")
