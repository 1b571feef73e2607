"""The public operations: check the arguments and choose the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.inputs import check_factors, consecutive_rows
from sparsetrain_kernels.key_mirror.layout import check_tensor
from sparsetrain_kernels.selected_keys.inputs import GATES
from sparsetrain_kernels.sparsek_decode import library  # noqa: F401  (defines the operations)
from sparsetrain_kernels.sparsek_decode.slots import SparseKSlots


def sparsek_decode_update(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    slots: SparseKSlots,
    *,
    topk: int,
    window: int,
    sinks: int,
    backend: str = "auto",
) -> None:
    """Take one token a text into the slots, all of which change in place (2406.16747, section 3).

    The token that leaves the window competes: it takes an empty place if there is one, else that of the smallest score
    if its own is not smaller (of equal scores the older goes), else it is gone. Its ring slot goes to the new token.
    Its score replaces the least of the buffer if it is larger, and the threshold becomes that of the buffer, found in
    fp64.

    With the Triton kernel, one launch; nothing is read on the host and no shape depends on how much was read, so that a
    call can be captured in a CUDA graph (after one call outside of it) and replayed token after token.

    Args:
        key, value: ``[B, H, 1, D]`` in the dtype of the slots.
        scores: ``[B, Hs, 1]`` in the dtype of the slots' scores.
        slots: the memory of the layer.
        topk, window, sinks: how many slots there are of each kind; ``window`` at least 1.
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch), or ``auto``: on
            CUDA the first that can run the call, else the last.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    _check_no_gradient(key=key, value=value, scores=scores)
    slots.check(topk, window, sinks)
    batch, heads, _, width = slots.keys.shape
    for name, tensor, like, shape in (
        ("key", key, slots.keys, (batch, heads, 1, width)),
        ("value", value, slots.keys, (batch, heads, 1, width)),
        ("scores", scores, slots.scores, (*slots.read.shape, 1)),
    ):
        _check(name, tensor, like, shape)
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but the slots hold {like.dtype}")
    chosen = choose_backend(backend, key, _refusals(key))
    key, value = consecutive_rows(key), consecutive_rows(value)
    torch.ops.sparsetrain.sparsek_decode_update(key, value, scores, *slots, topk, window, sinks, chosen)


def sparsek_decode_attention(
    query: Tensor,
    slots: SparseKSlots,
    *,
    topk: int,
    window: int,
    sinks: int,
    gate: str = "value",
    scale: float | None = None,
    kept: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the newest token of every text to what the slots hold, itself included (2406.16747, section 3), or
    to a choice of it.

    Logits, softmax and accumulation are fp32 (fp64 for fp64 keys). Keys and values of slots that are left out change
    nothing, whatever they are. Those of empty slots are not read by the Triton kernels, and have to be finite for the
    reference. Two launches, or one where keys are few.

    Args:
        query: ``[B, Hq, 1, D]``; query head ``h`` reads KV head ``h // (Hq // H)``.
        slots: the memory of the layer, which :func:`sparsek_decode_update` has given at least one token a text.
        topk, window, sinks: as there.
        gate: how ``p = clip(score - threshold, 0, 1)`` of a selected token reaches the output: ``value`` multiplies its
            value, ``log`` adds its logarithm to the logit, ``straight`` does neither.
        scale: factor on the logits; None means ``D ** -0.5``.
        kept: bool ``[B, H, slots]``, contiguous: the slots of each KV head that are read, of those that hold a token,
            at least one; None for all of these.
        backend: as there; the Triton kernels want query and slots in one dtype.

    Returns:
        ``[B, Hq, 1, D]`` in the query's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    _check_no_gradient(query=query)
    slots.check(topk, window, sinks)
    check_factors(scale, None)
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} does not exist; choose one of {', '.join(GATES)}")
    batch, heads, _, width = slots.keys.shape
    query_heads = query.shape[1] if query.dim() == 4 else 0
    _check("query", query, slots.keys, (batch, query_heads, 1, width))
    if query_heads == 0 or query_heads % heads != 0:
        raise ValueError(f"query has {query_heads} heads, which is no multiple of the {heads} heads of the slots")
    if kept is not None:
        check_tensor("kept", kept, tuple(slots.keys.shape[:3]), torch.bool, slots.keys.device)
    refusals = _refusals(query)
    if query.dtype != slots.keys.dtype:
        refusals["triton"] = f"query is {query.dtype}, but the slots hold {slots.keys.dtype}"
    chosen = choose_backend(backend, query, refusals)
    scale = width**-0.5 if scale is None else float(scale)
    query = consecutive_rows(query)
    return torch.ops.sparsetrain.sparsek_decode_attention(query, *slots, topk, sinks, gate, scale, kept, chosen)


def _refusals(tensor: Tensor) -> dict[str, str | None]:
    return {"triton": triton_refusal(tensor), "gluon": "decoding has plain Triton kernels only"}


def _check_no_gradient(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, and decoding has none: call it under torch.no_grad()")


def _check(name: str, tensor: Tensor, slots: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside these slots")
    if tensor.device != slots.device:
        raise TypeError(f"{name} is on {tensor.device}, but the slots are on {slots.device}")
