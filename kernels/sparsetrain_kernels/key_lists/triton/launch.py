"""Launches the kernels over rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparsetrain_kernels.key_lists.triton.forward import key_lists_fwd_kernel
from sparsetrain_kernels.key_lists.triton.grad_rows import key_lists_bwd_rows_kernel
from sparsetrain_kernels.key_lists.triton.tiles import KeyLists
from sparsetrain_kernels.launching import Config, cdiv, launch, pad_head_dim


class Call(NamedTuple):
    """Query, key and value of a call, and the lists of keys that its rows read."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    lists: KeyLists


class Selection(NamedTuple):
    """Of keys that SparseK selects: a listed key is seen in a range of rows, with a gate; a neighbour for ``window``
    rows, without."""

    scores: Tensor
    """fp32 ``[B, Hs, N]`` a key; infinite where its gates are 1."""
    threshold: Tensor
    """fp32 ``[B, Hs, N]`` a row; for the backward pass with as many places as the rows' other statistics."""
    exit: Tensor
    """int32 ``[B, Hs, N]``: the row at which a listed key is seen no more."""
    doc_start: Tensor | None
    """int32 ``[N]``: the first row of each row's document; None where there is one document."""
    window: int
    gate: str


class Part(NamedTuple):
    """The tiles and KV heads of one launch: of each the first, and how many."""

    first_tile: int
    tiles: int
    first_head: int
    heads: int


def launch_forward(call: Call, selection: Selection | None, out: Tensor, lse: Tensor, config: Config) -> None:
    """Fills ``out``, like the query, and ``lse``, fp32 ``[B, Hq, N]``, for the rows of all tiles."""
    query, key, value = call[:3]
    tiles = count_tiles(call.lists, query, config)
    launch(
        key_lists_fwd_kernel,
        tiles * _shares(call, selection) * key.shape[1] * query.shape[0],
        (query, key, value, out, lse, *_tensors(call, selection)),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *out.stride()[:3],
            query.shape[2],
            0 if selection is None else selection.window,
            tiles,
            *call.lists.keys.shape[2:],
            call.scale,
        ),
        **_constants(call, selection, config),
    )


def launch_backward_rows(
    call: Call,
    selection: Selection | None,
    part: Part,
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    grad_query: Tensor,
    rest: Tensor,
    config: Config,
) -> None:
    """Fills ``grad_query`` for the rows of some tiles and heads.

    Args:
        statistics: the rows' log-sum-exp in units of log2, and delta, fp32 ``[B, Hq, N or more]``.
        rest: what else the kernel leaves: with a selection the gradient of each head's thresholds, fp32 ``[B, Hq, N]``;
            else ``[B, part.heads, part.tiles, capacity, 2, D_PAD]``, each tile's part of dK and dV at its list's keys.
    """
    query, key, value = call[:3]
    launch(
        key_lists_bwd_rows_kernel,
        part.tiles * _shares(call, selection) * part.heads * query.shape[0],
        (
            *(query, key, value, grad_out, *statistics, grad_query),
            rest if selection is None else None,
            *_tensors(call, selection),
            None if selection is None else rest,
        ),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_out.stride()[:3],
            *grad_query.stride()[:3],
            query.shape[2],
            statistics[0].shape[2],
            0 if selection is None else selection.window,
            *part,
            *call.lists.keys.shape[2:],
            call.scale,
        ),
        **_constants(call, selection, config),
    )


def count_tiles(lists: KeyLists, query: Tensor, config: Config) -> int:
    """Tiles of a call, of which each head, or each group of heads, has as many."""
    return cdiv(query.shape[2], config.block_m) if lists.tiles is None else lists.tiles.shape[0]


def _shares(call: Call, selection: Selection | None) -> int:
    """Tiles of the same rows in a group of heads."""
    return 1 if selection is None else call.query.shape[1] // call.key.shape[1]


def _tensors(call: Call, selection: Selection | None) -> tuple[Tensor | None, ...]:
    lists = call.lists
    own = (None,) * 4 if selection is None else selection[:4]
    return (lists.tiles, lists.keys, lists.counts, lists.whole, *own)


def _constants(call: Call, selection: Selection | None, config: Config) -> dict[str, Any]:
    query, lists = call.query, call.lists
    kv_heads, head_dim = call.key.shape[1], query.shape[3]
    return {
        "KV_HEADS": kv_heads,
        "GROUP": query.shape[1] // kv_heads,
        "MEMBERS": query.shape[1] // kv_heads // _shares(call, selection),
        "SELECTIONS": lists.keys.shape[1],
        "D": head_dim,
        "D_PAD": pad_head_dim(head_dim),
        "ROWS": lists.rows if selection is None else config.block_m,
        "LIST_ROWS": lists.rows,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SELECTED": selection is not None,
        "GATE": "straight" if selection is None else selection.gate,
        "PACKED": selection is not None and selection.doc_start is not None,
        "PRECISION": "ieee",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
