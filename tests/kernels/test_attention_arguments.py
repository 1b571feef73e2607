"""Arguments that do not fit are refused by name, by both operations alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sparsetrain_kernels import block_pattern_attention, causal_attention

from sparsetrain.patterns import PowerPattern

OPERATIONS = pytest.mark.parametrize(
    "attention",
    [partial(block_pattern_attention, pattern=PowerPattern(4, 2, 1)), causal_attention],
    ids=["block", "causal"],
)
QUERY = torch.zeros(1, 4, 10, 8)
KEY = torch.zeros(1, 2, 10, 8)


def packed(*bounds: int, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(bounds, dtype=dtype)


@OPERATIONS
@pytest.mark.parametrize(
    ("query", "key", "value", "named"),
    [
        (QUERY[0], KEY, KEY, r"query has shape \(4, 10, 8\)"),
        (QUERY, KEY, KEY[:, :, :9], "key .* and value .* same shape"),
        (QUERY[..., :7], KEY, KEY, "head_dim"),
        (QUERY[:, :3], KEY, KEY, "3 heads"),
        (QUERY, KEY[:, :, :9], KEY[:, :, :9], "query has 10 rows"),
        (QUERY[:, :, :0], KEY, KEY, "query has 0 rows"),
        (QUERY, KEY[:, :0], KEY[:, :0], "0 heads of key"),
        (QUERY.expand(2, -1, -1, -1), KEY, KEY, "batch"),
    ],
)
def test_shapes(attention, query, key, value, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attention(query, key, value)


@OPERATIONS
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"q_start": -1}, "q_start=-1"),
        ({"q_start": 1}, "q_start=1"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"softcap": -2.0}, "softcap=-2.0"),
        ({"sink_logits": torch.zeros(2)}, r"sink_logits has shape \(2,\)"),
        ({"cu_seqlens": packed(0, 9)}, r"cu_seqlens=\[0, 9\]"),
        ({"cu_seqlens": packed(1, 10)}, r"cu_seqlens=\[1, 10\]"),
        ({"cu_seqlens": packed(0, 7, 5, 10)}, r"cu_seqlens=\[0, 7, 5, 10\]"),
        ({"cu_seqlens": packed()}, r"cu_seqlens=\[\]"),
        ({"cu_seqlens": packed(0, 10), "q_start": 3}, "q_start=3"),
        ({"backend": "gluon"}, "backend='gluon' cannot run this: .*; use backend='auto' or 'reference'"),
        ({"backend": "cuda"}, "backend='cuda' does not exist; choose one of auto, gluon, triton, reference"),
    ],
    ids=str,
)
def test_values(attention, options, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attention(QUERY, KEY, KEY, **options)


@OPERATIONS
def test_values_are_looked_at_after_equal_ones_of_another_type(attention) -> None:
    documents = packed(0, 10)
    for scale in (1.0, 1):
        attention(QUERY, KEY, KEY, scale=scale, cu_seqlens=documents)
    with pytest.raises(TypeError, match="scale=True"):
        attention(QUERY, KEY, KEY, scale=True, cu_seqlens=documents)
    with pytest.raises(TypeError, match=r"cu_seqlens is torch\.int64"):
        attention(QUERY, KEY, KEY, scale=1.0, cu_seqlens=documents.long())


def test_a_workspace_is_looked_at_after_an_equal_one_of_another_type() -> None:
    attention = partial(block_pattern_attention, QUERY, KEY, KEY, PowerPattern(4, 2, 1))
    attention(workspace=1)
    with pytest.raises(TypeError, match="workspace=True"):
        attention(workspace=True)


@OPERATIONS
def test_types(attention) -> None:
    with pytest.raises(TypeError, match=r"value is torch.float64"):
        attention(QUERY, KEY, KEY.double())
    with pytest.raises(TypeError, match=r"query has dtype torch.int64"):
        attention(QUERY.long(), KEY.long(), KEY.long())
    with pytest.raises(TypeError, match=r"cu_seqlens is torch.int64"):
        attention(QUERY, KEY, KEY, cu_seqlens=packed(0, 10, dtype=torch.int64))


@OPERATIONS
def test_packing_needs_one_row_and_no_cache(attention) -> None:
    with pytest.raises(ValueError, match="batch 2"):
        attention(*(t.expand(2, -1, -1, -1) for t in (QUERY, KEY, KEY)), cu_seqlens=packed(0, 10))
    with pytest.raises(ValueError, match="5 query rows, 10 keys"):
        attention(QUERY[:, :, :5], KEY, KEY, cu_seqlens=packed(0, 5))


def test_the_window_holds_at_least_the_own_token() -> None:
    with pytest.raises(ValueError, match="window=0"):
        causal_attention(QUERY, KEY, KEY, window=0)


@OPERATIONS
def test_backends_agree_and_lse_comes_on_request(attention) -> None:
    out = attention(QUERY, KEY, KEY)
    assert torch.equal(out, attention(QUERY, KEY, KEY, backend="reference"))
    with_lse, lse = attention(QUERY, KEY, KEY, return_lse=True)
    assert with_lse.shape == out.shape
    assert lse.shape == (1, 4, 10)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(("workspace", "error"), [(-1, ValueError), (1e9, TypeError), (True, TypeError)])
def test_a_workspace_is_a_number_of_bytes(workspace, error) -> None:
    with pytest.raises(error, match=f"workspace={workspace}"):
        block_pattern_attention(QUERY, KEY, KEY, PowerPattern(4, 2, 1), workspace=workspace)
