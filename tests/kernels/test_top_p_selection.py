"""Lists of keys equal what sorting in fp64 gives, in plain PyTorch and in the kernels, and keep to their room."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from sparsetrain_kernels import top_k_lists, top_p_lists
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.top_p_selection import PositionLists
from torch import Tensor

INF = float("inf")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, and integers that no index may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "held", "split"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain PyTorch, and the kernels: for rows that a program holds, and where several share a row, whose candidates
    one of them holds if they are few."""
    if request.param == "reference":
        return "reference"
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    request.getfixturevalue("poisoned")
    split_rows(monkeypatch, short=1024 if request.param == "held" else 0)
    return "triton"


def split_rows(monkeypatch: pytest.MonkeyPatch, sample: int = 64, short: int = 0) -> None:
    """Small pieces, so that small tests have several; of rows of no more scores than the sample no guess is made."""
    launch = pytest.importorskip("sparsetrain_kernels.top_p_selection.triton.launch")
    sizes = {"SHORT": short, "SAMPLE": sample, "CHUNK": 128, "SIFT": 128, "GATHER": 256, "TILE": 128}
    for name, value in {**sizes, "FEW": 32, "SOME": 128}.items():
        monkeypatch.setattr(launch, name, value)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_lengths(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def adversarial(columns: int) -> dict[str, Tensor]:
    """Rows on which a search with a tolerance, from the first key or over a sample goes wrong."""
    place = torch.arange(columns)
    peaked, masked = normal(columns, seed=1) * 2, normal(columns, seed=2) * 3
    peaked[columns // 3] = 25.0
    masked[::3] = -INF
    return {
        "flat": torch.zeros(columns),
        "nearly flat": normal(columns, seed=3) * 0.01,
        "uniform": torch.rand(columns, generator=torch.Generator().manual_seed(4)),
        "peaked": peaked,
        "three peaks": torch.where(place % (columns // 3) == 5, 16.0, normal(columns, seed=5)),
        "tied": (normal(columns, seed=6) * 2).round(),
        "first unimportant": torch.where(place == 0, -30.0, normal(columns, seed=7) * 3),
        "masked": masked,
        "one key": torch.where(place == columns - 1, -7.0, -INF),
        "wide": normal(columns, seed=8) * 40,
        "signed zeros": torch.where(place % 2 == 0, 0.0, -0.0),
        "clustered": normal(-(-columns // 32), seed=9).repeat_interleave(32)[:columns] * 3 + normal(columns),
    }


def log_sums(scores: Tensor) -> Tensor:
    return scores.float().logsumexp(-1)


def chosen(row: Tensor, p: float, *, always: Tensor | None = None, min_keys: int = 1) -> Tensor:
    """By sorting, in fp64: the positions of the least set that holds ``p`` with the keys that are kept ``always``."""
    weights = row.double().softmax(-1)
    always = torch.zeros(len(row), dtype=torch.bool) if always is None else always
    found = (row > -INF) & ~always
    if p < 1:
        order = weights.masked_fill(~found, -1).argsort(descending=True)
        held = weights[order].where(found[order], 0.0).cumsum(0) + weights[always].sum()
        needed = int((held < p - 1e-12).sum()) + 1 if weights[always].sum() < p - 1e-12 else 0
        needed = min(max(needed, min_keys), int(found.sum()))
        found = found & (row >= row[order[needed - 1]]) if needed else found & False
    return found.nonzero()[:, 0]


def entries(found: PositionLists, sequence: int = 0, head: int = 0) -> Tensor:
    return found.lists[sequence, head, : found.counts[sequence, head]].long()


def assert_same(got: PositionLists, want: PositionLists) -> None:
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.dropped, want.dropped)
    is_entry = torch.arange(got.lists.shape[2]) < got.counts[..., None]
    assert torch.equal(got.lists[is_entry], want.lists[is_entry])


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999, 1.0, 1e-6])
def test_plain_pytorch_finds_the_smallest_set_of_131072_keys(p: float) -> None:
    rows = adversarial(131072)
    scores = torch.stack([*rows.values()]).half()[None]
    options = {"lengths": to_lengths(131072), "num_kv_heads": len(rows), "capacity": 131072}
    found = top_p_lists(scores, log_sums(scores), p, **options, backend="reference")
    for head, name in enumerate(rows):
        want = chosen(scores[0, head], p)
        # What few keys with little weight decide: the log-sum-exp and the exponential are of single precision.
        weights = scores[0, head].double().softmax(-1)
        assert abs(float(weights[want].sum() - weights[entries(found, head=head)].sum())) < 4e-6, name


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_both_find_the_smallest_set(backend: str, p: float) -> None:
    rows = adversarial(300)
    scores = torch.stack([*rows.values()]).half()[None]
    options = {"lengths": to_lengths(300), "num_kv_heads": len(rows), "capacity": 300}
    found = top_p_lists(scores, log_sums(scores), p, **options, backend=backend)
    for head, name in enumerate(rows):
        assert torch.equal(entries(found, head=head), chosen(scores[0, head], p)), name
    assert not found.dropped.any()


@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
def test_rows_without_a_guess_find_the_same(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    split_rows(monkeypatch, sample=512)
    scores = torch.stack([*adversarial(300).values()]).half()[None]
    options = {"lengths": to_lengths(290), "num_kv_heads": 4, "capacity": 200, "sinks": 3, "recent": 9}
    lse = log_sums(scores[..., :290])
    for p in (0.9, 1.0):
        got = top_p_lists(scores, lse, p, **options, backend="triton")
        assert_same(got, top_p_lists(scores, lse, p, **options, backend="reference"))


@pytest.mark.parametrize("columns", [1, 2, 127, 1000])
def test_rows_of_any_length_and_empty_ones(backend: str, columns: int) -> None:
    scores = (normal(3, 1, columns) * 3).half()
    lengths = to_lengths(columns, columns // 2, 0)
    for row, length in enumerate(lengths.tolist()):
        scores[row, :, length:] = -INF
    lse = log_sums(scores)
    # Scores behind a length are not looked at.
    for row, length in enumerate(lengths.tolist()):
        scores[row, :, length:] = float("nan")
    found = top_p_lists(scores, lse, 0.8, lengths=lengths, num_kv_heads=1, capacity=columns, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        want = chosen(scores[row, 0, :length], 0.8) if length else torch.empty(0)
        assert torch.equal(entries(found, row), want.long())


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_the_list_of_a_group_is_the_union_of_its_heads(backend: str, group: int) -> None:
    scores = (normal(2, 2 * group, 200) * 3).half()
    options = {"lengths": to_lengths(200, 200), "num_kv_heads": 2, "capacity": 200}
    p = torch.linspace(0.5, 0.95, 2 * group)
    found = top_p_lists(scores, log_sums(scores), p, **options, backend=backend)
    for sequence in range(2):
        for head in range(2):
            own = range(head * group, head * group + group)
            want = torch.cat([chosen(scores[sequence, h], float(p[h])) for h in own]).unique()
            assert torch.equal(entries(found, sequence, head), want)


@pytest.mark.parametrize("how", ["max", "mean"])
def test_pooled_weights_of_a_group_have_one_set(backend: str, how: str) -> None:
    scores = (normal(1, 4, 200) * 3).half()
    lse = log_sums(scores)
    options = {"lengths": to_lengths(200), "num_kv_heads": 2, "capacity": 200, "group": how}
    found = top_p_lists(scores, lse, torch.tensor([0.8]), **options, backend=backend)
    weights = (scores.float() - lse[..., None]).exp().view(2, 2, 200)
    pooled = (weights.amax(1) if how == "max" else weights.mean(1)).log().half()
    for head in range(2):
        assert torch.equal(entries(found, head=head), chosen(pooled[head], 0.8))


def test_keys_attended_in_any_case_count_as_kept_and_are_not_listed(backend: str) -> None:
    scores = (normal(3, 2, 200, seed=3) * 3).half()
    scores[0, 0, 199] = 20.0
    lengths, recent = to_lengths(200, 150, 6), to_lengths(30, 1, 4)
    for row, length in enumerate(lengths.tolist()):
        scores[row, :, length:] = -INF
    options = {"lengths": lengths, "num_kv_heads": 2, "capacity": 200, "min_keys": 0, "sinks": 4}
    found = top_p_lists(scores, log_sums(scores), 0.9, **options, recent=recent, backend=backend)
    place = torch.arange(200)
    for row in range(3):
        always = (place < 4) | (place >= lengths[row] - recent[row])
        for head in range(2):
            assert torch.equal(entries(found, row, head), chosen(scores[row, head], 0.9, always=always, min_keys=0))
    # The last key has nearly all of the weight; the third text is not longer than what is attended in any case.
    assert found.counts[0, 0] == 0
    assert found.counts[2].tolist() == [0, 0]
    alike = top_p_lists(scores[:1], log_sums(scores[:1]), 0.9, **{**options, "lengths": lengths[:1]}, recent=30)
    assert torch.equal(alike.counts, found.counts[:1])


def test_a_set_has_min_keys_with_ties(backend: str) -> None:
    scores = torch.stack([normal(300), (normal(300) * 2).round(), torch.where(torch.arange(300) < 9, 1.0, -INF)])
    scores = (scores[None] * 4).half()
    options = {"lengths": to_lengths(300), "num_kv_heads": 3, "capacity": 300, "min_keys": 64}
    found = top_p_lists(scores, log_sums(scores), 0.01, **options, backend=backend)
    for head in range(3):
        assert torch.equal(entries(found, head=head), chosen(scores[0, head], 0.01, min_keys=64))
    assert found.counts.tolist()[0][0] == 64
    assert found.counts.tolist()[0][2] == 9


@pytest.mark.parametrize("group", [1, 2])
def test_where_there_is_no_room_the_heaviest_are_listed_and_the_rest_is_counted(backend: str, group: int) -> None:
    scores = torch.cat([normal(2, 2, 300), normal(2, 2, 300, seed=1).round()], 1).half()
    lse = log_sums(scores)
    options = {"lengths": to_lengths(300, 40), "num_kv_heads": 4 // group, "backend": backend}
    lse[1] = log_sums(scores[1, :, :40])
    everything = top_p_lists(scores, lse, 0.9, **options, capacity=300)
    found = top_p_lists(scores, lse, 0.9, **options, capacity=20)
    assert int(found.counts.max()) == 20
    assert int(found.dropped.min()) > 0
    assert torch.equal(found.counts + found.dropped, everything.counts)
    # Weights of the heads that chose a key, as they are compared.
    weights = (scores.float() - lse[..., None]).half()
    for sequence, length in enumerate((300, 40)):
        for head in range(4 // group):
            rank = torch.full((length,), -INF).half()
            for own in range(head * group, head * group + group):
                mine = chosen(scores[sequence, own, :length], 0.9)
                rank[mine] = torch.maximum(rank[mine], weights[sequence, own, mine])
            members = (rank > -INF).nonzero()[:, 0]
            if len(members) > 20:
                members = (rank > rank.sort(descending=True).values[20]).nonzero()[:, 0]
            assert torch.equal(entries(found, sequence, head), members)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_candidate_pages_are_a_row_with_the_rest_left_out(backend: str) -> None:
    whole, lengths = torch.full((2, 4, 320), -INF).half(), to_lengths(313, 100)
    page_lists = torch.full((2, 2, 9), 2**30, dtype=torch.int32)
    page_counts = torch.tensor([[9, 5], [3, 0]], dtype=torch.int32)
    scores = torch.full((2, 4, 140), float("nan")).half()
    for sequence in range(2):
        for head in range(2):
            count = int(page_counts[sequence, head])
            pages = torch.randperm(7 if sequence else 20, generator=torch.Generator().manual_seed(head))[:count]
            page_lists[sequence, head, :count] = pages.sort().values
            place = (pages.sort().values[:, None] * 16 + torch.arange(16)).flatten()[:140]
            own = (normal(2, len(place), seed=sequence) * 3).half()
            own[:, place >= lengths[sequence]] = -INF
            scores[sequence, 2 * head : 2 * head + 2, : len(place)] = own
            whole[sequence, 2 * head : 2 * head + 2, place] = own
    lse = log_sums(whole)
    options = {"lengths": lengths, "num_kv_heads": 2, "sinks": 20, "recent": 3, "backend": backend}
    pages = {"page_lists": page_lists, "page_counts": page_counts}
    plain = {**options, "backend": "reference"}
    got = top_p_lists(scores, lse, 0.9, capacity=60, **options, **pages)
    assert_same(got, top_p_lists(whole, lse, 0.9, capacity=60, **plain))
    assert_same(top_k_lists(scores, lse, 25, **options, **pages), top_k_lists(whole, lse, 25, **plain))


@pytest.mark.parametrize("width", [1, 7])
def test_the_k_heaviest_keys_pooled_and_the_newest_of_equal_ones(backend: str, width: int) -> None:
    scores = (normal(2, 4, 200) * 2).half()
    lengths = to_lengths(200, 90)
    scores[1, :, 90:] = -INF
    lse = log_sums(scores)
    options = {"lengths": lengths, "num_kv_heads": 2, "sinks": 2, "recent": 5}
    found = top_k_lists(scores, lse, 60, **options, width=width, backend=backend)
    pooled = (scores.float() - lse[..., None]).half().view(2, 2, 2, 200).amax(2).float()
    if width > 1:
        pooled = torch.nn.functional.max_pool1d(pooled, width, 1, width // 2)
    for sequence, length in enumerate(lengths.tolist()):
        for head in range(2):
            place = range(2, length - 5)
            order = sorted(place, key=lambda c: (pooled[sequence, head, c].item(), c), reverse=True)
            assert entries(found, sequence, head).tolist() == sorted(order[:60])
            last = pooled[sequence, head, order[59]]
            tied = sum(1 for c in order[60:] if pooled[sequence, head, c] == last)
            assert int(found.dropped[sequence, head]) == tied
    assert width == 1 or int(found.dropped.max()) > 0


@pytest.mark.parametrize("group", ["union", "max"])
@pytest.mark.parametrize("pages", [False, True], ids=["all keys", "pages"])
def test_sequences_that_are_not_due_keep_their_lists(backend: str, pages: bool, group: str) -> None:
    scores = (normal(3, 4, 320, seed=11) * 3).half()
    given = {"lengths": to_lengths(320, 300, 310), "num_kv_heads": 2, "capacity": 64, "sinks": 2, "recent": 5}
    if pages:
        given |= {"page_lists": torch.arange(20, dtype=torch.int32).expand(3, 2, 20).contiguous()}
        given |= {"page_counts": torch.full((3, 2), 20, dtype=torch.int32)}
    find = partial(top_p_lists, lse=log_sums(scores), p=0.8, group=group, **given, backend=backend)
    want, due = find(scores), torch.tensor([True, False, True])
    # What is read of the others would show.
    scores[1] = float("nan")
    into = PositionLists(*(torch.full_like(each, -7) for each in want))
    assert find(scores, due=due, into=into) is into
    assert_same(PositionLists(*(each[due] for each in into)), PositionLists(*(each[due] for each in want)))
    assert all((each[1] == -7).all() for each in into)
    assert torch.equal(find(scores, due=due).counts[due], want.counts[due])
    held = [each.clone() for each in into]
    nobody, room = torch.zeros(3, dtype=torch.bool), given.pop("capacity")
    find(scores, due=nobody, into=into)
    top_k_lists(scores, log_sums(scores), room, due=nobody, into=into, **given, backend=backend)
    assert all(map(torch.equal, into, held))
    with pytest.raises(ValueError, match=r"into\.counts has shape"):
        find(scores, into=into._replace(counts=into.counts[:2]))


@pytest.mark.parametrize("width", [1, 3])
def test_scores_without_a_log_sum_exp_are_compared_as_they_are(backend: str, width: int) -> None:
    scores = (normal(2, 4, 200) * 2).half()
    options = {"lengths": to_lengths(200, 120), "num_kv_heads": 2, "width": width, "backend": backend}
    found = top_k_lists(scores, None, 40, **options)
    assert_same(found, top_k_lists(scores, torch.zeros(2, 4), 40, **options))
    with pytest.raises(TypeError, match="lse is a NoneType, expected a tensor"):
        top_p_lists(scores, None, 0.9, lengths=options["lengths"], num_kv_heads=2, capacity=200)


def test_a_log_sum_exp_that_is_none_of_the_row_breaks_nothing(backend: str) -> None:
    # Every key then has all of the weight, or none.
    scores = (normal(1, 2, 200) * 2).half()
    options = {"lengths": to_lengths(200), "num_kv_heads": 2, "capacity": 200, "backend": backend}
    largest = scores[0].argmax(-1)
    for head, own in enumerate(top_p_lists(scores, torch.full((1, 2), -50.0), 0.9, **options).lists[0]):
        assert own[0] == largest[head]
    assert top_p_lists(scores, torch.full((1, 2), 200.0), 0.9, **options).counts.tolist() == [[200, 200]]


def test_k_of_fewer_keys_are_all(backend: str) -> None:
    scores = normal(1, 2, 50).half()
    found = top_k_lists(scores, log_sums(scores), 80, lengths=to_lengths(50), num_kv_heads=2, backend=backend)
    assert found.counts.tolist() == [[50, 50]]
    assert torch.equal(entries(found, head=1), torch.arange(50))


def test_larger_shares_contain_smaller_ones_and_calls_repeat(backend: str) -> None:
    rows = adversarial(200)
    scores = torch.stack([rows[name] for name in ("nearly flat", "tied", "masked", "wide")]).half()[None]
    options = {"lengths": to_lengths(200), "num_kv_heads": scores.shape[1], "capacity": 200, "backend": backend}
    call = partial(top_p_lists, scores, log_sums(scores), **options)
    small, large = call(0.4), call(0.8)
    for head in range(scores.shape[1]):
        assert bool(torch.isin(entries(small, head=head), entries(large, head=head)).all())
    assert_same(call(0.4), small)


def test_how_tensors_lie_in_memory_does_not_matter(backend: str) -> None:
    scores = (normal(2, 4, 200) * 3).half()
    options = {"lengths": to_lengths(200, 130), "num_kv_heads": 2, "capacity": 50, "backend": backend}
    want = top_p_lists(scores, log_sums(scores), 0.9, **options)
    apart = scores.movedim(-1, 0).contiguous().movedim(0, -1)
    lengths = torch.stack([options["lengths"], to_lengths(7, 7)], 1)[:, 0]
    assert_same(top_p_lists(apart, log_sums(scores).T.contiguous().T, 0.9, **{**options, "lengths": lengths}), want)


@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("deviations", [-30.0, 0.0, 1e6])
def test_a_wrong_guess_costs_time_alone(monkeypatch: pytest.MonkeyPatch, deviations: float) -> None:
    split_rows(monkeypatch)
    from sparsetrain_kernels.top_p_selection.triton import launch

    monkeypatch.setattr(launch, "DEVIATIONS", deviations)
    rows = adversarial(300)
    scores = torch.stack([*rows.values()]).half()[None]
    options = {"lengths": to_lengths(300), "num_kv_heads": len(rows), "capacity": 300}
    found = top_p_lists(scores, log_sums(scores), 0.8, **options, backend="triton")
    for head, name in enumerate(rows):
        assert torch.equal(entries(found, head=head), chosen(scores[0, head], 0.8)), name


@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("p", "min_keys"), [(0.9, 1), (0.5, 64), (0.0, 1000)])
def test_few_keys_lie_between_the_guess_and_the_threshold(p: float, min_keys: int) -> None:
    from sparsetrain_kernels.top_p_selection import reference
    from sparsetrain_kernels.top_p_selection.triton import configs, thresholds

    columns = 65536
    rows = adversarial(columns)
    scores = torch.stack([*rows.values()]).half()[None]
    lse, heads = log_sums(scores), len(rows)
    floor, taken = torch.full((2, heads), -7, dtype=torch.int32)
    thresholds.guess_kernel[(heads,)](
        *(scores, lse, to_lengths(columns), None, None, None, None, None, floor, taken),
        *(*scores.stride()[:2], 0, 0, columns, 0, 0, min_keys, p, configs.DEVIATIONS),
        KV_HEADS=heads,
        HEADS=heads,
        P_HEADS=False,
        RECENTS=False,
        PAGES=False,
        DUE=False,
        APART=1,
        SAMPLE=configs.SAMPLE,
        PIECE=configs.PIECE,
        GUESSES=configs.GUESSES,
        TURNS=configs.TURNS,
    )
    is_key = scores > -INF
    least = torch.full((1, heads), int(p * 2**40))
    found = reference.thresholds(scores, reference.masses(scores, lse), is_key, least, min_keys)[0]
    keys, found = reference.ordered(scores[0]), reference.ordered(found)
    between = (is_key[0] & (keys >= floor[:, None]) & (keys < found[:, None])).sum(1)
    for head, name in enumerate(rows):
        # No sample finds one key among many.
        if name == "one key":
            continue
        assert floor[head] <= found[head], name
        # Where half of the keys have one of two scores, no sample can tell less than half of them apart.
        assert name == "tied" or between[head] <= columns // 4, name
    assert not taken.any()


@pytest.mark.parametrize(("capacity", "sorts"), [(64, 1), (8, 2)])
def test_a_cpu_sorts_again_only_where_there_is_no_room_for_all(capacity, sorts):
    scores = normal(1, 4, 64).half()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = top_p_lists(
            scores, scores.float().logsumexp(2), 0.9, lengths=to_lengths(64), num_kv_heads=2, capacity=capacity
        )
    assert sum(event.name == "aten::sort" for event in profile.events()) == sorts
    assert bool(found.dropped.any()) == (sorts == 2)
