"""Recycled attention as a layer has it in training, and its parts."""

from __future__ import annotations

from typing import Any

import torch
from sparsetrain_kernels import causal_attention, listed_attention
from torch import Tensor, nn

from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.problem import RecycledProblem, Tensors
from sparsetrain.methods.recycled.choice import choose
from sparsetrain.methods.recycled.method import RecycledConfig
from sparsetrain.methods.recycled.segments import make_segments


def _recycled(problem: RecycledProblem, tensors: Tensors) -> Prepared:
    config = RecycledConfig(every=problem.every, keep=problem.keep, sinks=problem.sinks, recent=problem.recent)
    method, rules = config.build(problem.kv_heads), config.build(problem.kv_heads).rules
    segments = make_segments([0, problem.length], [0], [problem.every]).to(problem.device)
    starts, scale = segments.starts.long(), problem.head_dim**-0.5
    skip = segments.starts - segments.bounds[:-1] + 1
    layer = nn.Module()
    options: dict[str, Any] = {"cu_seqlens": None, "scale": scale}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return method.attend(layer, query, key, value, segments=segments, **options)

    def rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        given = {"query_positions": segments.starts, "return_lse": True, **options}
        return causal_attention(query[:, :, starts], key, value, **given)

    def full(query: Tensor, key: Tensor, value: Tensor) -> None:
        out, _ = rows(query, key, value)
        torch.autograd.backward(out, tensors.upstream[:, :, starts])

    with torch.no_grad():
        _, lse = rows(*tensors[:3])

    def select(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            choose(rules, query[row, None][:, :, starts], key[row, None], lse[row, None], segments, None, scale)
            for row in range(problem.batch)
        ]
        lists, counts = (torch.cat(each) for each in zip(*found, strict=True))
        return lists, counts

    lists, counts = select(*(tensor.detach() for tensor in tensors[:3]))

    def listed(query: Tensor, key: Tensor, value: Tensor) -> None:
        given = {"skip": skip, "window": rules.recent, "sinks": rules.sinks, **options}
        out = listed_attention(query, key, value, lists, counts, segments.bounds, **given)
        torch.autograd.backward(out, tensors.upstream)

    return Prepared(attend, parts={"full_rows_ms": full, "selection_ms": select, "listed_ms": listed})


RECYCLED = Contender("ours", "sparsetrain, recycled attention", "chosen", _recycled, ("cuda", "cpu"), (False,))
