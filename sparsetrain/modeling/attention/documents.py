"""The documents of a packed row, and the models that cannot keep documents apart."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from sparsetrain.errors import ModelError

HOOK_ATTRIBUTE = "sparsetrain_documents_hook"


def guard_documents(decoder: nn.Module, *, leaks: bool) -> None:
    """Make a decoder refuse rows of several documents where it would compute something else than for each alone.

    Args:
        leaks: it also mixes tokens outside attention.
    """
    hook = decoder.__dict__.pop(HOOK_ATTRIBUTE, None)
    if hook is not None:
        hook.remove()
    positions = "position_ids" in inspect.signature(decoder.forward).parameters
    fault = ""
    if leaks:
        fault = (
            "this model also mixes tokens outside attention (state-space, convolution or linear attention layers), so "
            "packed documents would leak into each other"
        )
    elif not positions:
        fault = f"{type(decoder).__name__} counts positions by itself, so those of packed documents would not restart"
    if fault:
        hook = decoder.register_forward_pre_hook(partial(_refuse_several, fault), with_kwargs=True)
        setattr(decoder, HOOK_ATTRIBUTE, hook)


def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether rows of several documents may be given to a sparsified model."""
    return not any(HOOK_ATTRIBUTE in module.__dict__ for module in model.modules())


def _refuse_several(
    fault: str, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the decoder."""
    explicit, positions = explicit_documents(kwargs), kwargs.get("position_ids")
    documents: list[torch.Tensor] | None = None
    if explicit is not None:
        documents = [explicit]
    elif positions is not None and positions.ndim == 2 and positions.shape[1] > 1:
        # A padded row's positions restart behind the padding.
        mask = kwargs.get("attention_mask")
        documents = bounds(positions, positions.shape[0]) if mask is None or bool(mask.all()) else None
    if documents is not None and any(cu_seqlens.numel() > 2 for cu_seqlens in documents):
        raise ModelError(f"{fault}; set sequence.packing: false and train.micro_batch: 1")
    if explicit is None or positions is None or positions.ndim != 2:
        return None
    # Of one document the positions say as much, and other layers refuse any cu_seqlens without packages of their own.
    return args, {name: value for name, value in kwargs.items() if name not in ("cu_seqlens", "cu_seq_lens_q")}


def explicit_documents(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """``cu_seqlens`` as the caller gave it, under our name or transformers' own."""
    given = kwargs.get("cu_seqlens")
    if given is None and kwargs.get("cu_seq_lens_q") is not None:
        given = kwargs["cu_seq_lens_q"].int()
    return given


_KNOWN_BOUNDS = WeakIdKeyDictionary()
"""Results of :func:`bounds` for the passes in progress."""


def bounds(position_ids: torch.Tensor, batch: int) -> list[torch.Tensor] | None:
    """``cu_seqlens`` of each row. Every layer of a pass asks with the same tensor, and each answer stops the device."""
    state = None if position_ids.is_inference() else (position_ids._version, batch)
    known, found = _KNOWN_BOUNDS.get(position_ids, (None, None))
    if state is None or state != known:
        restarts = (position_ids.diff(dim=1) != 1).expand(batch, -1)
        found = None
        if bool(restarts.any()):
            ends = torch.ones_like(restarts[:, :1])
            rows = zip(restarts, ends, strict=True)
            found = [torch.cat([end, row, end]).nonzero().flatten().int() for row, end in rows]
        _KNOWN_BOUNDS[position_ids] = state, found
    return found
