"""Sampled rows of a layer: what the keys that they read hold of full attention, and what as many others would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsetrain.modeling import sparse_layers

TOGETHER = 2**24
"""Logits that are held at a time, of all query heads: 64 MiB in fp32, a few times."""
ENOUGH = 1 - 1e-6
"""An oracle's keys hold the same mass if they hold this share of it: sums are rounded."""


def compare_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    out: Tensor,
    rows: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> dict[str, float]:
    """Rows of a layer beside full attention on the same queries, keys and values, in fp32.

    Args:
        query: ``[Hq, R, D]``, of these rows.
        key, value: ``[Hkv, N, D]``, of one document.
        read: bool ``[H, R, N]``, the keys that they read, ``H`` dividing ``Hq``.
        out: ``[Hq, R, D]``, what the layer answered.
        rows: int64 ``[R]``, their positions.

    Returns:
        Means over heads and rows, by the fields of
        :class:`~sparsetrain.evaluation.attention_error.result.LayerError`.
    """
    heads, length = query.shape[0], key.shape[1]
    key, value = key.float(), value.float()
    sums: dict[str, Tensor] = {}
    for part in torch.arange(len(rows), device=rows.device).split(max(1, TOGETHER // (heads * length))):
        weights = _Weights(query[:, part].float(), key, value, rows[part], scale, softcap, sink_logits)
        seen = read[:, part].repeat_interleave(heads // len(read), dim=0)
        for name, found in weights.compare(seen, out[:, part].float()).items():
            sums[name] = sums.get(name, 0) + found.double().sum()
    totals = torch.stack(list(sums.values())).tolist()
    return {name: total / (heads * len(rows)) for name, total in zip(sums, totals, strict=True)}


class _Weights:
    """The softmax weights of a few rows, fp32 ``[Hq, r, N]``, up to a factor of each row."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> None:
        self._value, self._rows = value, rows
        grouped = query.unflatten(0, (len(key), -1)).flatten(1, 2)
        logits = (grouped @ key.mT * scale).unflatten(1, (-1, len(rows))).flatten(0, 1)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        self._place = torch.arange(key.shape[1], device=key.device)
        logits = logits.masked_fill(self._place > rows[:, None], float("-inf"))
        top = logits.amax(-1, keepdim=True)
        self._sink: Tensor | float = 0.0
        if sink_logits is not None:
            sink = sink_logits.float()[:, None, None]
            top = top.maximum(sink)
            self._sink = (sink - top).exp()
        self._weights = (logits - top).exp()
        # A learned sink is no key.
        self._total = self._weights.sum(-1)
        self._whole = self._output(self._weights)

    def compare(self, read: Tensor, out: Tensor) -> dict[str, Tensor]:
        """What is measured of the rows, each ``[Hq, r]``."""
        count = read.sum(-1)
        held = self._weights * read
        ordered, order = self._weights.sort(dim=-1, descending=True)
        largest = torch.where(self._place < count[..., None], ordered, 0.0)
        needed = held.double().sum(-1, keepdim=True) * ENOUGH
        top_k = torch.zeros_like(ordered).scatter_(-1, order, largest)
        window = self._weights * (self._place > self._rows[:, None] - count[..., None])
        return {
            "mass": self._share(held),
            "error": self._error(out),
            "keys": count,
            "top_k_mass": self._share(largest),
            "top_k_error": self._error(self._output(top_k)),
            "top_p_keys": (ordered.double().cumsum(-1) < needed).sum(-1) + 1,
            "window_mass": self._share(window),
            "window_error": self._error(self._output(window)),
        }

    def _share(self, held: Tensor) -> Tensor:
        return held.sum(-1) / self._total

    def _output(self, held: Tensor) -> Tensor:
        """Attention with some of the weights, ``[Hq, r, D]``."""
        grouped = held.unflatten(0, (len(self._value), -1)).flatten(1, 2)
        summed = (grouped @ self._value).unflatten(1, (-1, held.shape[1])).flatten(0, 1)
        tiny = torch.finfo(torch.float32).tiny
        return summed / (held.sum(-1, keepdim=True) + self._sink).clamp_min(tiny)

    def _error(self, out: Tensor) -> Tensor:
        norm = self._whole.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return (out - self._whole).norm(dim=-1) / norm


@contextmanager
def compared(model: PreTrainedModel, rows: Tensor) -> Iterator[dict[int, dict[str, float]]]:
    """While open, each layer with a method adds what :func:`compare_rows` gives of its call, by its index.

    Args:
        rows: int64 ``[R]`` on the model's device, positions of the one document of a pass.
    """
    found: dict[int, dict[str, float]] = {}
    methods: Mapping[int, Any] = {id(method): method for _, _, method in sparse_layers(model) if method is not None}
    with ExitStack() as stack:
        for method in methods.values():
            stack.enter_context(_watched(method, rows, found))
        yield found


@contextmanager
def _watched(method: Any, rows: Tensor, found: dict[int, dict[str, float]]) -> Iterator[None]:
    original = method.attend

    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        out: Tensor = original(layer, query, key, value, **call)
        read = method.keys_read(layer, query, key, value, rows=rows, **call)
        factors = {name: call.get(name) for name in ("softcap", "sink_logits")}
        scale = call.get("scale") or query.shape[3] ** -0.5
        index: Any = layer.layer_idx
        found[index] = compare_rows(
            query[0, :, rows], key[0], value[0], read, out[0, :, rows], rows, scale=scale, **factors
        )
        return out

    method.attend = attend
    try:
        yield
    finally:
        del method.attend
