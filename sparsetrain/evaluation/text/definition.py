"""What a loss on text was measured on, said beside the number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.data.tokens import HeldOut
    from sparsetrain.evaluation.text.windows import Windows

Documents = Literal["joined", "separate"]


class WindowCount(BaseModel):
    """The windows of one length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int
    """Windows with a token to score."""
    scored: int
    """Tokens scored."""
    mean_context: float
    """Mean number of tokens that precede a scored one in its window."""

    @classmethod
    def of(cls, windows: Windows) -> WindowCount:
        """Counts of windows."""
        return cls(
            windows=len(windows.kept), scored=len(windows.scored), mean_context=round(float(windows.context.mean()), 1)
        )


class TextDefinition(BaseModel):
    """All that a perplexity depends on beside the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    """The text."""
    digest: str
    """Equal for equal tokens, labels and documents."""
    tokenizer: str
    """Its name and number of tokens."""
    stride: int | None
    """Tokens by which a window advances; None where windows do not overlap."""
    bos: bool
    """Whether BOS precedes every window."""
    documents: Documents
    """Whether windows run over the ends of documents."""
    targets_only: bool
    """Whether only labelled tokens are scored: completions, turns of the assistant."""
    windows: dict[int, WindowCount]
    """Counts, by tokens of a window."""

    def same_tokens(self, other: TextDefinition) -> bool:
        """Whether the same tokens are scored with the same context, so that losses can be paired."""
        mine, theirs = (each.model_dump(exclude={"windows", "source", "tokenizer"}) for each in (self, other))
        return mine == theirs

    def rows(self) -> Rows:
        """A row for each length of windows."""
        header = [
            "window",
            "stride",
            "windows",
            "tokens scored",
            "mean context",
            "BOS",
            "documents",
            "tokenizer",
            "text",
        ]
        rows = [header]
        for length, count in self.windows.items():
            rows.append(
                [
                    f"{length:,}",
                    "none" if self.stride is None else f"{self.stride:,}",
                    f"{count.windows:,}",
                    f"{count.scored:,}" + (" (targets)" if self.targets_only else ""),
                    f"{count.mean_context:,.0f}",
                    "yes" if self.bos else "no",
                    self.documents,
                    self.tokenizer,
                    self.source,
                ]
            )
        return rows

    def words(self) -> str:
        """The definition in a few sentences."""
        if self.stride is None:
            how = "Windows do not overlap; the first token of a window is scored only behind BOS."
        else:
            how = (
                f"Windows advance by {self.stride:,} tokens, and only the new tokens are scored; of the first "
                "all but the first token."
            )
        over = (
            "documents joined, each ended by EOS" if self.documents == "joined" else "no window runs over two documents"
        )
        which = "Only labelled tokens are scored (completions, turns of the assistant)." if self.targets_only else ""
        return " ".join(part for part in (f"Text: {self.source}, {over}.", how, which) if part)


def definition_rows(definitions: Mapping[str, TextDefinition]) -> dict[str, Rows]:
    """What results scored, as tables by title: one, unless the settings were changed between them."""
    found: dict[str, TextDefinition] = {}
    for label, definition in definitions.items():
        if not any(definition == other for other in found.values()):
            found[label] = definition
    if len(found) == 1:
        return {"What was scored": next(iter(found.values())).rows()}
    return {f"What was scored from {label} on": definition.rows() for label, definition in found.items()}


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's name and size: that of its Hub repository, or of its folder."""
    name = str(tokenizer.name_or_path or type(tokenizer).__name__)
    name = Path(name).name if Path(name).exists() or name.startswith(("/", ".")) else name
    return f"{name} ({len(tokenizer):,} tokens)"


def define(
    text: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    windows: dict[int, Windows],
    *,
    source: str,
    stride: int | None = None,
    bos: bool = False,
    documents: Documents = "joined",
) -> TextDefinition:
    """The definition of what windows over a text score."""
    return TextDefinition(
        source=source,
        digest=text.digest,
        tokenizer=tokenizer_name(tokenizer),
        stride=stride,
        bos=bos,
        documents=documents,
        targets_only=not bool(text.targets.all()),
        windows={length: WindowCount.of(each) for length, each in windows.items()},
    )
