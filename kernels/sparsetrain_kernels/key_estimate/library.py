"""The operations as PyTorch knows them: opaque to ``torch.compile``, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.key_estimate import reference
from sparsetrain_kernels.key_estimate.inputs import EstimateInputs
from sparsetrain_kernels.key_mirror.layout import KeyMirror, PageBounds

torch.library.define(
    "sparsetrain::estimate_scores",
    "(Tensor query, Tensor codes, Tensor scale_low, Tensor center, Tensor spread, Tensor lengths, Tensor block_table, "
    "int max_length, float scale, float? softcap, Tensor? page_lists, Tensor? page_counts, int granule, Tensor? due, "
    "str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "sparsetrain::page_scores",
    "(Tensor query, Tensor bounds, Tensor? center, Tensor? spread, Tensor lengths, Tensor block_table, int granules, "
    "float scale, Tensor? due, ScalarType dtype, str backend) -> Tensor",
)
torch.library.define(
    "sparsetrain::key_weights",
    "(Tensor query, Tensor key_cache, Tensor lse, Tensor lengths, Tensor block_table, int max_length, float scale, "
    "float? softcap, Tensor? due, str backend) -> Tensor",
)


def _inputs(query: Tensor, *args: Any) -> EstimateInputs:
    mirror = KeyMirror._make(args[: len(KeyMirror._fields)])
    return EstimateInputs._make((query, mirror, *args[len(KeyMirror._fields) :]))


@torch.library.impl("sparsetrain::estimate_scores", "default")
def _estimate(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    if backend == "reference":
        return reference.estimate(_inputs(*inputs))
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.key_estimate.triton.launch import estimate

    return estimate(_inputs(*inputs))


@torch.library.impl("sparsetrain::page_scores", "default")
def _page_scores(query: Tensor, *args: Any) -> Tensor:
    bounds, (*options, backend) = PageBounds._make(args[:3]), args[3:]
    if backend == "reference":
        return reference.upper_bounds(query, bounds, *options)
    from sparsetrain_kernels.key_estimate.triton.launch import upper_bounds

    return upper_bounds(query, bounds, *options)


@torch.library.register_fake("sparsetrain::estimate_scores")
def _estimate_fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs = _inputs(*args[:-1])
    rows = inputs.query.shape[:2]
    scores = inputs.query.new_empty((*rows, inputs.columns), dtype=torch.float16)
    return scores, inputs.query.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("sparsetrain::page_scores")
def _page_scores_fake(
    query: Tensor,
    bounds: Tensor,
    center: Any,
    spread: Any,
    lengths: Tensor,
    block_table: Tensor,
    granules: int,
    scale: float,
    due: Any,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return query.new_empty((query.shape[0], bounds.shape[1], granules), dtype=dtype)


@torch.library.impl("sparsetrain::key_weights", "default")
def _key_weights(*args: Any) -> Tensor:
    *inputs, backend = args
    if backend == "reference":
        return reference.key_weights(*inputs)
    from sparsetrain_kernels.key_estimate.triton.launch import key_weights

    return key_weights(*inputs)


@torch.library.register_fake("sparsetrain::key_weights")
def _key_weights_fake(query: Tensor, *args: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], args[4]), dtype=torch.float16)
