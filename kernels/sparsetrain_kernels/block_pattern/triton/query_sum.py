"""The gradient of queries as a sum of integers: what is there before a kernel adds to it, and what becomes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.block_pattern.triton.fixed_point import (
    fixed_point_finish_kernel,
    fixed_point_rows_kernel,
    tile_maxima_kernel,
)
from sparsetrain_kernels.block_pattern.triton.work import far_table, head_stride, padded_blocks
from sparsetrain_kernels.inputs import AttentionInputs
from sparsetrain_kernels.launching import launch

SCAN = 32
"""Key tiles whose maxima one step reads."""
ROWS = 32
"""Rows that one program makes ready: with more, too few programs fit on an SM to keep its memory busy."""


class QuerySum:
    """The integers, int32 ``[B, Hq, N, D]``, with the scales and statistics of the rows. ``items`` are the query tiles,
    of ``tile`` rows, which divide the pattern's block."""

    def __init__(
        self,
        call: AttentionInputs,
        lists: BlockLists,
        items: Tensor,
        tile: int,
        grads: tuple[Tensor, Tensor | None],
        outputs: tuple[Tensor, Tensor],
        delta: Tensor,
    ) -> None:
        """``grads`` are those of the ``outputs``, out and log-sum-exp. Everything is made ready to add to; ``delta``,
        fp32 ``[B, Hq, N]``, is written."""
        (grad_out, grad_lse), (out, lse) = grads, outputs
        batch, heads, rows, head_dim = out.shape
        kv_heads, device = call.key.shape[1], out.device
        padded_rows = padded_blocks(call, lists.block) * lists.block
        self._call, self._lists, self._items, self._tile = call, lists, items, tile
        self.integers = torch.empty(out.shape, dtype=torch.int32, device=device)
        self.padded_lse, self.padded_delta, self.scale = torch.empty(
            (3, batch, heads, padded_rows), dtype=torch.float32, device=device
        ).unbind()
        key_max, value_max = torch.empty(
            (2, batch, kv_heads, padded_rows // tile), dtype=torch.int32, device=device
        ).unbind()
        far = far_table(lists.far, device)
        shape = {"D": head_dim, "TPB": lists.block // tile, "TILE": tile}
        launch(
            tile_maxima_kernel,
            items.shape[0] * kv_heads * batch,
            (call.key, call.value, key_max, value_max, items),
            (*call.key.stride()[:3], *call.value.stride()[:3], items.shape[0], rows, key_max.shape[2]),
            KV_HEADS=kv_heads,
            **shape,
            num_warps=8,
        )
        launch(
            fixed_point_rows_kernel,
            tile // min(ROWS, tile) * items.shape[0] * heads * batch,
            (
                out,
                grad_out,
                lse,
                grad_lse,
                delta,
                self.padded_lse,
                self.padded_delta,
                self.scale,
                self.integers,
                key_max,
                value_max,
                far,
                items,
            ),
            (
                *out.stride()[:3],
                *grad_out.stride()[:3],
                *(lse if grad_lse is None else grad_lse).stride(),
                items.shape[0],
                rows,
                padded_rows,
                key_max.shape[2],
                lists.window,
                lists.num_sinks,
                lists.period,
                head_stride(lists, far),
            ),
            HEADS=heads,
            GROUP=heads // kv_heads,
            ROWS=min(ROWS, tile),
            FAR=lists.width,
            SCAN=SCAN,
            GRAD_LSE=grad_lse is not None,
            **shape,
            num_warps=8,
        )

    def finish(self, grad_query: Tensor, partials: tuple[Tensor, Tensor, Tensor, Tensor, int] | None) -> None:
        """Write the gradient of queries. In the same launch, where given, ``partials``: the sums of the chunks of split
        sink tiles, fp32 ``[B, Hkv, split_items, 2, tile, D]``, are added into the gradients of keys and values; these,
        items and chunk as in ``add_partials``."""
        batch, heads, rows, head_dim = grad_query.shape
        kv_heads, tile = self._call.key.shape[1], self._tile
        line = min(16, tile)
        partial, grad_key, grad_value, split_items, chunk = partials or (None, None, None, self._items, 0)
        places = partial.shape[2] if partial is not None else 0
        programs = tile // line * kv_heads * places * batch
        strides = [s for g in (grad_key, grad_value) for s in (g.stride()[:3] if g is not None else (0, 0, 0))]
        launch(
            fixed_point_finish_kernel,
            programs + self._items.shape[0] * heads * batch,
            (self.integers, self.scale, grad_query, self._items, partial, grad_key, grad_value, split_items),
            (
                *grad_query.stride()[:3],
                self._items.shape[0],
                rows,
                self.scale.shape[2],
                self._call.scale,
                programs,
                *strides,
                places,
                chunk,
            ),
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=head_dim,
            TPB=self._lists.block // tile,
            TILE=tile,
            ROWS=line,
            SUMS=partial is not None,
            num_warps=8,
        )
