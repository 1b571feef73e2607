"""Scores from 4-bit codes are the exact products with what the codes stand for, page scores bound the logits.

Both implementations: plain PyTorch, and the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from paged_keys import PagedKeys, by_position, paged_keys
from sparsetrain_kernels import center_logits, estimate_scores, page_scores, top_p_lists
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.key_mirror.reference import unpack
from torch import Tensor

LENGTHS = (170, 41, 0)
INFINITY = float("inf")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend; what the kernels do not write stays NaN."""
    if request.param == "triton":
        if not INTERPRETING:
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        from sparsetrain_kernels.key_estimate.triton import launch

        class Poisoned:
            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

            def empty(self, *args: Any, **kwargs: Any) -> Tensor:
                return torch.full(*args, float("nan"), **kwargs)

        monkeypatch.setattr(launch, "torch", Poisoned())
    return request.param


def filled(heads: int = 4, **options) -> tuple[Tensor, PagedKeys]:
    """A query and the keys it meets: one page of the first sequence is not kept, and nothing of it is a number."""
    keys = paged_keys(**{"lengths": LENGTHS, "dead": ((0, 1),), **options})
    keys.append(slice(0, keys.key.shape[2]), keys.lengths, "reference")
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(len(keys.lengths), 1, heads, keys.key.shape[3], generator=generator).transpose(1, 2)
    return query.to(keys.key.dtype), keys


def grouped(keys: PagedKeys, tokens: Tensor, heads: int) -> Tensor:
    return tokens.repeat_interleave(heads // keys.key.shape[1], 1)


def stand_in(keys: PagedKeys) -> Tensor:
    """fp64 ``[B, Hkv, N, D]``: the keys that the codes stand for, from the center and in units of the spread."""
    step, low = by_position(keys.mirror.scale_low, keys).double().split(1, -1)
    return unpack(by_position(keys.mirror.codes, keys)).double() * step + low


def exact(query: Tensor, keys: PagedKeys, *, scale: float | None = None, softcap: float | None = None) -> Tensor:
    """fp64 ``[B, Hq, N]``: products with the keys that the codes stand for, -inf where there is none."""
    scale = keys.key.shape[3] ** -0.5 if scale is None else scale
    spread, center = (grouped(keys, m[:, :, None].double(), query.shape[1]) for m in keys.mirror[:1:-1])
    scaled = grouped(keys, stand_in(keys), query.shape[1])
    logits = scale * ((query.double() * spread) @ scaled.mT)[:, :, 0]
    if softcap is not None:
        logits = logits + scale * (query.double() * center).sum(3)
        logits = softcap * torch.tanh(logits / softcap)
    return torch.where(keys.kept()[:, None], logits, -INFINITY)


def rounding(query: Tensor, keys: PagedKeys, want: Tensor) -> Tensor:
    """What rounding the score to fp16 and the query to 15 bits may change."""
    spread = grouped(keys, keys.mirror.spread[:, :, None].double(), query.shape[1])
    largest = (query.double() * spread).abs().amax((2, 3), keepdim=True)
    size = grouped(keys, stand_in(keys).abs().sum(3), query.shape[1]).nan_to_num(0)
    to_query = (largest / (2 * 127 * 128))[..., 0] * size * keys.key.shape[3] ** -0.5
    return want.abs() * 2.0**-11 + 2.0**-24 + 1.01 * to_query + 1e-6


def assert_exact(scores: Tensor, query: Tensor, keys: PagedKeys, **options) -> None:
    want = exact(query, keys, **options)
    tokens = want.shape[2]
    assert scores.dtype == torch.float16
    assert (scores[:, :, tokens:] == -INFINITY).all()
    scores = scores[:, :, :tokens].double()
    assert torch.equal(scores == -INFINITY, want == -INFINITY)
    real = want > -INFINITY
    allowed = rounding(query, keys, torch.where(real, want, 0.0)) * max(options.get("scale") or 1.0, 1.0)
    assert ((scores - want).abs() - allowed)[real].max() <= 0


@pytest.mark.parametrize("group", [1, 2, 4, 8, 9, 24])
def test_scores_are_exact_for_every_group_of_heads(backend, group: int) -> None:
    query, keys = filled(2 * group, lengths=(70, 41), dead=((0, 1),))
    scores, lse = estimate_scores(query, keys.mirror, **keys.places(), backend=backend)
    assert_exact(scores, query, keys)
    torch.testing.assert_close(lse, scores.float().logsumexp(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim", [6, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_are_exact_for_every_head_dim(backend, head_dim: int, dtype) -> None:
    query, keys = filled(4, head_dim=head_dim, dtype=dtype, lengths=(70, 41), dead=((0, 1),))
    scores, _ = estimate_scores(query, keys.mirror, **keys.places(), backend=backend)
    assert_exact(scores, query, keys)


@pytest.mark.parametrize("page", [16, 48, 64, 256])
def test_scores_are_exact_for_every_page_and_length(backend, page: int) -> None:
    query, keys = filled(page=page, lengths=(330, 257, 1, 0), dead=((0, 0),))
    scores, lse = estimate_scores(query, keys.mirror, **keys.places(), backend=backend)
    assert_exact(scores, query, keys)
    torch.testing.assert_close(lse, scores.float().logsumexp(2), rtol=1e-6, atol=1e-6)
    assert (lse[3] == -INFINITY).all()


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"softcap": 5.0}, {"scale": 0.3, "softcap": 20.0}], ids=str)
def test_scores_are_exact_with_scale_and_soft_cap(backend, options) -> None:
    query, keys = filled(lengths=(70, 41), dead=((0, 1),))
    scores, _ = estimate_scores(query, keys.mirror, **keys.places(), **options, backend=backend)
    assert_exact(scores, query, keys, **options)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_with_the_centers_logit_the_log_sum_exp_is_that_of_attention(backend, softcap) -> None:
    query, keys = filled(lengths=(170, 41), dead=())
    scores, lse = estimate_scores(query, keys.mirror, **keys.places(), softcap=softcap, backend=backend)
    logits = (query.double() @ grouped(keys, keys.keys(), 4).mT)[:, :, 0] * 64**-0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = torch.where(keys.kept()[:, None], logits, -INFINITY)
    center = center_logits(query, keys.mirror, softcap=softcap)
    # Half a step of every channel at most, times the query.
    spread = grouped(keys, keys.mirror.spread[:, :, None].double(), 4)
    step = grouped(keys, by_position(keys.mirror.scale_low, keys)[..., 0].double(), 4)
    bound = (query.double() * spread).abs().sum(3) * (step / 2) * 64**-0.5 * 1.02 + 2.0**-10 * logits.abs()
    kept = keys.kept()[:, None]
    error = torch.where(kept, (scores[:, :, :170].double() + center[:, :, None] - logits).abs(), 0.0)
    assert (error <= torch.where(kept, bound, 0.0)).all()
    # No log-sum-exp is off by more than the worst score of its row.
    assert ((lse + center - logits.logsumexp(2)).abs() <= error.amax(2) + 1e-5).all()


