"""Block-pattern attention under the full mask, the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.pattern import BlockPattern
from sparsetrain_kernels.inputs import AttentionInputs, Document
from sparsetrain_kernels.masked import masked_attention


def dense_attention(inputs: AttentionInputs, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """Builds the whole mask: the definition of the operation."""
    kv_heads, keys = inputs.key.shape[1:3]
    visible = visible_keys(pattern, inputs.documents(), inputs.query.shape[2], keys, kv_heads).to(inputs.query.device)
    return masked_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        visible,
        scale=inputs.scale,
        softcap=inputs.softcap,
        sink_logits=inputs.sink_logits,
    )


def visible_keys(pattern: BlockPattern, documents: tuple[Document, ...], rows: int, keys: int, kv_heads: int) -> Tensor:
    """The mask, bool ``[Hkv or 1, rows, keys]``: same document, not later, and in a listed block."""
    heads = kv_heads if pattern.per_head else 1
    visible = torch.zeros(heads, rows, keys, dtype=torch.bool)
    for row, rows, position, key in documents:
        document = visible[:, row : row + rows, key : key + position + rows]
        for query_block in range(position // pattern.block, (position + rows - 1) // pattern.block + 1):
            first = max(query_block * pattern.block - position, 0)
            last = (query_block + 1) * pattern.block - position
            for head in range(heads):
                for j in pattern.key_blocks(query_block, head):
                    document[head, first:last, j * pattern.block : (j + 1) * pattern.block] = True
        document.copy_(document.tril(position))
    return visible
