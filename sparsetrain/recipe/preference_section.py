"""The ``preference`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsetrain.section import Bounds, Section

REFERENCED = ("dpo", "robust", "ipo", "hinge")
"""Losses that compare with a reference model."""
_SMOOTHED = ("dpo", "robust", "simpo", "cpo")

_USED_IN_FP32 = "it is used in fp32"


class PreferenceSection(Section):
    """Learn from pairs of a preferred and a rejected answer (``chosen`` and ``rejected``). Every source of ``data`` has
    such rows; both answers stand in one row of training, each behind its prompt."""

    loss: Literal["dpo", "robust", "ipo", "hinge", "simpo", "cpo", "orpo"] = "dpo"
    """The loss of a pair, as in TRL. Against a reference model: ``dpo`` (2305.18290; with ``label_smoothing`` it is
    cDPO), ``robust`` (rDPO, 2403.00409), ``ipo`` (2310.12036, by token) and ``hinge`` (SLiC, 2305.10425). Without one:
    ``simpo`` (2405.14734, by token), ``cpo`` (2401.08417) and ``orpo`` (2403.07691, by token)."""
    beta: Annotated[float, Field(gt=0), Bounds(1e6, _USED_IN_FP32, least=1e-6)] | None = None
    """Factor of the difference between the answers; of ``ipo`` the regularisation tau, of ``orpo`` the weight lambda.
    null: 2.0 for ``simpo``, otherwise 0.1."""
    gamma: Annotated[float, Field(ge=0), Bounds(1e6, _USED_IN_FP32)] | None = None
    """Target margin between the rewards (``simpo``); null: 0.5."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair is labelled the wrong way round (``dpo``, ``robust``, ``simpo`` and ``cpo``)."""
    nll_weight: Annotated[float, Field(ge=0), Bounds(1e6, _USED_IN_FP32)] | None = None
    """Weight of the mean negative log-likelihood per token of the preferred answers, which is added. null: 1.0 for
    ``cpo`` and ``orpo``, otherwise 0."""
    reference: Literal["auto", "adapters_off", "precomputed"] = "auto"
    """Where the reference's log-likelihoods come from. ``adapters_off``: another forward pass of each micro batch,
    without LoRA's adapters. ``precomputed``: one pass over all pairs of the run before training, kept in the run
    folder; no second model is held. ``auto``: ``adapters_off`` where the adapters are all that is trained, else
    ``precomputed``."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> PreferenceSection:
        for name, losses in (("gamma", ("simpo",)), ("label_smoothing", _SMOOTHED), ("reference", REFERENCED)):
            given = getattr(self, name)
            if given != type(self).model_fields[name].default and self.loss not in losses:
                belongs = ", ".join(losses)
                raise ValueError(f"{name}={given} has no effect on loss: {self.loss}; it belongs to {belongs}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss: robust without label_smoothing is loss: dpo; give label_smoothing, such as 0.1")
        if self.loss == "orpo" and self.nll_weight == 0:
            raise ValueError("loss: orpo adds to the likelihood of the preferred answers; give nll_weight above 0")
        return self

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.loss in REFERENCED

    @property
    def factor(self) -> float:
        """``beta`` with its default filled in."""
        if self.beta is not None:
            return self.beta
        return 2.0 if self.loss == "simpo" else 0.1

    @property
    def margin(self) -> float:
        """``gamma`` with its default filled in."""
        return 0.5 if self.gamma is None else self.gamma

    @property
    def likelihood_weight(self) -> float:
        """``nll_weight`` with its default filled in."""
        return self.nll_weight if self.nll_weight is not None else float(self.loss in ("cpo", "orpo"))
