"""Which of two evaluations is the better one, by ``checkpoint.keep_best``."""

from __future__ import annotations

from typing import Literal

from sparsetrain.evaluation import EvalResult


def score(metric: Literal["perplexity", "passkey", "recall"], result: EvalResult) -> float:
    """A number that is higher the better the evaluation: minus the perplexity at the longest length, or the share of
    passkeys or answers that were found. NaN where it was not measured."""
    if metric == "perplexity" and result.perplexity:
        return -result.perplexity[max(result.perplexity)]
    if metric == "passkey" and result.passkey is not None:
        return result.passkey.mean()
    if metric == "recall" and result.recall is not None:
        return result.recall.accuracy()
    return float("nan")
