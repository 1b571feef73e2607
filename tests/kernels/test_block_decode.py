"""Decoding equals the last rows of block-pattern attention, and keeps what it promises beyond that.

Both implementations: gathered keys in plain PyTorch, and the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sparsetrain_kernels import block_pattern_attention
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.block_decode import block_pattern_decode
from sparsetrain_kernels.block_decode.inputs import DecodeInputs
from sparsetrain_kernels.block_decode.reference import decode_by_gathering
from sparsetrain_kernels.block_pattern.pattern import block_lists
from sparsetrain_kernels.dense import causal_attention

from sparsetrain.patterns import (
    DilatedPattern,
    DistancePattern,
    FullPattern,
    LongNetPattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)

POWER = PowerPattern(16, 2, 1)
PATTERNS = [
    POWER,
    FullPattern(16),
    SlidingPattern(16, 2, 3),
    StridePattern(16, 2, 1, 3),
    DilatedPattern(16, 3, 2),
    LongNetPattern(16, ((2, 1), (4, 2), (8, 4))),
    LongNetPattern(16, ((2, 1), (4, 2), (8, 4)), head_shift=True, num_heads=2),
    DistancePattern(16, (0, 3), 2),
]
LENGTHS = [177, 1, 130, 64]
"""Of 5 rows those of the first two straddle a block boundary at 176 and at 0; the last ends with its block."""


@pytest.fixture(params=["reference", "triton"])
def decode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Decoding by each backend, with the log-sum-exp; what the kernels do not write stays NaN."""
    if request.param == "triton":
        if not INTERPRETING:
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        from sparsetrain_kernels.block_decode.triton import launch

        def poisoned(*args, **kwargs):
            return torch.full(*args, float("nan"), **kwargs)

        monkeypatch.setattr(launch, "torch", SimpleNamespace(empty=poisoned, float32=torch.float32))
    return partial(block_pattern_decode, return_lse=True, backend=request.param)


