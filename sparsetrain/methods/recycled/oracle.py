"""The oracle of recycled attention: its definition in fp64, row by row, without the method's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Expected
from sparsetrain.methods.recycled.choice import POOLED, choose
from sparsetrain.methods.recycled.rows import settled
from sparsetrain.methods.recycled.rules import Rules
from sparsetrain.methods.recycled.segments import Segments

CHECKED_ROWS = 32
"""Number of evenly spaced tokens of a document that are checked; each reads the whole document."""


def expected_rows(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document: slice,
    segments: Segments,
    options: Mapping[str, Any],
) -> Expected:
    """The output at evenly spaced rows of a document.

    The choices are the method's own, since with other rounding two keys of close weights could swap ranks; that they
    are the keys of the largest weights is checked up to that rounding.

    Args:
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        document: The positions of the document in the row.

    Raises:
        ModelError: A choice leaves out a key that is clearly heavier than one of its own.
    """
    scale = options.get("scale") or query.shape[3] ** -0.5
    first, length = document.start, document.stop - document.start
    q, k, v = (tensor[0, :, document].double() for tensor in (query, key, value))
    checks = (segments.starts[segments.documents == first] - first).tolist()
    segments = settled(rules, query, segments)
    own = (segments.documents == first).nonzero()[:, 0]
    starts = (segments.starts[own] - first).tolist()
    check_gate(rules, q, checks, starts)
    full = {*starts, *(segments.prompts - first).tolist()}
    inside = segments.starts[own].long()
    lse = torch.stack([row_logits(query[0, :, row], key[0, :, first : row + 1], scale).logsumexp(-1) for row in inside])
    part = replace(segments, starts=segments.starts[own], documents=segments.documents[own])
    found = lse.mT[None].float().contiguous()
    lists, counts = choose(rules, query[:, :, inside], key, found, part, options.get("cu_seqlens"), scale)

    checked = torch.linspace(0, length - 1, min(CHECKED_ROWS, length)).long().tolist()
    rows = []
    for row in checked:
        seen = torch.zeros(k.shape[0], length, dtype=torch.bool, device=q.device)
        if row in full:
            seen[:, : row + 1] = True
        else:
            index = max(i for i, start in enumerate(starts) if start <= row)
            start = starts[index]
            chosen = listed(lists[0, :, index], counts[0, :, index], length)
            check_choice(rules, q[:, start], k[:, : start + 1], chosen[:, : start + 1], scale)
            seen |= chosen
            seen[:, max(start + 1 - rules.recent, 0) : row + 1] = True
            seen[:, : min(rules.sinks, row + 1)] = True
        logits = (q[:, row].unflatten(0, (k.shape[0], -1)) @ k.mT) * scale
        weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        rows.append((weights @ v).flatten(0, 1))
    positions = torch.tensor(checked, device=query.device) + first
    return Expected(positions, torch.stack(rows, dim=1)[None])


def check_gate(rules: Rules, query: Tensor, checks: list[int], starts: list[int]) -> None:
    """Compare the rows of a document that chose with the definition, up to rounding.

    Args:
        query: ``[Hq, N, D]``, fp64.
        checks: The rows that could choose.
        starts: Those that did.

    Raises:
        ModelError: They differ.
    """
    if rules.similarity is None:
        return
    mean, last = query.mean(0), starts[0]
    for row in checks[1:]:
        similarity = torch.cosine_similarity(mean[row], mean[last], dim=0).item()
        chose = row in starts
        if chose != (similarity <= rules.similarity) and abs(similarity - rules.similarity) > 1e-4:
            raise ModelError("recycled attention chose anew in a row whose query says otherwise")
        last = row if chose else last


def row_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The logits of one row, fp64 ``[Hq, n]``, of ``[Hq, D]`` and ``[Hkv, n, D]``."""
    grouped = query.double().unflatten(0, (key.shape[0], -1))
    return (grouped @ key.double().mT * scale).flatten(0, 1)


def listed(lists: Tensor, counts: Tensor, length: int) -> Tensor:
    """A list ``[Hkv, K]`` with its counts ``[Hkv]`` as a mask, bool ``[Hkv, length]``."""
    used = torch.arange(lists.shape[1], device=lists.device) < counts[:, None]
    mask = torch.zeros(len(lists), length + 1, dtype=torch.bool, device=lists.device)
    return mask.scatter(1, lists.long().where(used, length), True)[:, :length]


def check_choice(rules: Rules, query: Tensor, key: Tensor, chosen: Tensor, scale: float) -> None:
    """Compare a choice with the definition, up to the rounding of scores to fp16.

    Args:
        query: ``[Hq, D]``, of the row that chooses.
        key: ``[Hkv, n, D]``.
        chosen: bool ``[Hkv, n]``.

    Raises:
        ModelError: They differ.
    """
    logits = row_logits(query, key, scale)
    weights = (logits - logits.logsumexp(-1, keepdim=True)).unflatten(0, (len(key), -1))
    length = key.shape[1]
    place = torch.arange(length, device=key.device)
    free = (place >= rules.sinks) & (place < length - rules.recent)
    rounding = (logits.abs().max() + weights.abs().max()) * 2.0**-9
    if rules.p is None:
        pooled = torch.nn.functional.max_pool1d(weights.amax(1), POOLED, 1, POOLED // 2)
        count = min(rules.keep, int(free.sum()))
        wrong = chosen.sum(-1) != count
        left = pooled.masked_fill(~free | chosen, float("-inf")).amax(-1)
        least = pooled.masked_fill(~chosen, float("inf")).amin(-1)
        wrong |= left > least + rounding
    else:
        # Where there is room for all, each head has its share of the weight.
        slack = rounding.expm1()
        mass = weights.exp().masked_fill((free & ~chosen)[:, None], 0).sum(-1)
        wrong = (mass < rules.p - slack).any(-1) & (
            most_members(weights, free, rules.p + slack, rounding) <= rules.keep
        )
    if bool((wrong | (chosen & ~free).any(-1)).any()):
        raise ModelError("recycled attention chose other keys than those of the largest weights")


def most_members(weights: Tensor, free: Tensor, p: Tensor, rounding: Tensor) -> Tensor:
    """Keys that a top-p of the heads of each group has at most, up to rounding, int64 ``[Hkv]``.

    Args:
        weights: logarithms of weights ``[Hkv, group, n]``.
        free: bool ``[n]``, the keys that compete.
        p: the share of the weight that each head needs.
        rounding: of a logarithm.
    """
    always = weights.exp().masked_fill(free, 0).sum(-1, keepdim=True)
    order = weights.masked_fill(~free, float("-inf")).sort(-1, descending=True).values
    # A key is a member if those that are clearly heavier have too little.
    before = torch.searchsorted(-order, -(weights + 2 * rounding).contiguous())
    heavier = torch.nn.functional.pad(order.exp().cumsum(-1), (1, 0)).gather(-1, before)
    return ((always + heavier < p) & free).any(1).sum(-1)
