"""The decoding kernels on a GPU: bf16, real sizes, pages, and CUDA graphs that are replayed as the lengths grow."""

from __future__ import annotations

import pytest
import torch
from sparsetrain_kernels.block_decode import block_pattern_decode

from sparsetrain.methods.ruler import RulerPattern
from sparsetrain.patterns import LongNetPattern, PowerPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_cache(rows: int, keys: int, *, heads=(32, 8), batch=4, head_dim=128, dtype=torch.bfloat16):
    torch.manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)

    return random(heads[0], rows), random(heads[1], keys), random(heads[1], keys)


def to_lengths(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device="cuda")


def assert_equals_the_reference(tensors, pattern, lengths, **options) -> None:
    got = block_pattern_decode(*tensors, pattern, lengths=lengths, return_lse=True, backend="triton", **options)
    want = block_pattern_decode(*tensors, pattern, lengths=lengths, return_lse=True, backend="reference", **options)
    tolerance = TOLERANCE[tensors[0].dtype]
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_reference(rows: int, head_dim: int, dtype) -> None:
    tensors = make_cache(rows, 9000, head_dim=head_dim, dtype=dtype)
    assert_equals_the_reference(tensors, PowerPattern(), to_lengths(8960 + rows // 2, 0, 700, 9000))


@pytest.mark.parametrize("heads", [(8, 8), (28, 4), (64, 1)])
@pytest.mark.parametrize("kind", ["power", "by head", "ruler"])
def test_equals_the_reference_for_every_group(heads, kind: str) -> None:
    by_head = LongNetPattern(64, head_shift=True, num_heads=heads[1])
    pattern = {"power": PowerPattern(48, 3, 1), "by head": by_head, "ruler": RulerPattern(32, 2, 1, 2, 5)}[kind]
    tensors = make_cache(5, 4000, heads=heads)
    options = {"softcap": 20.0, "sink_logits": torch.randn(heads[0], device="cuda")}
    assert_equals_the_reference(tensors, pattern, to_lengths(3842, 4000, 50, 3), **options)


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("rows", [1, 4])
def test_pages_equal_a_contiguous_cache(page_size: int, rows: int) -> None:
    query, key, value = make_cache(rows, 8192)
    lengths = to_lengths(8192, 7937, 1, 300)
    table = torch.randperm(4 * 8192 // page_size, device="cuda").view(4, -1).to(torch.int32)

    def paged(cache: torch.Tensor) -> torch.Tensor:
        pages = cache.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
        return torch.empty_like(pages).index_copy_(0, table.flatten().long(), pages)

    got = block_pattern_decode(
        query, paged(key), paged(value), PowerPattern(), lengths=lengths, block_table=table, backend="triton"
    )
    want = block_pattern_decode(query, key, value, PowerPattern(), lengths=lengths, backend="triton")
    assert torch.equal(got, want)


def test_one_graph_serves_growing_lengths_and_repeats_bit_for_bit() -> None:
    query, key, value = make_cache(1, 8192)
    lengths = to_lengths(1, 255, 4096, 8000)
    block_pattern_decode(query, key, value, PowerPattern(), lengths=lengths, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_pattern_decode(query, key, value, PowerPattern(), lengths=lengths, backend="triton")
    for _ in range(192):
        graph.replay()
        want = block_pattern_decode(query, key, value, PowerPattern(), lengths=lengths, backend="triton")
        assert torch.equal(out, want)
        lengths += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_pattern_decode(query, key, value, PowerPattern(), lengths=lengths, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
