"""Key tokens, which a long context makes likely (LongPPL, 2410.23771): how they are chosen, and the loss on them."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Drawing, Rows, TaskReport, TaskResult
from sparsetrain.evaluation.text.definition import TextDefinition, definition_rows
from sparsetrain.evaluation.text.losses import Losses
from sparsetrain.evaluation.text.tables import DIFFERENCE, columns_of, difference_rows, significant

if TYPE_CHECKING:
    import numpy as np

ITSELF, FIRST = "itself", "the first row"


class Choice(BaseModel):
    """How key tokens are chosen: LSD and LCL of 2410.23771."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    short: int
    """Tokens of the short context, at least."""
    stride: int
    """Up to so many less one are added to it, since so many tokens share a short window."""
    alpha: float
    """What the long context must add to the log-likelihood, more than this (LSD)."""
    beta: float
    """What the log-likelihood with the long context must be above (LCL)."""

    def of(self, long: np.ndarray, short: np.ndarray) -> np.ndarray:
        """Which tokens are key tokens, bool ``[n]``.

        Args:
            long: negative log-likelihood with the long context, fp64 ``[n]``.
            short: with the short one, fp64 ``[n]``.
        """
        chosen: np.ndarray = (short - long > self.alpha) & (-long > self.beta)
        return chosen

    def none_because(self, long: np.ndarray, short: np.ndarray) -> str:
        """Why :meth:`of` chooses none of these tokens."""
        import numpy as np

        gained = short - long
        if np.isnan(gained).all():
            return "no loss is a number"
        if not (gained > self.alpha).any():
            return f"no token gains more than {self.alpha:g} nats from the long context"
        return f"no token that gains more than {self.alpha:g} nats has a log-likelihood above {self.beta:g}"


