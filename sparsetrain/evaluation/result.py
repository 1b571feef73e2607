"""What an evaluation measured, as JSON; and how sure a share of a few trials is."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict


class _Result(BaseModel):
    # A diverged model measures inf or nan, which plain JSON has no number for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class PasskeyResult(_Result):
    """Correct passkey prompts by length and depth."""

    lengths: list[int]
    """Prompt lengths in tokens."""
    depths: list[float]
    """Where the key was hidden: 0 at the beginning of the prompt, 1 at its end."""
    trials: int
    """Prompts in a cell."""
    digits: int
    """Digits of a key."""
    correct: list[list[int]]
    """Prompts answered right, ``[length][depth]``."""

    def accuracy(self) -> list[list[float]]:
        """Share of right answers, ``[length][depth]``."""
        return [[count / self.trials for count in row] for row in self.correct]

    def by_length(self) -> dict[int, float]:
        """Share of right answers at each length, over all depths."""
        cells = self.trials * len(self.depths)
        return {length: sum(row) / cells for length, row in zip(self.lengths, self.correct, strict=True)}

    def mean(self) -> float:
        """Share of right answers over all prompts."""
        return sum(map(sum, self.correct)) / self.prompts()

    def prompts(self) -> int:
        """Prompts in all cells together."""
        return self.trials * len(self.lengths) * len(self.depths)

    def interval(self) -> tuple[float, float]:
        """95 % interval of :meth:`mean`."""
        return wilson_interval(sum(map(sum, self.correct)), self.prompts())


class RecallResult(_Result):
    """Answers found in the held-out documents of a synthetic source."""

    answers: int
    """Answers asked for."""
    correct: int
    """Answers of which every token was the model's first choice."""
    loss: float
    """Mean NLL of the answers' tokens, in nats."""

    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.answers

    def interval(self) -> tuple[float, float]:
        """95 % interval of :meth:`accuracy`, as if the answers of a document were independent."""
        return wilson_interval(self.correct, self.answers)


class EvalResult(_Result):
    """Everything one evaluation measured; ``model_dump_json`` and ``model_validate_json`` are each other's inverse."""

    perplexity: dict[int, float] = {}
    """Token perplexity by context length in tokens."""
    perplexity_tokens: int = 0
    """Tokens in the held-out stream that was scored at each length."""
    passkey: PasskeyResult | None = None
    """Passkey retrieval, where it was asked for."""
    recall: RecallResult | None = None
    """Answers of a synthetic task, where they were asked for."""

    def metrics(self) -> dict[str, float]:
        """The result as flat numbers for :class:`~sparsetrain.training.tracking.Tracker`."""
        values = {f"eval/perplexity/{length}": value for length, value in self.perplexity.items()}
        if self.passkey is not None:
            values["eval/passkey"] = self.passkey.mean()
            values |= {f"eval/passkey/{length}": value for length, value in self.passkey.by_length().items()}
        if self.recall is not None:
            values |= {"eval/recall": self.recall.accuracy(), "eval/recall_loss": self.recall.loss}
        return values


def wilson_interval(correct: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which stays sensible at 0 and at 1 where the usual one has width 0.

    20 of 20 right answers: (0.84, 1.0).
    """
    z = 1.959964
    share = correct / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