def test_a_large_mean_costs_no_precision(backend) -> None:
    query, keys = filled(lengths=(70, 41), dead=())
    shifted = keys._replace(mirror=keys.mirror._replace(center=keys.mirror.center + 1000))
    scores, lse = estimate_scores(query, keys.mirror, **keys.places(), backend=backend)
    same, same_lse = estimate_scores(query, shifted.mirror, **keys.places(), backend=backend)
    assert torch.equal(scores, same)
    assert torch.equal(lse, same_lse)
    moved = center_logits(query, shifted.mirror) - center_logits(query, keys.mirror)
    torch.testing.assert_close(moved, query.sum(3)[:, :, 0] * 1000 * 64**-0.5, rtol=1e-4, atol=1e-2)


def lists_of(*rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded with an entry that must not be read."""
    longest = max(len(entries) for heads in rows for entries in heads)
    padded = [[[*entries, *[2**26] * (longest - len(entries))] for entries in heads] for heads in rows]
    counts = [[len(entries) for entries in heads] for heads in rows]
    return torch.tensor(padded, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)


@pytest.mark.parametrize("page", [16, 48])
def test_listed_groups_have_the_scores_of_all_keys(backend, page: int) -> None:
    query, keys = filled(page=page)
    run = partial(estimate_scores, query, keys.mirror, **keys.places(), softcap=20.0, backend=backend)
    every, _ = run()
    # Out of order, the group that ends with the sequence, one behind its end, one not kept, and an entry that is none.
    lists, counts = lists_of([[10, 0, 4, 11, 1], [2]], [[1, -1, 2], []], [[0, 3], [5]])
    scores, lse = run(page_lists=lists, page_counts=counts)
    assert scores.shape == (3, 4, 80)
    want = torch.full_like(scores, -INFINITY)
    padded = torch.nn.functional.pad(every, (0, 64), value=-INFINITY)
    for b in range(3):
        for h in range(4):
            for i in range(int(counts[b, h // 2])):
                start = 16 * int(lists[b, h // 2, i])
                if start >= 0:
                    want[b, h, 16 * i : 16 * i + 16] = padded[b, h, start : start + 16]
    assert torch.equal(scores, want)
    torch.testing.assert_close(lse, want.float().logsumexp(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page", [16, 48])
def test_listed_positions_have_the_scores_of_all_keys(backend, page: int) -> None:
    query, keys = filled(page=page)
    run = partial(estimate_scores, query, keys.mirror, **keys.places(), backend=backend)
    every, _ = run()
    # Out of order, the last of a sequence, one behind its end, one not kept, and entries that are none.
    lists, counts = lists_of([[169, 0, -1, 33, 170, 20], [2]], [[1, 40, -1], []], [[0, 3], [5]])
    scores, lse = run(page_lists=lists, page_counts=counts, granule=1)
    assert scores.shape == (3, 4, 6)
    entry = lists.repeat_interleave(2, 1).long()
    counted = torch.arange(6) < counts.repeat_interleave(2, 1)[..., None]
    real = counted & (entry >= 0) & (entry < keys.lengths[:, None, None])
    want = torch.where(real, every.gather(2, torch.where(real, entry, 0)), -INFINITY)
    assert torch.equal(scores, want)
    torch.testing.assert_close(lse, want.float().logsumexp(2), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="granule=8 must be 16, or 1"):
        run(page_lists=lists, page_counts=counts, granule=8)


@pytest.mark.parametrize("splits", [1, 2, 7, 13])
def test_the_number_of_splits_changes_nothing(monkeypatch, splits: int) -> None:
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    from sparsetrain_kernels.key_estimate.triton import configs, launch

    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: splits)
    monkeypatch.setattr(launch, "choose_config", lambda *arguments: configs.Config(32, 1, 4, 1))
    query, keys = filled()
    scores, lse = estimate_scores(query, keys.mirror, **keys.places(), max_length=192, backend="triton")
    want = estimate_scores(query, keys.mirror, **keys.places(), max_length=192, backend="reference")
    torch.testing.assert_close(scores, want[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, want[1], rtol=1e-3, atol=1e-3)
    again = estimate_scores(query, keys.mirror, **keys.places(), max_length=192, backend="triton")
    assert torch.equal(scores, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
def test_a_length_above_the_largest_is_an_error_of_its_sequence(backend) -> None:
    query, keys = filled()
    run = partial(estimate_scores, query, keys.mirror, **keys.places(), max_length=160, backend=backend)
    if backend == "reference":
        with pytest.raises(ValueError, match=r"lengths=\[170, 41, 0\] must be 0 to max_length=160"):
            run()
    else:
        scores, lse = run()
        assert lse[0].isnan().all()
        assert torch.equal(lse[1:], run(max_length=192)[1][1:])
        assert scores.shape == (3, 4, 160)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_no_number_shows(backend, where: str) -> None:
    query, keys = filled(lengths=(70, 41), dead=())
    if where == "query":
        query[0, 1, 0, 3] = float("nan")
    else:
        keys.mirror.scale_low[int(keys.table[0, 0]), 0, 5, 0] = float("nan")
    _, lse = estimate_scores(query, keys.mirror, **keys.places(), backend=backend)
    assert lse.isnan().nonzero().tolist() == ([[0, 1]] if where == "query" else [[0, 0], [0, 1]])


@pytest.mark.filterwarnings("ignore:overflow")
def test_scores_beyond_fp16_stay_at_its_bounds(backend) -> None:
    query, keys = filled(lengths=(70, 41), dead=())
    scores, lse = estimate_scores(query * 1e6, keys.mirror, **keys.places(), backend=backend)
    assert scores[0, :, :70].abs().max() == 65504
    assert lse.isfinite().all()


@pytest.mark.parametrize("bytes_", [False, True])
@pytest.mark.parametrize(("page", "group", "head_dim"), [(32, 2, 64), (16, 9, 80), (256, 1, 128)])
def test_page_scores_bound_every_logit_of_the_group(backend, bytes_: bool, page, group, head_dim) -> None:
    query, keys = filled(2 * group, page=page, head_dim=head_dim, bytes_=bytes_, dead=((0, 0),))
    scores = page_scores(query, keys.bounds, **keys.places(), backend=backend)
    logits = (query.double() @ grouped(keys, keys.keys(), 2 * group).mT)[:, :, 0] * head_dim**-0.5
    logits = torch.where(keys.kept()[:, None], logits, -INFINITY)
    logits = torch.nn.functional.pad(logits, (0, scores.shape[2] * 16 - logits.shape[2]), value=-INFINITY)
    largest = logits.unflatten(2, (-1, 16)).amax(3).unflatten(1, (2, group)).amax(2)
    assert torch.equal(scores == -INFINITY, largest == -INFINITY)
    real = largest > -INFINITY
    assert (scores - largest)[real].min() >= -1e-5

    # Quest's formula, from the bounds as they are kept.
    low, high = keys.bounds.values.double()[keys.table.long().clamp(min=0)].transpose(1, 2).flatten(2, 3).unbind(3)
    if bytes_:
        center, spread = (moment[:, :, None].double() for moment in keys.mirror[2:])
        low, high = center + spread * low, center + spread * high
    low, high = (grouped(keys, bound, 2 * group) for bound in (low, high))
    want = torch.maximum(query.double() * low, query.double() * high).sum(3) * head_dim**-0.5
    want = want.unflatten(1, (2, group)).amax(2)
    assert ((scores - want).abs() <= 1e-5 * (1 + want.abs()))[real].all()
    rounded = page_scores(query, keys.bounds, **keys.places(), dtype=torch.float16, backend=backend)
    assert torch.equal(rounded, scores.half())


@pytest.mark.parametrize("lengths", [(170, 41, 60), (1100, 1000, 900)], ids=["one split", "splits"])
def test_sequences_that_are_not_due_are_left_out(backend, lengths) -> None:
    query, keys = filled(lengths=lengths, dead=())
    due = torch.tensor([True, False, True])
    want, want_lse = estimate_scores(query, keys.mirror, **keys.places(), backend=backend)
    bounds = page_scores(query, keys.bounds, **keys.places(), backend=backend)
    # What is read of the others would show.
    keys.table[1] = 10**6
    places = keys.places()
    scores, lse = estimate_scores(query, keys.mirror, **places, due=due, backend=backend)
    assert torch.equal(scores[due], want[due])
    assert torch.equal(lse[due], want_lse[due])
    assert torch.equal(page_scores(query, keys.bounds, **places, due=due, backend=backend)[due], bounds[due])
    nobody = torch.zeros(1, dtype=torch.bool).expand(3)
    assert estimate_scores(query, keys.mirror, **places, due=nobody, backend=backend)[0].shape == want.shape


def test_what_top_p_keeps_of_the_estimate_holds_its_share_of_attention() -> None:
    p = 0.9
    query, keys = filled(lengths=(400, 304), dead=())
    upper = page_scores(query, keys.bounds, **keys.places())
    lists = upper.topk(8).indices.sort().values.to(torch.int32)
    counts = torch.full((2, 2), 8, dtype=torch.int32)
    scores, lse = estimate_scores(query, keys.mirror, **keys.places(), page_lists=lists, page_counts=counts)
    found = top_p_lists(
        scores,
        lse,
        p,
        lengths=keys.lengths,
        num_kv_heads=2,
        capacity=128,
        page_lists=lists,
        page_counts=counts,
    )
    logits = (query.double() @ grouped(keys, keys.keys(), 4).mT)[:, :, 0] * 64**-0.5
    center = center_logits(query, keys.mirror)
    for b in range(2):
        for head in range(4):
            entries = lists[b, head // 2].long()
            candidates = (entries[:, None] * 16 + torch.arange(16)).flatten()
            kept = found.lists[b, head // 2, : found.counts[b, head // 2]].long()
            true = logits[b, head, candidates].softmax(0)
            error = (scores[b, head].double() + center[b, head] - logits[b, head, candidates]).abs().max()
            # Twilight's share, after the errors of the scores.
            share = 1 - (2 * error).exp() * (1 - p)
            assert true[torch.isin(candidates, kept)].sum() >= share > 0.5
            assert len(kept) < 128


def test_the_operations_are_well_made() -> None:
    query, keys = filled()
    lists, counts = lists_of([[1, 0], [2]], [[1, 2], []], [[0], [0]])
    estimate, pages = torch.ops.sparsetrain.estimate_scores.default, torch.ops.sparsetrain.page_scores.default
    for listed in ((None, None, 16), (lists, counts, 16), (lists, counts, 1)):
        args = (query, *keys.mirror, *keys.places().values(), 170, 0.1, None, *listed, None, "reference")
        torch.library.opcheck(estimate, args, test_utils=("test_schema", "test_faketensor"))
    args = (query, *keys.bounds, *keys.places().values(), 12, 0.1, None, torch.float16, "reference")
    torch.library.opcheck(pages, args, test_utils=("test_schema", "test_faketensor"))


def test_splits_fill_the_card_and_no_more() -> None:
    configs = pytest.importorskip("sparsetrain_kernels.key_estimate.triton.configs")
    assert configs.choose_splits(64, 1024, 528) == 8
    assert configs.choose_splits(8, 1024, 528) == 66
    assert configs.choose_splits(1000, 1024, 528) == 1
    assert configs.choose_splits(8, 3, 528) == 3


QUERY, KEYS = filled(lengths=(20, 5), dead=())
LISTS, COUNTS = lists_of([[0], [1]], [[0], [0]])
ARGUMENTS = {"query": QUERY, "mirror": KEYS.mirror, **KEYS.places()}


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"query": QUERY[0]}, ValueError, "query has shape .* expected .batch, heads, 1, head_dim."),
        ({"query": QUERY.expand(-1, -1, 2, -1)}, ValueError, "query has shape"),
        ({"query": QUERY.long()}, TypeError, "query has dtype torch.int64"),
        ({"query": QUERY[:, :3]}, ValueError, "query .* does not fit the 2 KV heads of 64 channels that codes hold"),
        ({"query": QUERY[..., :32]}, ValueError, "does not fit the 2 KV heads of 64"),
        ({"query": QUERY.clone().requires_grad_()}, ValueError, "query requires a gradient.*torch.no_grad"),
        ({"mirror": tuple(KEYS.mirror)}, TypeError, "mirror is a tuple, expected a KeyMirror"),
        ({"lengths": KEYS.lengths[:1]}, ValueError, "lengths has shape"),
        ({"block_table": KEYS.table.long()}, TypeError, "block_table is torch.int64"),
        ({"max_length": 33}, ValueError, "max_length=33 must be 1 to the 32 tokens"),
        ({"max_length": 0}, ValueError, "max_length=0 must be at least 1"),
        ({"scale": 0.0}, ValueError, "scale=0.0 must be positive"),
        ({"softcap": -2.0}, ValueError, "softcap=-2.0 must be positive"),
        ({"page_lists": LISTS}, ValueError, "page_lists and page_counts come together"),
        ({"page_lists": LISTS[0], "page_counts": COUNTS}, ValueError, "page_lists has shape"),
        ({"page_lists": LISTS, "page_counts": COUNTS.long()}, TypeError, "page_counts is torch.int64"),
        ({"due": torch.ones(2)}, TypeError, "due is torch.float32.*expected torch.bool"),
        ({"due": torch.ones(3, dtype=torch.bool)}, ValueError, "due has shape"),
        ({"backend": "gluon"}, ValueError, "backend='gluon' cannot run this: estimates have plain Triton kernels only"),
        ({"query": QUERY.double(), "backend": "triton"}, ValueError, "fp32, fp16 and bf16, not torch.float64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changed, error, named: str) -> None:
    with pytest.raises(error, match=named):
        estimate_scores(**{**ARGUMENTS, **changed})


def test_page_scores_refuse_what_is_not_of_the_keys() -> None:
    with pytest.raises(TypeError, match="bounds is a Tensor, expected PageBounds"):
        page_scores(QUERY, KEYS.bounds.values, **KEYS.places())
    with pytest.raises(TypeError, match=r"bounds is torch\.float32, expected torch\.float16"):
        page_scores(QUERY.half(), KEYS.bounds, **KEYS.places())
    with pytest.raises(ValueError, match=r"dtype=torch\.bfloat16 must be torch\.float32 or torch\.float16"):
        page_scores(QUERY, KEYS.bounds, **KEYS.places(), dtype=torch.bfloat16)
