"""The mirror and its estimates on a GPU: bf16, real sizes, pages, and CUDA graphs that are replayed as lengths grow."""

from __future__ import annotations

import pytest
import torch
from paged_keys import PagedKeys, paged_keys
from sparsetrain_kernels import estimate_scores, page_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (3000, 1, 2049, 0)
HALF = 1.1e-3
"""Scores are rounded to fp16, and may fall on either side of a half."""


def filled(backend: str, *, steps: int = 2, **options) -> PagedKeys:
    """All tokens but the last ``steps`` in one call, those one by one."""
    keys = paged_keys(LENGTHS, device="cuda", dead=((0, 1),), **options)
    tokens = keys.key.shape[2]
    keys.append(slice(0, tokens - steps), (keys.lengths - steps).clamp(min=0), backend)
    for left in reversed(range(steps)):
        keys.append(slice(tokens - left - 1, tokens - left), (keys.lengths - left).clamp(min=0), backend)
    return keys


def make_query(keys: PagedKeys, group: int) -> torch.Tensor:
    torch.manual_seed(1)
    batch, kv_heads, _, head_dim = keys.key.shape
    return torch.randn(batch, kv_heads * group, 1, head_dim, device="cuda").to(keys.key.dtype)


def alike(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page"), [(8, 4, 128, 256), (2, 8, 64, 16), (4, 1, 80, 48), (1, 24, 256, 128)]
)
@pytest.mark.parametrize("bytes_", [True, False])
def test_equals_the_reference(dtype, kv_heads, group, head_dim, page, bytes_, poisoned) -> None:
    options = {"kv_heads": kv_heads, "head_dim": head_dim, "page": page, "dtype": dtype, "bytes_": bytes_}
    want, keys = (filled(backend, **options) for backend in ("reference", "triton"))
    for a, b in zip(
        (want.key_cache, want.value_cache, *want.mirror[:2], want.bounds.values.float()),
        (keys.key_cache, keys.value_cache, *keys.mirror[:2], keys.bounds.values.float()),
        strict=True,
    ):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))

    query = make_query(keys, group)
    upper = page_scores(query, keys.bounds, **keys.places(), backend="triton")
    alike(upper, page_scores(query, keys.bounds, **keys.places(), backend="reference"), 1e-4)
    lists = upper.topk(20).indices.to(torch.int32)
    counts = torch.randint(0, 21, lists.shape[:2], device="cuda", dtype=torch.int32)
    for listed in ({}, {"page_lists": lists, "page_counts": counts}):
        for softcap in (None, 20.0):
            got, expected = (
                estimate_scores(query, keys.mirror, **keys.places(), **listed, softcap=softcap, backend=backend)
                for backend in ("triton", "reference")
            )
            alike(got[0], expected[0], HALF)
            alike(got[1], expected[1], HALF)
            again = estimate_scores(query, keys.mirror, **keys.places(), **listed, softcap=softcap, backend="triton")
            assert all(map(torch.equal, got, again))


def test_one_graph_serves_growing_lengths() -> None:
    keys = filled("triton", kv_heads=8, head_dim=128, page=256, dtype=torch.bfloat16, bytes_=True, steps=0)
    keys.table.copy_(torch.arange(keys.table.numel()).view_as(keys.table))
    query = make_query(keys, 4)
    keys.lengths.copy_(torch.tensor([5, 15, 255, 2000]))
    keys.key.nan_to_num_(0)
    keys.value.nan_to_num_(0)

    def step() -> tuple[torch.Tensor, ...]:
        keys.append(slice(0, 1), keys.lengths, "triton")
        upper = page_scores(query, keys.bounds, **keys.places(), backend="triton")
        lists = upper.topk(16).indices.to(torch.int32)
        counts = torch.full_like(lists[:, :, 0], 16)
        few = estimate_scores(
            query, keys.mirror, **keys.places(), page_lists=lists, page_counts=counts, backend="triton"
        )
        return upper, *few, *estimate_scores(query, keys.mirror, **keys.places(), backend="triton")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        keys.lengths.add_(1)
        graph.replay()
        want = step()
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(captured, want, strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
