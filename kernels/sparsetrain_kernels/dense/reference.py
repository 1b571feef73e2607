"""Causal attention in plain PyTorch: torch's fused attention where it is the same operation, else gathered tiles."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.backend import older_than_ampere
from sparsetrain_kernels.gather import gather_attention
from sparsetrain_kernels.inputs import AttentionInputs, Document
from sparsetrain_kernels.masked import masked_attention


@dataclass(frozen=True)
class _CausalTiles:
    """All key tiles up to the diagonal, or those a sliding window of ``window`` tokens can reach."""

    window: int | None
    block: int = 128
    per_head: bool = False

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        first = 0 if self.window is None else max(0, (query_block * self.block - self.window + 1) // self.block)
        return tuple(range(first, query_block + 1))


def attention(inputs: AttentionInputs, window: int | None) -> tuple[Tensor, Tensor]:
    """Query tiles by the key tiles up to the diagonal; a window clips the left side."""
    return gather_attention(inputs, _CausalTiles(window), window)


def fused_applies(inputs: AttentionInputs, documents: tuple[Document, ...], window: int | None) -> bool:
    """Whether torch's fused attention computes exactly this: no extras, and each document square or a single row.

    Only its operation for packed documents knows windows, and takes one sequence.
    """
    if inputs.softcap is not None or inputs.sink_logits is not None:
        return False
    if window is not None:
        batch, _, rows, _ = inputs.query.shape
        square = rows == inputs.key.shape[2] and all(document.position == 0 for document in documents)
        return batch == 1 and square and _varlen_applies(inputs.query)
    return all(document.position == 0 or document.rows == 1 for document in documents)


def fused_attention(inputs: AttentionInputs, documents: tuple[Document, ...], window: int | None) -> Tensor:
    """One call a document, or one for all of them where torch has it."""
    if window is not None or (len(documents) > 1 and _varlen_applies(inputs.query)):
        return _varlen_attention(inputs, documents, window)
    outs = []
    for row, rows, position, key in documents:
        keys = slice(key, key + position + rows)
        outs.append(
            F.scaled_dot_product_attention(
                inputs.query[:, :, row : row + rows],
                inputs.key[:, :, keys],
                inputs.value[:, :, keys],
                is_causal=rows > 1,
                scale=inputs.scale,
                enable_gqa=True,
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _varlen_applies(query: Tensor) -> bool:
    """Whether torch's attention for packed documents takes these tensors: FlashAttention on CUDA, half precision."""
    takes = query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] % 8 == 0 and query.shape[3] <= 256
    if not (query.is_cuda and takes) or older_than_ampere(query):
        return False
    return {"scale", "window_size"} <= _varlen_parameters()


@lru_cache(maxsize=1)
def _varlen_parameters() -> set[str]:
    """What this torch's ``varlen_attn`` understands; it came in 2.10."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return set()
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)


def _varlen_attention(inputs: AttentionInputs, documents: tuple[Document, ...], window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (inputs.query, inputs.key, inputs.value))
    lengths = [document.rows for document in documents]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(query.device, non_blocking=True)
    longest = max(lengths)
    # The kernel always shared KV heads within a group; since 2.12 it wants to be asked for it.
    # It counts the keys on the left, the query's own not included.
    options: dict[str, Any] = {"scale": inputs.scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _varlen_parameters():
        options["enable_gqa"] = True
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)  # the log-sum-exp comes along only where it is asked for
    return out.transpose(0, 1)[None]


def dense_attention(inputs: AttentionInputs, window: int | None) -> tuple[Tensor, Tensor]:
    """Builds the whole mask: the definition of the operation."""
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    visible = torch.zeros(rows, keys, dtype=torch.bool)
    for row, count, position, key in inputs.documents():
        document = torch.ones(count, position + count, dtype=torch.bool).tril(position)
        if window is not None:
            document = document.triu(position - window + 1)
        visible[row : row + count, key : key + position + count] = document
    return masked_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        visible.to(inputs.query.device),
        scale=inputs.scale,
        softcap=inputs.softcap,
        sink_logits=inputs.sink_logits,
    )