class KeyTokensResult(TaskResult):
    """Losses on the key tokens of a text, and on its other tokens behind as many tokens, at each length."""

    task: Literal["key_tokens"] = "key_tokens"
    definition: TextDefinition
    """The windows, and what could be a key token."""
    choice: Choice
    """How key tokens were chosen."""
    chosen_by: str
    """Whose likelihoods chose them: ``itself``, ``the first row``, or the name of a model."""
    key: dict[int, Losses]
    """Losses of key tokens, by tokens of a window."""
    others: dict[int, Losses]
    """Losses of the other tokens that could have been chosen."""
    chosen: dict[int, str]
    """The key tokens among those, packed (:func:`pack`); empty where they are those of the first row."""
    digest: str
    """Equal for equal key tokens."""
    left_out: dict[int, str] = {}
    """Lengths that have no LongPPL because they have no key tokens, and why they have none."""

    def metrics(self) -> dict[str, float]:
        """LongPPL at each length, and beside it the perplexity of other tokens and the share of key tokens. A length
        without key tokens has no LongPPL."""
        numbers = {}
        for length, key in self.key.items():
            if key.tokens:
                numbers[f"/{length}"] = key.perplexity()
            if self.others[length].tokens:
                numbers[f"/{length}/others"] = self.others[length].perplexity()
            numbers[f"/{length}/share"] = self.share(length)
        return numbers

    def score(self) -> float:
        """Minus the loss on key tokens at the greatest length; NaN where there are none."""
        return -self.key[max(self.key)].mean()

    def share(self, length: int) -> float:
        """Key tokens over all that could be."""
        return self.key[length].tokens / (self.key[length].tokens + self.others[length].tokens)

    def pairs_with(self, other: Self) -> bool:
        """Whether both have the loss on the same tokens with the same context, wherever one took them from."""
        return (
            self.definition.same_tokens(other.definition)
            and self.choice == other.choice
            and self.key.keys() == other.key.keys()
            and self.digest == other.digest
        )

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result and a column for each length; what was scored, and the difference from the first."""
        one = next(iter(results.values()))
        lengths = columns_of(list(results.values()), lambda result: list(result.key))
        names = _choosers(results)
        rows: Rows = [["", *(f"{length:,}" for length in lengths), "key tokens chosen by"]]
        others: Rows = [["", *(f"{length:,}" for length in lengths)]]
        for label, result in results.items():
            rows.append([label, *(_perplexity(result.key.get(length)) for length in lengths), names[label]])
            others.append([label, *(_perplexity(result.others.get(length)) for length in lengths)])
        details = {
            "Perplexity of the other tokens": others,
            "Key tokens": _counts(results),
            **definition_rows({label: result.definition for label, result in results.items()}),
            **_differences(results),
        }
        heading = "Key-token perplexity (LongPPL) by context length"
        about = f"{_about(one.choice)} {one.definition.words()}"
        return TaskReport(heading, heading, about, rows, details=details)

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing | None:
        """LongPPL against length, a line for each result; None where there are no key tokens."""
        from sparsetrain.evaluation.text.drawing import draw_by_length

        found = {
            label: [(length, key.perplexity()) for length, key in sorted(result.key.items()) if key.tokens]
            for label, result in results.items()
        }
        points = {label: line for label, line in found.items() if line}
        if not points:
            return None
        title = f"Key-token perplexity (LongPPL){cls.ending(name)}"
        draw = partial(
            draw_by_length,
            title=title,
            what="perplexity of key tokens",
            points_of=points,
            trained_length=trained_length,
        )
        return Drawing(draw, 7, 4.5)


def pack(chosen: np.ndarray) -> str:
    """Bools ``[n]`` as text: bits, compressed, in base64."""
    import numpy as np

    return base64.b64encode(zlib.compress(np.packbits(chosen).tobytes(), 9)).decode("ascii")


def unpack(text: str, count: int) -> np.ndarray:
    """What :func:`pack` was given, bool ``[count]``."""
    import numpy as np

    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def _about(choice: Choice) -> str:
    return (
        "LongPPL (2410.23771) is exp of the mean loss on key tokens: those whose log-likelihood with all earlier "
        f"tokens of the window is more than {choice.alpha:g} above that with the last {choice.short:,} (to "
        f"{choice.short + choice.stride - 1:,}), and above {choice.beta:g}. Tokens with fewer before them are left out."
    )


def _choosers(results: Mapping[str, KeyTokensResult]) -> dict[str, str]:
    """Who chose the key tokens of each result, by its label."""
    first = {
        result.digest: label if result.chosen_by == ITSELF else result.chosen_by
        for label, result in [*results.items()][::-1]
        if result.chosen_by != FIRST
    }
    return {
        label: first.get(result.digest, FIRST) if result.chosen_by == FIRST else result.chosen_by
        for label, result in results.items()
    }


def _counts(results: Mapping[str, KeyTokensResult]) -> Rows:
    """How many key tokens there are, a row for each choice; and why, where it found none."""
    names = _choosers(results)
    lacking = any(result.left_out for result in results.values())
    rows: Rows = [["chosen by", "window", "short context", "key tokens", "of", "share", "why none"][: 6 + lacking]]
    for label, result in results.items():
        by = label if result.chosen_by == ITSELF else names[label]
        for length, key in result.key.items():
            most = result.choice.short + result.choice.stride - 1
            tokens = [f"{key.tokens:,}", f"{key.tokens + result.others[length].tokens:,}"]
            row = [by, f"{length:,}", f"{result.choice.short:,} to {most:,}", *tokens, f"{result.share(length):.2%}"]
            row += [result.left_out.get(length, "")] if lacking else []
            rows += [] if row in rows else [row]
    return rows


def _differences(results: Mapping[str, KeyTokensResult]) -> dict[str, Rows]:
    label, first = next(iter(results.items()))
    paired = {name: result for name, result in results.items() if result.pairs_with(first)}
    if len(paired) < 2:
        return {}
    columns: dict[str, Callable[[KeyTokensResult], Losses | None]] = {}
    for length in first.key:
        columns[f"key tokens at {length:,}"] = partial(_at, part="key", length=length)
        columns[f"others at {length:,}"] = partial(_at, part="others", length=length)
    return {DIFFERENCE.format(label): difference_rows(paired, columns)}


def _at(result: KeyTokensResult, *, part: Literal["key", "others"], length: int) -> Losses | None:
    losses: dict[int, Losses] = getattr(result, part)
    return losses.get(length)


def _perplexity(losses: Losses | None) -> str:
    """``-`` where it was not measured, and ``none`` where no token is of this kind."""
    if losses is None:
        return "-"
    return significant(losses.perplexity()) if losses.tokens else "none"