def make_cache(
    heads: int, kv_heads: int, rows: int, keys: int = 192, *, batch: int = 4, head_dim: int = 16, dtype=torch.float32
):
    """Query, keys and values, laid out as models have them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    return random(heads, rows), random(kv_heads, keys), random(kv_heads, keys)


def to_lengths(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def expected(query, key, value, pattern, lengths, **options):
    """The rows of block_pattern_attention, a sequence at a time, in fp32."""
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:3], float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        rows = min(query.shape[2], length)
        if rows:
            tensors = query[b, None, :, query.shape[2] - rows :], key[b, None, :, :length], value[b, None, :, :length]
            part = block_pattern_attention(
                *(t.float() for t in tensors), pattern, return_lse=True, backend="reference", **options
            )
            out[b, :, query.shape[2] - rows :], lse[b, :, query.shape[2] - rows :] = part[0][0], part[1][0]
    return out, lse


def assert_close(got, want, tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_equals_the_last_rows_for_every_pattern(decode, pattern, rows: int) -> None:
    tensors, lengths = make_cache(4, 2, rows), to_lengths(*LENGTHS)
    assert_close(decode(*tensors, pattern, lengths=lengths), expected(*tensors, pattern, lengths))


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("lengths", [(17, 16), (33, 160), (161, 3), (0, 192)])
def test_rows_may_lie_in_two_blocks_or_before_the_first_token(decode, rows: int, lengths) -> None:
    tensors, lengths = make_cache(4, 2, rows, batch=2), to_lengths(*lengths)
    got = decode(*tensors, POWER, lengths=lengths)
    assert_close(got, expected(*tensors, POWER, lengths))
    hidden = torch.arange(rows) < rows - lengths[:, None]
    assert (got[0].transpose(1, 2)[hidden] == 0).all()
    assert (got[1].transpose(1, 2)[hidden] == float("-inf")).all()


@pytest.mark.parametrize("group", [1, 4, 7, 9])
@pytest.mark.parametrize("rows", [1, 8])
def test_equals_them_for_every_group_of_heads(decode, group: int, rows: int) -> None:
    tensors, lengths = make_cache(2 * group, 2, rows, 100, batch=2), to_lengths(100, 51)
    assert_close(decode(*tensors, POWER, lengths=lengths), expected(*tensors, POWER, lengths))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_them_for_every_head_dim(decode, head_dim: int, dtype) -> None:
    tensors, lengths = make_cache(4, 2, 2, 100, batch=2, head_dim=head_dim, dtype=dtype), to_lengths(97, 60)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    got = decode(*tensors, POWER, lengths=lengths)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert_close(got, expected(*tensors, POWER, lengths), tolerance)


@pytest.mark.parametrize("block", [8, 48, 128])
def test_equals_them_for_blocks_that_tiles_do_not_divide_and_that_hold_several(decode, block: int) -> None:
    pattern = PowerPattern(block, 2, 1)
    tensors, lengths = make_cache(4, 2, 5, 400, batch=2, head_dim=64), to_lengths(387, 98)
    assert_close(decode(*tensors, pattern, lengths=lengths), expected(*tensors, pattern, lengths))


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"scale": 0.7}, {}], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_equals_them_with_soft_cap_scale_and_sink_logits(decode, options, sinks: bool) -> None:
    tensors, lengths = make_cache(4, 2, 5), to_lengths(*LENGTHS)
    if sinks:
        # From negligible to dominant beside the logits.
        options = {**options, "sink_logits": torch.tensor([-5.0, 0.0, 3.0, 60.0])}
    assert_close(decode(*tensors, POWER, lengths=lengths, **options), expected(*tensors, POWER, lengths, **options))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("pattern", "window"), [(FullPattern(16), 20), (SlidingPattern(16, 3, 0), 33), (POWER, 1)])
def test_a_window_of_tokens_equals_dense_attention_in_that_window(decode, pattern, window: int, rows: int) -> None:
    tensors, lengths = make_cache(4, 2, rows), to_lengths(*LENGTHS)
    sinks = torch.linspace(-1, 1, 4)
    out, _ = decode(*tensors, pattern, lengths=lengths, window=window, sink_logits=sinks)
    for b, length in enumerate(LENGTHS):
        seen = min(rows, length)
        query, key, value = (tensor[b, None] for tensor in tensors)
        want = causal_attention(
            query[:, :, rows - seen :], key[:, :, :length], value[:, :, :length], window=window, sink_logits=sinks
        )
        torch.testing.assert_close(out[b, None, :, rows - seen :], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 9])  # 6 key tiles at most: some of 9 shares are empty
def test_the_number_of_splits_changes_nothing(monkeypatch, splits: int) -> None:
    launch = pytest.importorskip("sparsetrain_kernels.block_decode.triton.launch")
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: splits)
    tensors, lengths = make_cache(4, 2, 5), to_lengths(*LENGTHS)
    options = {"sink_logits": torch.tensor([-5.0, 0.0, 3.0, 60.0]), "return_lse": True, "backend": "triton"}
    got = block_pattern_decode(*tensors, POWER, lengths=lengths, **options)
    del options["return_lse"], options["backend"]
    assert_close(got, expected(*tensors, POWER, lengths, **options))


def paged(cache: torch.Tensor, table: torch.Tensor, page_size: int) -> torch.Tensor:
    """The cache cut into pages, at the places that the table gives them; other pages hold NaN."""
    pages = torch.full((int(table.max()) + 3, cache.shape[1], page_size, cache.shape[3]), float("nan"))
    pages[table.flatten().long()] = cache.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
    return pages


@pytest.mark.parametrize(("rows", "page_size"), [(1, 16), (5, 4)])  # rows of one page, and of two
@pytest.mark.parametrize("pattern", [POWER, PATTERNS[-2]], ids=repr)
def test_shuffled_pages_equal_a_contiguous_cache(decode, pattern, rows: int, page_size: int) -> None:
    (query, key, value), lengths = make_cache(4, 2, rows), to_lengths(*LENGTHS)
    table = torch.randperm(4 * 192 // page_size, generator=torch.Generator().manual_seed(1)).view(4, -1)
    table = table.to(torch.int32)
    pages = paged(key, table, page_size), paged(value, table, page_size)
    got = decode(query, *pages, pattern, lengths=lengths, block_table=table)
    want = decode(query, key, value, pattern, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    # Entries behind a length are not read, nor does the table's layout matter.
    table[torch.arange(192 // page_size) >= -(-lengths[:, None] // page_size)] = 2**30
    got = decode(query, *pages, pattern, lengths=lengths, block_table=table.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("pattern", [POWER, PATTERNS[-2]], ids=repr)
def test_unlisted_blocks_and_later_keys_are_never_read(decode, pattern, rows: int) -> None:
    (query, key, value), lengths = make_cache(4, 2, rows), to_lengths(*LENGTHS)
    clean = decode(query, key, value, pattern, lengths=lengths)
    position = torch.arange(192)
    for b, length in enumerate(LENGTHS):
        for head in range(2):
            blocks = range(max(length - rows, 0) // 16, (length - 1) // 16 + 1)
            listed = torch.tensor(sorted({j for t in blocks for j in pattern.key_blocks(t, head)}))
            hidden = ~torch.isin(position // 16, listed) | (position >= length)
            key[b, head, hidden] = value[b, head, hidden] = float("nan")
    assert key.isnan().any(3).sum() > 192
    dirty = decode(query, key, value, pattern, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_max_length_divides_the_work_and_bounds_the_lengths(decode) -> None:
    tensors, lengths = make_cache(4, 2, 1, batch=2), to_lengths(60, 64)
    want = expected(*tensors, POWER, lengths)
    assert_close(decode(*tensors, POWER, lengths=lengths, max_length=64), want)
    if decode.keywords["backend"] == "reference":
        with pytest.raises(ValueError, match=r"lengths=\[60, 64\] must be 0 to max_length=63"):
            decode(*tensors, POWER, lengths=lengths, max_length=63)
    else:
        out, lse = decode(*tensors, POWER, lengths=lengths, max_length=63)
        assert_close((out[:1], lse[:1]), (want[0][:1], want[1][:1]))
        assert out[1].isnan().all()
        assert lse[1].isnan().all()


def test_a_step_at_a_time_are_the_rows_of_the_whole() -> None:
    query, key, value = make_cache(4, 2, 40, 40, batch=1)
    whole = block_pattern_attention(query, key, value, PowerPattern(4, 2, 1))
    for length in range(1, 41):
        row = block_pattern_decode(
            query[:, :, length - 1 : length], key, value, PowerPattern(4, 2, 1), lengths=to_lengths(length)
        )
        torch.testing.assert_close(row, whole[:, :, length - 1 : length], rtol=1e-5, atol=1e-6)


def test_fp64_stays_fp64() -> None:
    (query, key, value), lengths = make_cache(4, 2, 5, dtype=torch.float64), to_lengths(*LENGTHS)
    out, lse = block_pattern_decode(query, key, value, POWER, lengths=lengths, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64


def test_the_longest_list_is_that_of_some_block() -> None:
    launch = pytest.importorskip("sparsetrain_kernels.block_decode.triton.launch")
    for pattern in PATTERNS:
        for blocks in (1, 5, 21):
            longest = max(
                len(pattern.key_blocks(t, h)) for h in range(2 if pattern.per_head else 1) for t in range(blocks)
            )
            assert launch.longest_list(block_lists(pattern, blocks, 2), blocks) == longest


def test_splits_fill_the_card_and_no_more() -> None:
    configs = pytest.importorskip("sparsetrain_kernels.block_decode.triton.configs")
    assert configs.choose_splits(64, 48, 132) == 4
    assert configs.choose_splits(8, 48, 132) == 24
    assert configs.choose_splits(1000, 48, 132) == 1
    assert configs.choose_splits(1, 1, 132) == 1


def test_the_operation_is_opaque_to_fake_tensors() -> None:
    tensors, lengths = make_cache(4, 2, 2, dtype=torch.float16), to_lengths(*LENGTHS)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*tensors, lengths)]
        out, lse = block_pattern_decode(*fakes[:3], POWER, lengths=fakes[3], return_lse=True)
    assert (out.shape, out.dtype) == (tensors[0].shape, torch.float16)
    assert (lse.shape, lse.dtype) == (tensors[0].shape[:3], torch.float32)


def test_the_reference_refuses_lengths_that_cannot_be() -> None:
    query, key, value = make_cache(2, 1, 1, 32, batch=1)
    inputs = DecodeInputs(query, key, value, to_lengths(-1), None, 32, 1.0, None, None)
    with pytest.raises(ValueError, match=r"lengths=\[-1\]"):
        decode_by_gathering(inputs, block_lists(POWER, 2, 1))


QUERY, KEY, VALUE = make_cache(4, 2, 2, 32, batch=2)
ARGUMENTS = {"query": QUERY, "key_cache": KEY, "value_cache": VALUE, "pattern": POWER, "lengths": to_lengths(20, 5)}
TABLE = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"query": QUERY[0]}, ValueError, r"query has shape \(4, 2, 16\), expected \[batch, heads, rows, head_dim\]"),
        ({"key_cache": KEY[0]}, ValueError, "key_cache has shape .* kv heads, keys, head_dim"),
        ({"value_cache": VALUE[:, :, :9]}, ValueError, "key_cache .* and value_cache .* same shape"),
        ({"query": QUERY[..., :8]}, ValueError, "differ in head_dim"),
        ({"query": QUERY[:, :3]}, ValueError, "query has 3 heads, which is no multiple of the 2"),
        ({"query": QUERY[:0]}, ValueError, "at least one sequence"),
        ({"query": QUERY[:, :, :0]}, ValueError, "query has 0 rows a sequence; decoding takes 1 to 16"),
        ({"query": torch.zeros(2, 4, 17, 16)}, ValueError, "query has 17 rows .* use block_pattern_attention"),
        ({"pattern": PowerPattern(1, 2, 1)}, ValueError, "decoding takes 1 to 1 .*one pattern block of 1"),
        ({"query": QUERY.long()}, TypeError, "query has dtype torch.int64"),
        ({"key_cache": KEY.half()}, TypeError, "key_cache is torch.float16 on cpu, but query is torch.float32"),
        ({"key_cache": KEY.mT.contiguous().mT}, ValueError, "key_cache has strides .* last stride 1"),
        ({"lengths": torch.tensor([20, 5])}, TypeError, "lengths is torch.int64 on cpu, expected int32"),
        ({"lengths": to_lengths(3)}, ValueError, r"lengths has shape \(1,\), expected \(2,\)"),
        ({"key_cache": KEY[:1], "value_cache": VALUE[:1]}, ValueError, "give block_table if these are pages"),
        ({"block_table": TABLE.long()}, TypeError, "block_table is torch.int64"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table has shape \(1, 3\), expected \(2, 3\)"),
        ({"block_table": TABLE[0]}, ValueError, r"block_table has shape \(3,\), expected \[batch, max_pages\]"),
        ({"block_table": TABLE}, ValueError, "pages of 32 keys, which do not divide the pattern's block of 16"),
        ({"max_length": 33}, ValueError, "max_length=33 must be 1 to the 32 keys"),
        ({"max_length": 0}, ValueError, "max_length=0"),
        ({"scale": 0.0}, ValueError, "scale=0.0 must be positive"),
        ({"softcap": -2.0}, ValueError, "softcap=-2.0 must be positive"),
        ({"window": 0}, ValueError, "window=0 must be at least 1 token"),
        ({"sink_logits": torch.zeros(2)}, ValueError, r"sink_logits has shape \(2,\)"),
        ({"query": QUERY.clone().requires_grad_()}, ValueError, "query requires a gradient.*torch.no_grad"),
        ({"backend": "gluon"}, ValueError, "backend='gluon' cannot run this: decoding has plain Triton kernels only"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changed, error, named: str) -> None:
    with pytest.raises(error, match=named):
        block_pattern_decode(**{**ARGUMENTS, **changed})


def test_gradients_are_no_matter_where_none_are_recorded() -> None:
    arguments = {**ARGUMENTS, "query": QUERY.clone().requires_grad_()}
    with torch.no_grad():
        assert torch.equal(block_pattern_decode(**arguments), block_pattern_decode(**ARGUMENTS))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"query": QUERY.double(), "key_cache": KEY.double(), "value_cache": VALUE.double()}, "not torch.float64"),
        (
            {
                "query": torch.zeros(2, 4, 1, 512),
                "key_cache": torch.zeros(2, 2, 32, 512),
                "value_cache": torch.zeros(2, 2, 32, 512),
            },
            "head_dim of up to 256, not 512",
        ),
    ],
)
def test_the_kernels_say_what_they_cannot_run(changed, named: str) -> None:
    with pytest.raises(ValueError, match=f"backend='triton' cannot run this: .*{named}"):
        block_pattern_decode(**{**ARGUMENTS, **changed}, backend="triton")
