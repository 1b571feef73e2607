"""Loss on key tokens (LongPPL, 2410.23771): those that a long context makes likely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsetrain.errors import DataError, RecipeError
from sparsetrain.evaluation.base import TaskResult
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.text.definition import define
from sparsetrain.evaluation.text.key_tokens import FIRST, ITSELF, Choice, KeyTokensResult, pack, unpack
from sparsetrain.evaluation.text.losses import Losses, joined_losses, row_losses
from sparsetrain.evaluation.text.section import TextSection
from sparsetrain.section import Text, Tokens

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.evaluation.text.windows import Scored, Windows
    from sparsetrain.world import World


class KeyTokensSection(TextSection):
    """Loss on the tokens that a long context makes likely (LongPPL): they show what a method makes of it, where
    the mean over all tokens is that of near ones."""

    result = KeyTokensResult
    other_models = ("key_tokens_from",)

    task: Literal["key_tokens"] = "key_tokens"
    """Loss on key tokens (LongPPL)."""
    short: Tokens = 4096
    """Tokens of the short context, at least: those that so many tokens of their window precede can be key tokens."""
    stride: Tokens = 1024
    """Tokens that share a short window, so that up to so many less one are added to a short context. Fewer take longer:
    each reads ``short + stride`` tokens."""
    alpha: float = 2.0
    """A key token's log-likelihood is more than this above that with the short context, in nats."""
    beta: Annotated[float, Field(le=0.0)] = -2.0
    """A key token's log-likelihood is above this."""
    key_tokens_from: Text | None = None
    """The model that chooses key tokens, with full attention: a folder or a Hub id, with the same tokens. Null: that of
    the first evaluation of the run, which is the original model with full attention, or the first row of ``sparsetrain
    eval``; the others are measured on the same tokens."""

    @classmethod
    def suggested(cls, lengths: list[int]) -> dict[str, Any]:
        """The sources of Python's library that no shipped recipe trains on, and a short context that is short of all
        windows."""
        source = {"path": "python-stdlib", "split": "validation"}
        least = min(lengths)
        short = {} if least > 5 * 1024 else {"short": max(1, least // 4), "stride": max(1, least // 16)}
        return {"lengths": lengths, "tokens": max(65536, *lengths), "source": source, **short}

    def faults(self) -> Iterator[tuple[str, str]]:
        """Windows that are no longer than the short context too."""
        yield from super().faults()
        if min(self.lengths) <= self.short + self.stride:
            least = f"short + stride = {self.short} + {self.stride}"
            yield (
                "lengths",
                f"a window of {min(self.lengths)} tokens is no longer than {least}, so no context is longer than "
                f"the short one; give longer windows or a smaller {self.path('short')}",
            )

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> KeyTokens:
        """The held-out tokens, read."""
        return KeyTokens(self, tokenizer)


@dataclass(frozen=True)
class Part:
    """A row whose losses are measured."""

    length: int
    """Tokens of a long window."""
    context: Literal["long", "short"]
    by: str | None
    """The model that is asked; None is the one that is evaluated."""
    files: list[tuple[str, int, int]]
    """Of that model: another in the same place gives other losses."""
    row: Scored


class KeyTokens(BatchedTask):
    """Losses of a text's tokens with a long context and, where key tokens are to be chosen, with a short one.

    Raises:
        RecipeError: a window is longer than the text, or no longer than the short context.
        DataError: the source cannot be read, holds fewer tokens than asked for, or none with enough before it.
    """

    def __init__(self, section: KeyTokensSection, tokenizer: PreTrainedTokenizerBase) -> None:
        from sparsetrain.data.tokens import held_out_tokens
        from sparsetrain.evaluation.text.windows import Windows

        for name, fault in section.faults():
            raise RecipeError(f"{section.path(name)}: {fault}")
        section.try_inputs(tokenizer)
        self.chooser_files = [] if section.key_tokens_from is None else _files_of_chooser(section, tokenizer)
        self.section = section
        text = held_out_tokens(section.source, tokenizer, section.tokens)
        lengths = sorted(set(section.lengths))
        bos = tokenizer.bos_token_id if section.bos else None
        stretches = None if section.documents == "joined" else text.documents
        self.windows: dict[str, dict[int, Windows]] = {"long": {}, "short": {}}
        for length in lengths:
            long = Windows(text, length, bos=bos, stretches=stretches, row_tokens=lengths[-1], behind=section.short)
            if not len(long.scored):
                raise DataError(
                    f"{section.path('lengths')}: no token of {section.source.label!r} has {section.short:,} tokens of "
                    f"its window before it; give a smaller {section.path('short')}, or longer documents"
                )
            self.windows["long"][length] = long
            self.windows["short"][length] = Windows(
                text,
                section.short + section.stride,
                section.stride,
                bos=bos,
                stretches=[(window.start, window.stop) for window in long.kept],
                row_tokens=lengths[-1],
                behind=section.short,
            )
        self.definition = define(
            text,
            tokenizer,
            self.windows["long"],
            source=section.source.label,
            bos=section.bos,
            documents=section.documents,
        )
        self.choice = Choice(short=section.short, stride=section.stride, alpha=section.alpha, beta=section.beta)
        self._known: dict[int, np.ndarray] = {}
        self._left_out: dict[int, str] = {}
        self._chooser: Any = None

    def follow(self, first: TaskResult) -> None:
        """Take the key tokens of the first result, if it has those that this task would have it choose."""
        if (
            isinstance(first, KeyTokensResult)
            and first.chosen_by == (self.section.key_tokens_from or ITSELF)
            and first.definition.same_tokens(self.definition)
            and first.choice == self.choice
            and first.chosen.keys() == self.windows["long"].keys()
        ):
            counts = {length: len(windows.scored) for length, windows in self.windows["long"].items()}
            self._known = {length: unpack(packed, counts[length]) for length, packed in first.chosen.items()}
            self._left_out = first.left_out

    def batches(self) -> dict[str, list[Part]]:
        """Rows of long windows; and where key tokens are not known, those that they are chosen by."""
        found = self._parts("long", None)
        if self._known:
            return found
        by = self.section.key_tokens_from
        return found | ({} if by is None else self._parts("long", by)) | self._parts("short", by)

    def measure_batch(self, model: PreTrainedModel, batch: Part, world: World) -> str:
        """The loss of each token of a row."""
        asked = model if batch.by is None else self._load_chooser(batch.by, world)
        return row_losses(asked, self.windows[batch.context][batch.length], batch.row, world.device)

    def result(self, records: Mapping[str, Sequence[str]]) -> KeyTokensResult:
        """Losses of key tokens and of others."""
        from sparsetrain.evaluation.journal import digest

        self._chooser = None
        by = self.section.key_tokens_from
        key, others, packed, left_out = {}, {}, {}, dict(self._left_out)
        for length in self.windows["long"]:
            losses = joined_losses(records[_group(length, "long", None)])
            if self._known:
                picked = self._known[length]
            else:
                long, short = (joined_losses(records[_group(length, context, by)]) for context in ("long", "short"))
                picked = self.choice.of(long, short)
                if not picked.any():
                    left_out[length] = self.choice.none_because(long, short)
            packed[length] = pack(picked)
            key[length], others[length] = Losses.of(losses[picked]), Losses.of(losses[~picked])
        scored = self.definition.model_dump(exclude={"source", "tokenizer"}, mode="json")
        return KeyTokensResult(
            # Not of the batches: those that key tokens are chosen by are read in the first evaluation alone.
            inputs=digest([scored, self.choice.model_dump(), packed]),
            definition=self.definition,
            choice=self.choice,
            chosen_by=FIRST if self._known else by or ITSELF,
            key=key,
            others=others,
            chosen={} if self._known else packed,
            digest=digest(list(packed.values())),
            left_out=left_out,
        )

    def _parts(self, context: Literal["long", "short"], by: str | None) -> dict[str, list[Part]]:
        files = [] if by is None else self.chooser_files
        return {
            _group(length, context, by): [Part(length, context, by, files, row) for row in windows.rows]
            for length, windows in self.windows[context].items()
        }

    def _load_chooser(self, name: str, world: World) -> PreTrainedModel:
        """The model that chooses key tokens, with full attention. It is let go of when all is measured."""
        if self._chooser is None:
            from sparsetrain.inference.models import find_model
            from sparsetrain.modeling import sparsify

            source = find_model(name, self.section.path("key_tokens_from"))
            model: Any = sparsify(source.load(None), {"method": "full"})
            self._chooser = model.to(world.device).eval()
        found: PreTrainedModel = self._chooser
        return found


def _group(length: int, context: str, by: str | None) -> str:
    return f"{length} {context}" if by is None else f"{length} {context} by {by}"


def _files_of_chooser(section: KeyTokensSection, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int, int]]:
    """The files of the model that chooses, with their sizes and times; none where it is not a folder.

    Raises:
        DataError: it has other tokens, so that those that it chooses would not be there.
    """
    from sparsetrain.inference.models import find_model

    assert section.key_tokens_from is not None
    source = find_model(section.key_tokens_from, section.path("key_tokens_from"))
    if source.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"{section.path('key_tokens_from')}: {section.key_tokens_from} has other tokens than the model that is "
            "evaluated, so none that it chooses is one of these; name a model with the same tokenizer"
        )
    files = [(file, file.stat()) for file in sorted(Path(source.path).glob("*")) if file.is_file()]
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in files]
