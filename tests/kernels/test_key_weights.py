"""The weights that choices go by are those of softmax, rounded once, of plain PyTorch and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from paged_keys import PagedKeys, paged_keys
from sparsetrain_kernels import key_weights, top_k_keys, top_k_lists
from sparsetrain_kernels.backend import INTERPRETING

LENGTHS = (170, 41, 0)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    return request.param


def filled(heads: int = 4, **options) -> tuple[torch.Tensor, PagedKeys]:
    keys = paged_keys(**{"lengths": LENGTHS, "dead": ((0, 1),), **options})
    keys.append(slice(0, keys.key.shape[2]), keys.lengths, "reference")
    query = torch.randn(len(keys.lengths), heads, 1, keys.key.shape[3], generator=torch.Generator().manual_seed(1))
    return query.to(keys.key.dtype), keys


def exact(query, keys, scale, softcap):
    """fp64 ``[B, Hq, N]``."""
    ordered = keys.keys().repeat_interleave(query.shape[1] // keys.key.shape[1], 1)
    logits = scale * (query.double() @ ordered.mT)[:, :, 0]
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return logits.masked_fill(~keys.kept()[:, None], float("-inf"))


@pytest.mark.parametrize(
    ("options", "scale", "softcap"),
    [({}, None, None), ({"head_dim": 48, "page": 16}, 0.2, 5.0), ({"dtype": torch.float16}, None, None)],
    ids=["fp32", "soft caps, odd sizes", "fp16"],
)
@pytest.mark.parametrize("heads", [2, 6, 36])
def test_weights_are_those_of_softmax(backend, options, scale, softcap, heads):
    query, keys = filled(heads, **options)
    logits = exact(query, keys, keys.key.shape[3] ** -0.5 if scale is None else scale, softcap)
    lse = logits.logsumexp(-1).float().nan_to_num(0, 0, 0)
    given = {"scale": scale, "softcap": softcap, "backend": backend, **keys.places()}
    found = key_weights(query, keys.key_cache, lse, **given)
    assert found.shape == (3, heads, keys.table.shape[1] * keys.key_cache.shape[2])
    assert found.dtype == torch.float16
    for row, length in enumerate(LENGTHS):
        want = logits[row, :, :length] - lse[row, :, None]
        torch.testing.assert_close(found[row, :, :length].double(), want, rtol=2**-10, atol=1e-5)


def test_rows_that_are_not_due_are_neither_read_nor_written(backend):
    query, keys = filled()
    due = torch.tensor([False, True, False])
    lse = torch.zeros(3, 4)
    whole = key_weights(query, keys.key_cache, lse, backend=backend, **keys.places())
    query[0] = float("nan")
    found = key_weights(query, keys.key_cache, lse, due=due, backend=backend, **keys.places())
    assert torch.equal(found[1, :, :41], whole[1, :, :41])
    short = key_weights(query, keys.key_cache, lse, due=due, max_length=50, backend=backend, **keys.places())
    assert torch.equal(short[1, :, :41], whole[1, :, :41])
    assert short.shape[2] == 50


def test_steps_choose_what_rows_of_training_do(backend):
    query, keys = filled(dead=(), lengths=(170, 41))
    lists = []
    for row, length in enumerate((170, 41)):
        logits = exact(query, keys, 0.125, None)[row, :, :length]
        lse = logits.logsumexp(-1).float()
        weights = key_weights(query, keys.key_cache, lse.expand(2, -1).contiguous(), backend=backend, **keys.places())
        options = {"sinks": 2, "lengths": keys.lengths, "num_kv_heads": 2}
        step = top_k_lists(weights, torch.zeros(2, 4), 9, recent=3, backend=backend, **options)
        key = keys.key[row : row + 1, :, -length:]
        place = torch.tensor([length - 1], dtype=torch.int32)
        given = {"query_positions": place, "sinks": 2, "window": 3, "backend": backend}
        train = top_k_keys(query[row : row + 1], key, lse[None, :, None], 9, **given)
        lists.append((step.lists[row], train.lists[0, :, 0]))
    assert all(torch.equal(*pair) for pair in lists)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lse": torch.zeros(3, 3)}, ValueError, "lse"),
        ({"key_cache": torch.zeros(4, 2, 32, 64, dtype=torch.float16)}, TypeError, "key_cache is torch.float16"),
        ({"max_length": 10**6}, ValueError, "max_length=1000000"),
        ({"due": torch.ones(2, dtype=torch.bool)}, ValueError, "due"),
        ({"query": torch.zeros(3, 5, 1, 64)}, ValueError, "does not fit the 2 KV heads of 64 channels"),
    ],
    ids=["lse", "dtype", "length", "due", "heads"],
)
def test_arguments_that_do_not_fit_are_refused(change, error, message):
    query, keys = filled()
    given = {"query": query, "key_cache": keys.key_cache, "lse": torch.zeros(3, 4), **keys.places(), **change}
    with pytest.raises(error, match=message):
        key_weights(given.pop("query"), given.pop("key_cache"), given.pop("lse"), **given)
