"""Fit the scorers of a SparseK model to the attention of the dense model it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.methods.full import FullMethod
from sparsetrain.methods.sparsek import SparseKMethod
from sparsetrain.methods.sparsek_fit import ScorerFit
from sparsetrain.methods.sparsek_scorer import SparseKScorer
from sparsetrain.modeling.attention import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.layers import put_method, sparse_layers

if TYPE_CHECKING:
    from sparsetrain_kernels.inputs import AttentionOptions


def calibrate_scorers(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, ridge: float = 1e-2) -> None:
    """Give the scorers of a SparseK model the weights that best predict the attention keys receive in dense attention.

    The layers attend densely while ``batches`` pass, so cost and memory are those of a dense forward pass (logits in
    tiles) and one ``[width, width]`` fp64 matrix a layer. Every rank of a distributed run must see the same batches.

    Args:
        model: sparsified with ``sparsek``; its weights are those of the dense model, not yet trained sparse.
        batches: arguments of the model's forward, such as ``{"input_ids": ..., "position_ids": ...}``; packed rows
            rather than padded ones. A few times as many tokens as the model is wide are enough.
        ridge: regularisation, relative to the mean variance of an input.

    Raises:
        ModelError: no layer has a scorer, or the batches hold no document long enough to learn from.
    """
    layers = [
        (layer, method)
        for _, layer, method in sparse_layers(model)
        if isinstance(method, SparseKMethod) and method.config.scorer != "random"
    ]
    if not layers:
        raise ModelError("the model has no scorers to calibrate; sparsify it with attention.method=sparsek")
    plans: list[LayerPlan] = [getattr(layer, PLAN_ATTRIBUTE) for layer, _ in layers]
    recorders = [_Recorder(method) for _, method in layers]
    # Not the output head: logits over a whole vocabulary would be the largest tensor of all, and nobody reads them.
    decoder = (model.get_decoder() if isinstance(model, PreTrainedModel) else None) or model
    training = model.training
    model.eval()
    try:
        for (layer, _), plan, recorder in zip(layers, plans, recorders, strict=True):
            put_method(layer, replace(plan, method=recorder))
        with torch.no_grad():
            for batch in batches:
                decoder(**batch, use_cache=False)
    finally:
        for (layer, _), plan in zip(layers, plans, strict=True):
            put_method(layer, plan)
        model.train(training)
    for (layer, method), recorder in zip(layers, recorders, strict=True):
        if recorder.fit.count == 0:
            raise ModelError(
                f"no document in the batches is longer than attention.window={method.config.window} by enough to tell "
                "which keys are read from afar; give longer ones"
            )
        scorer: SparseKScorer = layer.get_submodule("sparsek_scorer")  # type: ignore[assignment]
        with torch.no_grad():
            scorer.weight.copy_(recorder.fit.weight(ridge))
        scorer.ready = True


def needs_calibration(model: nn.Module) -> bool:
    """Whether a model has scorers that still wait for their weights (``attention.init: attention``)."""
    return any(isinstance(module, SparseKScorer) and not module.ready for module in model.modules())


class _Recorder(FullMethod):
    """Dense attention that shows a fit what it reads."""

    def __init__(self, method: SparseKMethod) -> None:
        self.fit = ScorerFit(method.score_heads, method.config.window, method.config.sinks)
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
            raise ModelError("calibration wants rows without padding, packed rows one at a time (batch size 1)")
        scale = options.get("scale") or query.shape[-1] ** -0.5
        self.fit.add(self._hidden, query, key, scale, options.get("cu_seqlens"))
        return super().attend(layer, query, key, value, **options)
