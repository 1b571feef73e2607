"""Fit the modules that a method adds to the attention of the dense model it was put into."""

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
    """Give the modules that the method adds the weights that it fits to text, such as SparseK's scorers.

    The layers attend densely while ``batches`` pass, so cost and memory are those of a dense forward pass and of the
    fit. Every rank of a distributed run must see the same batches.

    Args:
        model: sparsified; its weights are those of the dense model, not yet trained sparse.
        batches: arguments of the model's forward, such as ``{"input_ids": ..., "position_ids": ...}``; packed rows
            rather than padded ones. A few times as many tokens as the model is wide are enough.

    Raises:
        ModelError: no layer has anything to fit, or the batches told too little.
    """
    found = [(layer, method.fit(layer)) for _, layer, method in sparse_layers(model) if method is not None]
    fits = [(layer, fit) for layer, fit in found if fit is not None]
    if not fits:
        raise ModelError("the attention method of the model has no modules to fit to text; SparseK's scorers are such")
    plans: list[LayerPlan] = [getattr(layer, PLAN_ATTRIBUTE) for layer, _ in fits]
    # Not the output head: logits over a whole vocabulary would be the largest tensor of all, and nobody reads them.
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
    """Whether a layer has weights that still wait for :func:`fit_method`."""
    return any(method is not None and method.needs_fit(layer) for _, layer, method in sparse_layers(model))


class _Recorder(FullMethod):
    """Dense attention that shows a fit what it reads."""

    def __init__(self, fit: LayerFit) -> None:
        self._fit = fit
        self._hidden: torch.Tensor | None = None
        self._hook: Any = None

    def attach(self, layer: nn.Module, layer_index: int) -> None:
        """Look at the layer's input."""
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
            raise ModelError("a fit wants rows without padding, packed rows one at a time (batch size 1)")
        self._fit.add(self._hidden, query, key, value, **options)
        return super().attend(layer, query, key, value, **options)
