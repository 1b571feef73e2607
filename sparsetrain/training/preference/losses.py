"""The losses of a pair of answers, from the log-likelihoods of both. They equal TRL's, which a test compares."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.recipe.preference_section import PreferenceSection


class Answers(NamedTuple):
    """Both answers of each of P pairs."""

    chosen: Tensor
    """fp64 ``[P]``: log-likelihood of the preferred answer, summed over its tokens."""
    rejected: Tensor
    """fp64 ``[P]``: that of the rejected one."""

    @classmethod
    def of(cls, documents: Tensor) -> Answers:
        """From the values of neighbouring documents ``[2 P]``, the preferred one of each pair first."""
        return cls(documents[::2], documents[1::2])


class PairLosses(NamedTuple):
    """The loss of each pair, and the rewards that it implies; fp64 ``[P]``."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def pair_losses(section: PreferenceSection, policy: Answers, tokens: Answers, reference: Answers | None) -> PairLosses:
    """The loss of each pair without the likelihood that ``nll_weight`` adds.

    Args:
        policy: Log-likelihoods under the trained model.
        tokens: Tokens of the answers, ``[P]`` each; losses by token divide by them.
        reference: Log-likelihoods under the reference model, for the losses that have one.
    """
    beta, smoothing = section.factor, section.label_smoothing
    scores = policy
    if reference is not None:
        scores = Answers(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    elif section.loss in ("simpo", "orpo"):
        scores = Answers(policy.chosen / tokens.chosen, policy.rejected / tokens.rejected)
    margin = scores.chosen - scores.rejected
    match section.loss:
        case "dpo" | "cpo":
            losses = _smoothed(beta * margin, smoothing)
        case "robust":
            right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
            losses = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        case "simpo":
            losses = _smoothed(beta * margin - section.margin, smoothing)
        case "hinge":
            losses = torch.relu(1 - beta * margin)
        case "ipo":
            by_token = scores.chosen / tokens.chosen - scores.rejected / tokens.rejected
            losses = (by_token - 1 / (2 * beta)) ** 2
        case "orpo":
            odds = margin - (_log_complement(scores.chosen) - _log_complement(scores.rejected))
            losses = -beta * F.logsigmoid(odds)
    rewards = (beta * score.detach() for score in scores)
    return PairLosses(losses, *rewards)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """Equation 3 of cDPO: the label is the wrong way round with the probability ``smoothing``."""
    return -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing


def _log_complement(log_likelihood: Tensor) -> Tensor:
    """``log(1 - p)`` of a probability given as ``log p``; -p near 0 keeps the digits that ``1 - p`` would lose."""
    # A model that is certain (p rounds to 1) would give an infinite odds ratio and no gradient.
    below = log_likelihood.clamp(max=-1e-12)
    return torch.where(below > -0.6931, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below)))
