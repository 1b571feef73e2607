"""What was counted of the texts of one cell: right answers, and how long the texts are."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.interval import wilson_interval


class Ended(BaseModel):
    """Sums over the texts that the model ended itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    right: int = 0
    """Texts with all of their answers."""
    tokens_right: int = 0
    """Tokens of these."""
    tokens_wrong: int = 0
    """Tokens of the others."""

    def __add__(self, other: Ended) -> Ended:
        return Ended(**{name: getattr(self, name) + getattr(other, name) for name in Ended.model_fields})


class Tally(BaseModel):
    """Sums over the texts of a cell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: int = 0
    """Texts."""
    right: int = 0
    """Right answers: one of a text, except where a prompt asks for several."""
    written: int = 0
    """Tokens written, without those that end texts."""
    cut: int = 0
    """Texts that the budget ended, and not the model."""
    ended: Ended | None = None
    """Of those that the model ended; None without texts, and in results of earlier versions."""

    @classmethod
    def of(cls, right: int, written: int, cut: int, answers: int = 1) -> Tally:
        """What is counted of one text.

        Args:
            right: right answers.
            written: tokens, without the one that ends it.
            cut: 1 where the budget ended it, else 0.
            answers: that it should have.
        """
        whole = int(not cut and right == answers)
        ended = Ended(right=whole, tokens_right=whole * written, tokens_wrong=(1 - whole) * (1 - cut) * written)
        return cls(asked=1, right=right, written=written, cut=cut, ended=ended)

    def __add__(self, other: Tally) -> Tally:
        if not (self.asked and other.asked):
            return self if self.asked else other
        return Tally(
            asked=self.asked + other.asked,
            right=self.right + other.right,
            written=self.written + other.written,
            cut=self.cut + other.cut,
            ended=None if self.ended is None or other.ended is None else self.ended + other.ended,
        )

    def share(self) -> float:
        """Share of right answers, where a text has one."""
        return self.right / self.asked

    def interval(self) -> tuple[float, float]:
        """95 % interval of :meth:`share`."""
        return wilson_interval(self.right, self.asked)

    def cell(self) -> str:
        """Share and interval in percent: ``64.0 [46, 78]``."""
        low, high = self.interval()
        return f"{100 * self.share():.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    def length(self) -> str:
        """How long the texts are: ``12, 40% cut (right 8.0, wrong 9.5)``."""
        ended = ", ".join(f"{kind} {mean:.1f}" for kind, mean in self.ended_lengths().items())
        return f"{self.written / self.asked:.0f}, {self.cut / self.asked:.0%} cut" + (f" ({ended})" if ended else "")

    def ended_lengths(self) -> dict[str, float]:
        """Mean tokens of the texts that the model ended: of the ``right`` ones, which have all of their answers, and of
        the ``wrong`` ones. There is no number where there are none."""
        if self.ended is None:
            return {}
        wrong = self.asked - self.cut - self.ended.right
        sums = {"right": (self.ended.tokens_right, self.ended.right), "wrong": (self.ended.tokens_wrong, wrong)}
        return {kind: tokens / texts for kind, (tokens, texts) in sums.items() if texts}

    def length_metrics(self) -> dict[str, float]:
        """Mean tokens written, the share of texts that the budget ended, and the means of right and of wrong texts that
        the model ended."""
        ended = {f"/written_{kind}": mean for kind, mean in self.ended_lengths().items()}
        return {"/written": self.written / self.asked, "/cut": self.cut / self.asked, **ended}


LENGTH_SAID = (
    "Written: mean tokens of a text, without the one that ends it; cut: texts that their budget ended; in brackets: "
    "mean tokens of the texts that the model ended, right and wrong."
)
"""What :meth:`Tally.length` shows."""


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum."""
    return sum(tallies, Tally())
