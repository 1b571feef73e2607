"""Install a SparseK scorer in an attention layer, and remove it again."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsetrain.errors import ModelError
from sparsetrain.methods.sparsek.scorer import ScorerSpec, SparseKScorer

SCORER = "sparsek_scorer"
"""Name of the scorer among the layer's submodules."""

ASIDE = "sparsek_scorer_aside"
"""Attribute that keeps a scorer while its layer uses another method, so that it is neither trained nor saved."""

HOOK = "sparsek_hook"


def attach_scorer(layer: Any, layer_index: int, spec: ScorerSpec | None) -> None:
    """Add a scorer to an attention layer (a new one, or the one that was set aside) and score its input in each call.

    A scorer that does not match ``spec`` (heads, normalisation, training, or a pending fit that ``spec`` does not ask
    for) is replaced by a new one.

    Args:
        spec: The scorer's properties; None if scores need no network, and then the layer is only checked.

    Raises:
        ModelError: The layer's attention has a part that SparseK does not support, or its weights are offloaded.
    """
    _check(layer, layer_index)
    if spec is None:
        return
    scorer = layer.__dict__.pop(ASIDE, None)
    if scorer is None or not spec.fits(scorer):
        scorer = spec.build(layer.config.hidden_size)
    weight = _model_weight(layer, layer_index)
    layer.add_module(SCORER, scorer.to(device=weight.device, dtype=weight.dtype))
    names = list(inspect.signature(layer.forward).parameters)
    setattr(layer, HOOK, layer.register_forward_pre_hook(partial(_score_input, names), with_kwargs=True))


def detach_scorer(layer: Any) -> None:
    """Remove the hook, and set the scorer aside for a later :func:`attach_scorer`."""
    hook = layer.__dict__.pop(HOOK, None)
    if hook is not None:
        hook.remove()
        layer.__dict__[ASIDE] = layer._modules.pop(SCORER)


def scorer_of(layer: nn.Module) -> SparseKScorer:
    """The scorer of a layer (which must have one)."""
    scorer = layer.get_submodule(SCORER)
    assert isinstance(scorer, SparseKScorer)
    return scorer


def _score_input(
    names: list[str], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: pass the scores of the layer's input to its attention as keyword arguments."""
    arguments = dict(zip(names, args, strict=False)) | kwargs
    scorer = scorer_of(layer)
    if not scorer.ready:
        raise ModelError(
            "attention.init=attention: the scorers are fitted to the model's attention on text; call "
            "sparsetrain.modeling.fit_method(model, batches) first, or set init: normal"
        )
    scores, gain = scorer(arguments["hidden_states"])
    extra = {"sparsek_scores": scores} if gain is None else {"sparsek_scores": scores, "sparsek_gain": gain}
    return args, {**kwargs, **extra}


def _check(layer: Any, layer_index: int) -> None:
    name, parameters = type(layer).__name__, inspect.signature(layer.forward).parameters
    for attribute, meaning in (("attn_logit_softcapping", "soft-capped logits"), ("sinks", "learned sink logits")):
        if getattr(layer, attribute, None) is not None:
            raise ModelError(f"layer {layer_index} ({name}) has {meaning}, which SparseK attention does not support")
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "hidden_states" not in parameters or not takes_more:
        raise ModelError(
            f"layer {layer_index} ({name}) does not pass additional keyword arguments to its attention, which "
            "SparseK's scores need"
        )


def _model_weight(layer: Any, layer_index: int) -> torch.Tensor:
    """A weight with the device and dtype of the layer (quantised weights have another dtype)."""
    weights = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
    # A model built on the meta device is not offloaded.
    if torch.get_default_device().type != "meta" and any(weight.is_meta for weight in layer.parameters()):
        raise ModelError(
            f"the weights of layer {layer_index} are offloaded; load the model without offloading (device_map) before "
            "using SparseK"
        )
    return weights[0] if weights else torch.empty(0, dtype=torch.bfloat16, device=next(layer.parameters()).device)
