"""Fit the modules that a method adds (such as SparseK's scorers) to the dense attention of the original model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.methods.fit import LayerFit
from sparsetrain.methods.full import FullMethod
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.layers import put_method, sparse_layers

if TYPE_CHECKING:
    from sparsetrain_kernels.inputs import AttentionOptions


def fit_method(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Fit the modules that the method adds, such as SparseK's scorers, to text.

    The layers use dense attention for these batches, so time and memory are those of dense forward passes plus the fit.
    Every rank of a distributed run must be given the same batches.

    Args:
        model: A sparsified model with the weights of the dense model, before sparse training.
        batches: Arguments of the model's forward, such as ``{"input_ids": ..., "position_ids": ...}``, each int64
            ``[1, N]``; packed rows, not padded ones. A few times as many tokens as the hidden size are enough.

    Raises:
        ModelError: No layer has modules to fit, or the batches have too few tokens.
    """
    found = [(layer, method.fit(layer)) for _, layer, method in sparse_layers(model) if method is not None]
    fits = [(layer, fit) for layer, fit in found if fit is not None]
    if not fits:
        raise ModelError("the attention method of the model has no modules to fit to text, such as SparseK's scorers")
    plans: list[LayerPlan] = [getattr(layer, PLAN_ATTRIBUTE) for layer, _ in fits]
    # Without the output head: logits over the vocabulary would be the largest tensor, and they are not needed.
    decoder = (model.get_decoder() if isinstance(model, PreTrainedModel) else None) or model
    training = model.training
    model.eval()
    try:
        for (layer, fit), plan in zip(fits, plans, strict=True):
            put_method(layer, replace(plan, method=_Recorder(fit)))
        with torch.no_grad():
            for batch in batches:
                decoder(**batch, use_cache=False)
    finally:
        for (layer, _), plan in zip(fits, plans, strict=True):
            put_method(layer, plan)
        model.train(training)
    for _, fit in fits:
        fit.finish()


def needs_fit(model: nn.Module) -> bool:
    """Whether a layer has weights that :func:`fit_method` has not fitted yet."""
    return any(method is not None and method.needs_fit(layer) for _, layer, method in sparse_layers(model))


class _Recorder(FullMethod):
    """Dense attention that passes its inputs to a fit."""

    def __init__(self, fit: LayerFit) -> None:
        self._fit = fit
        self._hidden: torch.Tensor | None = None
        self._hook: Any = None

    def attach(self, layer: nn.Module, layer_index: int) -> None:
        """Register a hook that keeps the layer's input."""
        self._hook = layer.register_forward_pre_hook(self._look, with_kwargs=True)

    def detach(self, layer: nn.Module) -> None:
        """Stop looking."""
        self._hook.remove()

    def _look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.attend`."""
        assert self._hidden is not None, "the layer's input comes before its attention"
        if self._hidden.shape[:2] != (query.shape[0], query.shape[2]):
            raise ModelError("a fit needs rows without padding, and packed rows one at a time (batch size 1)")
        self._fit.add(self._hidden, query, key, value, **options)
        return super().attend(layer, query, key, value, **options)
