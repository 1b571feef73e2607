"""Decoding over lists equals dense attention under the mask of the same keys, and reads nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from sparsetrain_kernels import listed_decode, top_p_lists
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.masked import masked_attention
from torch import Tensor

LENGTHS = (150, 1, 97, 64)
TOKENS = 160


@pytest.fixture(params=["reference", "triton"])
def decode(request: pytest.FixtureRequest):
    """Decoding by each backend, with the log-sum-exp; what the kernels do not write stays NaN."""
    if request.param == "triton":
        if not INTERPRETING:
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        torch.use_deterministic_algorithms(True)
    yield partial(listed_decode, return_lse=True, backend=request.param)
    torch.use_deterministic_algorithms(False)


def to_integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


class Case:
    """A paged cache, lists over it, and what dense attention makes of the same keys."""

    def __init__(
        self,
        *,
        group: int = 2,
        rows: int = 1,
        head_dim: int = 16,
        page: int = 16,
        dtype: torch.dtype = torch.float32,
        lengths: tuple[int, ...] = LENGTHS,
        sinks: int = 4,
        recent: int | Tensor = 10,
        kept: float = 0.2,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        batch = len(lengths)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.query = random(batch, 2 * group, rows, head_dim)
        self.key, self.value = random(batch, 2, TOKENS, head_dim), random(batch, 2, TOKENS, head_dim)
        table = torch.randperm(batch * TOKENS // page, generator=generator).view(batch, -1).to(torch.int32)
        recents = recent.tolist() if isinstance(recent, Tensor) else [recent] * batch
        place = torch.arange(TOKENS)
        self.visible = torch.zeros(batch, 2, TOKENS, dtype=torch.bool)
        chosen = []
        for row, length in enumerate(lengths):
            always = (place < sinks) | (place >= length - recents[row])
            for head in range(2):
                # A head has a list of its own length, and one may have none.
                share = kept * (head + row % 2)
                listed = (torch.rand(TOKENS, generator=generator) < share) & ~always & (place < length)
                chosen.append(listed.nonzero()[:, 0])
                self.visible[row, head] = (listed | always) & (place < length)
        self.counts = to_integers(*map(len, chosen)).view(batch, 2)
        self.lists = torch.full((batch * 2, int(self.counts.max()) + 3), 2**30, dtype=torch.int32)
        for row, positions in enumerate(chosen):
            self.lists[row, : len(positions)] = positions
        self.lists = self.lists.view(batch, 2, -1)
        self.lengths, self.options = lengths, options
        self.pages = [self.paged(cache, table, page) for cache in (self.key, self.value)]
        self.named = {"lengths": to_integers(*lengths), "block_table": table, "sinks": sinks, "recent": recent}

    def paged(self, cache: Tensor, table: Tensor, page: int) -> Tensor:
        """The cache cut into pages; what no list of the case names is NaN, as are other pages."""
        cache = cache.masked_fill(~self.visible[..., None], float("nan"))
        pages = torch.full((int(table.max()) + 3, 2, page, cache.shape[3]), float("nan"), dtype=cache.dtype)
        pages[table.flatten().long()] = cache.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
        return pages

    def run(self, decode, **changed: Any) -> tuple[Tensor, Tensor]:
        named = {**self.named, **self.options, **changed}
        return decode(self.query, *self.pages, self.lists, self.counts, **named)

    def expected(self) -> tuple[Tensor, Tensor]:
        """In fp64."""
        options = {"scale": self.query.shape[3] ** -0.5, **self.options}
        out, lse = torch.zeros(self.query.shape).double(), torch.zeros(self.query.shape[:3]).double()
        rows = self.query.shape[2]
        for b, length in enumerate(self.lengths):
            own = torch.arange(length - rows, length)
            visible = self.visible[b, :, None] & (torch.arange(TOKENS) <= own[:, None])
            tensors = (tensor[b, None].double() for tensor in (self.query, self.key, self.value))
            part, part_lse = masked_attention(*tensors, visible, **options)
            out[b], lse[b] = part[0].nan_to_num(), part_lse[0].masked_fill(own < 0, -torch.inf)
        return out, lse


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("page", [4, 32])
def test_equals_dense_attention_over_the_same_keys(decode, rows: int, page: int) -> None:
    case = Case(rows=rows, page=page, recent=16)
    assert_close(case.run(decode), case.expected())


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 8])
def test_equals_it_for_every_group_of_heads(decode, group: int, rows: int) -> None:
    case = Case(group=group, rows=rows, lengths=(120, 33))
    assert_close(case.run(decode), case.expected())


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_it_for_every_head_dim(decode, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(head_dim=head_dim, dtype=dtype, lengths=(150, 60))
    out, lse = case.run(decode)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close((out, lse), case.expected(), 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"scale": 0.7}, {}], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_equals_it_with_soft_cap_scale_and_sink_logits(decode, options, sinks: bool) -> None:
    if sinks:
        # From negligible to dominant beside the logits.
        options = {**options, "sink_logits": torch.tensor([-5.0, 0.0, 3.0, 60.0])}
    case = Case(rows=5, **options)
    assert_close(case.run(decode), case.expected())


def test_each_sequence_has_its_own_recent_tokens(decode) -> None:
    case = Case(recent=to_integers(0, 7, 200, 33))
    assert_close(case.run(decode), case.expected())


def test_tokens_that_came_since_the_lists_were_made_are_attended_too(decode) -> None:
    case = Case(recent=to_integers(20, 9, 40, 33))
    since = to_integers(*case.lengths) - to_integers(13, 9, 0, 33)
    assert_close(case.run(decode, recent=to_integers(7, 0, 40, 0), since=since), case.expected())
    assert_close(Case(recent=8).run(decode, recent=5, since=to_integers(*case.lengths) - 3), Case(recent=8).expected())


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_rows_that_see_nothing_are_zeros(decode) -> None:
    case = Case(lengths=(0, 3, 40), rows=5, sinks=0, recent=2, kept=0.0)
    out, lse = case.run(decode)
    assert_close((out, lse), case.expected())
    assert (lse[0] == -torch.inf).all()
    assert (out[0] == 0).all()
    # Only the last two rows of the others see anything.
    assert (lse[1:] > -torch.inf).sum() == 2 * 4 * 2


def test_keys_of_pages_that_are_not_kept_are_left_out(decode) -> None:
    case = Case()
    table = case.named["block_table"].clone()
    table[:, 2] = -1
    table[0, 0] = -7
    case.visible[:, :, 32:48] = False
    case.visible[0, :, :16] = False
    assert_close(case.run(decode, block_table=table), case.expected())


@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("programs", [1, 7, 60])
def test_the_number_of_programs_changes_nothing(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    launch = pytest.importorskip("sparsetrain_kernels.list_decode.triton.launch")
    from sparsetrain_kernels.block_decode.triton.configs import Config

    monkeypatch.setattr(launch, "choose_programs", lambda *arguments: programs)
    monkeypatch.setattr(launch, "choose_tiles", lambda *arguments: Config(16, 16, 3))
    case = Case(rows=5, sink_logits=torch.tensor([-5.0, 0.0, 3.0, 60.0]))
    decode = partial(listed_decode, return_lse=True, backend="triton")
    got = case.run(decode)
    assert_close(got, case.expected())
    assert all(torch.equal(a, b) for a, b in zip(got, case.run(decode), strict=True))


def test_programs_fill_the_card_and_no_more() -> None:
    configs = pytest.importorskip("sparsetrain_kernels.list_decode.triton.configs")
    assert configs.choose_programs(64, 131072, 64, 1, 132) == 264
    assert configs.choose_programs(64, 131072, 64, 2, 132) == 132
    assert configs.choose_programs(8, 128, 64, 1, 132) == 16
    assert configs.choose_programs(1, 1, 64, 4, 2) == 1


def test_layouts_do_not_matter(decode) -> None:
    case = Case(rows=2)
    want = case.run(decode)
    case.query = case.query.movedim(1, -1).contiguous().movedim(-1, 1)
    case.lists = torch.stack([case.lists, torch.full_like(case.lists, 7)], -1)[..., 0]
    case.counts = case.counts.t().contiguous().t()
    # Pages of all heads, one key after another.
    case.pages = [pages.transpose(1, 2).contiguous().transpose(1, 2) for pages in case.pages]
    got = case.run(decode, block_table=case.named["block_table"].t().contiguous().t())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_what_a_share_of_the_weight_leaves_out_bounds_the_error(decode) -> None:
    """|o - o'| = (1 - m) |rest - o'| for the retained mass m: the identity behind top-p."""
    case = Case(group=2, lengths=(150, 97), sinks=0, recent=0, kept=2.0, head_dim=64)
    exact = case.expected()[0][:, :, 0]
    keys, values = (tensor.double().repeat_interleave(2, 1) for tensor in (case.key, case.value))
    logits = (case.query.double() * 2 @ keys.mT)[:, :, 0] * 64**-0.5
    for row, length in enumerate(case.lengths):
        logits[row, :, length:] = -torch.inf
    scores = logits.half()
    lse = scores.float().logsumexp(-1)
    found = top_p_lists(scores, lse, 0.9, lengths=case.named["lengths"], num_kv_heads=2, capacity=TOKENS)
    case.lists, case.counts, case.query = found.lists, found.counts, case.query * 2
    pages = case.named["block_table"]
    case.visible[:] = torch.arange(TOKENS) < case.named["lengths"][:, None, None]
    case.pages = [case.paged(cache, pages, 16) for cache in (case.key, case.value)]
    exact = case.expected()[0][:, :, 0]
    out = case.run(decode)[0][:, :, 0].double()
    kept = torch.zeros(2, 2, TOKENS + 1).scatter_(2, found.lists.where(found.lists >= 0, TOKENS).long(), 1.0)
    for row, count in enumerate(found.counts.tolist()):
        for head in range(2):
            kept[row, head] = 0
            kept[row, head, found.lists[row, head, : count[head]].long()] = 1
    weights = logits.softmax(-1)
    mass = (weights * kept[..., :TOKENS].repeat_interleave(2, 1)).sum(-1, keepdim=True)
    assert (mass >= 0.899).all()
    assert (mass < 1).all()
    rest = (weights * (1 - kept[..., :TOKENS].repeat_interleave(2, 1)))[..., None, :] @ values
    torch.testing.assert_close(mass * out + rest[:, :, 0], exact, rtol=1e-5, atol=1e-5)


def test_fp64_stays_fp64_and_equals_the_oracle() -> None:
    case = Case(rows=3, dtype=torch.float64)
    got = case.run(partial(listed_decode, return_lse=True))
    assert {tensor.dtype for tensor in got} == {torch.float64}
    assert_close(got, case.expected(), 1e-12)


def test_the_operation_is_opaque_to_fake_tensors() -> None:
    case = Case(dtype=torch.float16)
    with torch._subclasses.FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (case.query, *case.pages, case.lists, case.counts)]
        named = {name: mode.from_tensor(case.named[name]) for name in ("lengths", "block_table")}
        out, lse = listed_decode(*tensors, **named, return_lse=True)
    assert (out.shape, out.dtype) == (case.query.shape, torch.float16)
    assert (lse.shape, lse.dtype) == (case.query.shape[:3], torch.float32)


CASE = Case(lengths=(20, 5))
ARGUMENTS = {
    "query": CASE.query,
    "key_cache": CASE.pages[0],
    "value_cache": CASE.pages[1],
    "lists": CASE.lists,
    "counts": CASE.counts,
    **CASE.named,
}


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"query": torch.zeros(2, 4, 17, 16)}, ValueError, "query has 17 rows a sequence; decoding takes 1 to 16"),
        ({"query": CASE.query.half()}, TypeError, "key_cache is torch.float32 on cpu, but query is torch.float16"),
        ({"query": CASE.query.clone().requires_grad_()}, ValueError, "query requires a gradient"),
        ({"lists": CASE.lists[0]}, ValueError, r"lists has shape .*, expected \[2, 2, capacity\]"),
        ({"lists": CASE.lists.long()}, TypeError, "lists is torch.int64 on cpu, expected int32"),
        ({"counts": CASE.counts[:1]}, ValueError, r"counts has shape \(1, 2\), expected \(2, 2\)"),
        ({"counts": None}, TypeError, "counts is a NoneType, expected a tensor"),
        ({"lengths": torch.tensor([20, 5])}, TypeError, "lengths is torch.int64 on cpu, expected int32"),
        ({"block_table": None}, TypeError, "block_table is a NoneType, expected a tensor"),
        ({"block_table": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, r"block_table has shape \(1, 3\)"),
        ({"recent": -1}, ValueError, "recent=-1 must be at least 0"),
        ({"recent": to_integers(1)}, ValueError, r"recent has shape \(1,\), expected \(2,\)"),
        ({"recent": torch.ones(2)}, TypeError, "recent is torch.float32"),
        ({"since": to_integers(1)}, ValueError, r"since has shape \(1,\), expected \(2,\)"),
        ({"since": 5}, TypeError, "since is a int, expected a tensor"),
        ({"sinks": 0.5}, TypeError, "sinks=0.5 is no integer"),
        ({"softcap": -2.0}, ValueError, "softcap=-2.0 must be positive"),
        ({"sink_logits": torch.zeros(2)}, ValueError, r"sink_logits has shape \(2,\)"),
        ({"backend": "gluon"}, ValueError, "decoding has plain Triton kernels only"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changed, error, named: str) -> None:
    with pytest.raises(error, match=named):
        listed_decode(**{**ARGUMENTS, **changed})
