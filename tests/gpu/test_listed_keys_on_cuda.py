"""Lists of keys and attention over them on a GPU: real sizes, bf16, pages, and CUDA graphs that are replayed."""

from __future__ import annotations

import pytest
import torch
from sparsetrain_kernels import PositionLists, listed_decode, top_k_lists, top_p_lists
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def to_integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def make_scores(lengths: Tensor, columns: int, heads: int = 32, spread: float = 3.3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    scores = torch.randn(len(lengths), heads, columns, device="cuda") * spread
    # Heads from flat to peaked.
    scores = (scores * torch.linspace(0.1, 2, heads, device="cuda")[:, None]).half()
    scores.masked_fill_(torch.arange(columns, device="cuda") >= lengths[:, None, None], -torch.inf)
    return scores, scores.float().logsumexp(-1)


def assert_alike(got: PositionLists, want: PositionLists) -> None:
    """The same but for what one part in a million of the weight decides: the exponential functions differ."""
    assert ((got.counts + got.dropped) - (want.counts + want.dropped)).abs().max() <= 1e-4 * want.lists.shape[2] + 8
    for row in range(len(got.counts)):
        for head in range(got.counts.shape[1]):
            ours = got.lists[row, head, : got.counts[row, head]]
            theirs = want.lists[row, head, : want.counts[row, head]]
            assert (ours.diff() > 0).all()
            shared = torch.isin(ours, theirs).sum()
            assert shared >= 0.999 * max(len(ours), len(theirs)) - 8


@pytest.mark.parametrize("columns", [3000, 40000, 131072])
@pytest.mark.parametrize("group", ["union", "max", "mean"])
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
def test_lists_equal_the_reference(columns: int, group: str, p: float) -> None:
    lengths = to_integers(columns, 0, columns // 3)
    scores, lse = make_scores(lengths, columns)
    options = {"lengths": lengths, "num_kv_heads": 8, "group": group, "min_keys": 64, "sinks": 16, "recent": 100}
    for capacity in (columns, columns // 64):
        named = {**options, "capacity": capacity}
        got = top_p_lists(scores, lse, p, **named, backend="triton")
        assert_alike(got, top_p_lists(scores, lse, p, **named, backend="reference"))
        again = top_p_lists(scores, lse, p, **named, backend="triton")
        assert torch.equal(got.counts, again.counts)
        assert torch.equal(got.dropped, again.dropped)


@pytest.mark.parametrize("columns", [3000, 131072])
def test_the_heaviest_keys_equal_the_reference(columns: int) -> None:
    lengths = to_integers(columns, columns // 3)
    scores, lse = make_scores(lengths, columns)
    options = {"lengths": lengths, "num_kv_heads": 8, "sinks": 4, "recent": 64}
    got = top_k_lists(scores, lse, 1024, **options, backend="triton")
    want = top_k_lists(scores, lse, 1024, **options, backend="reference")
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.lists[0], want.lists[0])


def test_flat_and_peaked_rows_of_131072_keys() -> None:
    scores = torch.zeros(1, 4, 131072, device="cuda", dtype=torch.float16)
    scores[0, 1, 7] = 30.0
    scores[0, 2, ::2] = -torch.inf
    scores[0, 3] = torch.arange(131072, device="cuda").remainder(1000) / 1000
    options = {"lengths": to_integers(131072), "num_kv_heads": 4, "capacity": 131072, "backend": "triton"}
    found = top_p_lists(scores, scores.float().logsumexp(-1), 0.9, **options)
    assert found.counts[0, :3].tolist() == [131072, 1, 65536]
    assert found.lists[0, 1, 0] == 7
    want = top_p_lists(scores, scores.float().logsumexp(-1), 0.9, **{**options, "backend": "reference"})
    assert torch.equal(found.counts, want.counts)


def make_cache(rows: int, tokens: int, *, heads=(32, 8), batch=4, head_dim=128, page=256, dtype=torch.bfloat16):
    torch.manual_seed(0)
    query = torch.randn(batch, heads[0], rows, head_dim, device="cuda", dtype=dtype)
    pages = [
        torch.randn(batch * tokens // page + 2, heads[1], page, head_dim, device="cuda", dtype=dtype) for _ in range(2)
    ]
    table = torch.randperm(batch * tokens // page, device="cuda").view(batch, -1).to(torch.int32)
    return query, pages, table


def make_lists(lengths: Tensor, kv_heads: int, capacity: int, sinks: int, recent: int) -> tuple[Tensor, Tensor]:
    """From a few keys to ``capacity``, by head; none that is attended in any case."""
    lists = torch.full((len(lengths), kv_heads, capacity), -(2**30), dtype=torch.int32, device="cuda")
    counts = torch.zeros(len(lengths), kv_heads, dtype=torch.int32, device="cuda")
    for row, length in enumerate(lengths.tolist()):
        for head in range(kv_heads):
            free = torch.randperm(max(length - sinks - recent, 0), device="cuda")[: capacity >> (head % 7)] + sinks
            lists[row, head, : len(free)] = free.sort().values
            counts[row, head] = len(free)
    return lists, counts


@pytest.mark.parametrize(("rows", "heads"), [(1, (32, 8)), (4, (8, 8)), (16, (16, 2))])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_over_lists_equals_the_reference(rows: int, head_dim: int, dtype, heads) -> None:
    query, pages, table = make_cache(rows, 8192, heads=heads, head_dim=head_dim, dtype=dtype)
    lengths = to_integers(8192, 0, 700, 5000)
    lists, counts = make_lists(lengths, heads[1], 1000, 16, 64)
    table[3, 2] = -1
    options = {"lengths": lengths, "block_table": table, "sinks": 16, "recent": 64, "return_lse": True}
    options |= {"softcap": 20.0, "sink_logits": torch.randn(heads[0], device="cuda")}
    got = listed_decode(query, *pages, lists, counts, **options, backend="triton")
    want = listed_decode(query, *pages, lists, counts, **options, backend="reference")
    torch.testing.assert_close(got[0], want[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_one_graph_serves_growing_lengths_and_repeats_bit_for_bit() -> None:
    query, pages, table = make_cache(1, 32768)
    lengths, recent = to_integers(30000, 255, 17000, 32000), to_integers(64, 64, 64, 64)
    scores, lse = make_scores(lengths + 300, 32768)
    options = {"lengths": lengths, "sinks": 16, "recent": recent, "backend": "triton"}

    def step() -> Tensor:
        found = top_p_lists(scores, lse, 0.9, num_kv_heads=8, capacity=4096, **options)
        return listed_decode(query, *pages, found.lists, found.counts, block_table=table, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(100):
        graph.replay()
        assert torch.equal(out, step())
        lengths += 1
        recent += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
