"""What was counted of the texts of one cell: right answers, and how long the texts are."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.interval import wilson_interval


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

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in Tally.model_fields})

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
        """How long the texts are: ``12, 40% cut``."""
        return f"{self.written / self.asked:.0f}, {self.cut / self.asked:.0%} cut"

    def length_metrics(self) -> dict[str, float]:
        """Mean tokens written, and the share of texts that the budget ended."""
        return {"/written": self.written / self.asked, "/cut": self.cut / self.asked}


LENGTH_SAID = "Written: mean tokens of a text, without the one that ends it; cut: texts that their budget ended."
"""What :meth:`Tally.length` shows."""


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum."""
    return sum(tallies, Tally())
