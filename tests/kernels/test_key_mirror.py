"""Tokens in a paged cache: every key and value at its place, codes within half a step, bounds that hold.

Both implementations: plain PyTorch, and the Triton kernel in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from paged_keys import PagedKeys, by_position, paged_keys
from sparsetrain_kernels import KeyMirror, PageBounds, append_codes, append_tokens, key_statistics
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.key_mirror.reference import from_codes, round_outwards

LENGTHS = (70, 41, 0)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    return request.param


def filled(backend: str, steps: int = 0, **options) -> PagedKeys:
    """All tokens in one call, or the last ``steps`` one by one."""
    keys = paged_keys(**{"lengths": LENGTHS, "dead": ((1, 0),), **options})
    tokens = keys.key.shape[2]
    keys.append(slice(0, tokens - steps), (keys.lengths - steps).clamp(min=0), backend)
    for step in range(steps):
        left = steps - 1 - step
        rows = slice(tokens - left - 1, tokens - left)
        keys.append(rows, (keys.lengths - left).clamp(min=0), backend)
    return keys


def everything(keys: PagedKeys) -> list[torch.Tensor]:
    values = keys.bounds.values.float()
    return [keys.key_cache, keys.value_cache, keys.mirror.codes, keys.mirror.scale_low, values]


def assert_same(a: PagedKeys, b: PagedKeys) -> None:
    for x, y in zip(everything(a), everything(b), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_token_is_at_its_place_and_nothing_else_is_written(backend, dtype) -> None:
    keys = filled(backend, dtype=dtype)
    kept = keys.kept()[:, None, :, None]
    for cache, new in ((keys.key_cache, keys.key), (keys.value_cache, keys.value)):
        ordered = keys._replace(key=new).keys().to(dtype)
        found = by_position(cache, keys)
        assert torch.equal(torch.where(kept, found, 0), torch.where(kept, ordered, 0))
        assert (~cache.isnan()).sum() == kept.sum() * cache.shape[1] * cache.shape[3]
    assert (~keys.mirror.scale_low.isnan()).sum() == kept.sum() * 2 * keys.key.shape[1]


@pytest.mark.parametrize("head_dim", [64, 80, 128, 6])
def test_codes_are_within_half_a_step_of_the_scaled_key(backend, head_dim: int) -> None:
    keys = filled(backend, head_dim=head_dim)
    kept = keys.kept()[:, None, :, None]
    center, spread = (moment[:, :, None].double() for moment in keys.mirror[2:])
    scaled = (keys.keys() - center) / spread
    step, low = by_position(keys.mirror.scale_low, keys).double().split(1, -1)
    found = from_codes(by_position(keys.mirror.codes, keys), by_position(keys.mirror.scale_low, keys))
    # The rounding of step and low to fp16 may cut off the ends of the range.
    allowed = step * 0.5 + 2.0**-11 * (low.abs() + 15 * step) + 1e-6
    assert torch.where(kept, (found.double() - scaled).abs() - allowed, 0.0).max() <= 0


@pytest.mark.parametrize("bytes_", [False, True])
def test_bounds_hold_and_are_no_wider_than_their_bits_make_them(backend, bytes_: bool) -> None:
    keys = filled(backend, steps=8, bytes_=bytes_)
    scaled, unit = keys.keys(), torch.ones(())
    if bytes_:
        unit = keys.mirror.spread[:, :, None].double()
        scaled = (scaled - keys.mirror.center[:, :, None].double()) / unit
    kept = keys.kept()
    values = keys.bounds.values.double()[keys.table.long().clamp(min=0)].transpose(1, 2).flatten(2, 3)
    for b in range(len(LENGTHS)):
        for start in range(0, LENGTHS[b], 16):
            if kept[b, start]:
                own = scaled[b, :, start : min(start + 16, LENGTHS[b])]
                low, high = values[b, :, start // 16].unbind(1)
                for bound, outside in ((low, own.amin(1) - low), (high, high - own.amax(1))):
                    assert (outside >= -1e-6).all()
                    assert (outside <= (torch.clamp(bound.abs() / 8, min=2.0**-6) if bytes_ else 1e-12)).all()
    assert (~keys.bounds.values.float().isnan()).sum() == 2 * 64 * 2 * sum(kept[:, ::16].flatten())


@pytest.mark.parametrize("bytes_", [False, True])
def test_one_by_one_and_at_once_are_the_same(backend, bytes_: bool) -> None:
    assert_same(filled(backend, bytes_=bytes_), filled(backend, steps=8, bytes_=bytes_))


@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter, on machines without a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("page", "bytes_"), [(16, True), (48, False), (256, True)])
def test_the_kernel_has_the_bits_of_the_reference(dtype, page: int, bytes_: bool) -> None:
    options = {"steps": 1, "dtype": dtype, "page": page, "bytes_": bytes_, "head_dim": 80}
    assert_same(filled("reference", **options), filled("triton", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codes_alone_are_those_beside_the_keys(backend, dtype) -> None:
    """Of a few channels, as a label cache has them: one by one, with padding and a page that is not kept."""
    keys = paged_keys(LENGTHS, dead=((1, 0),), dtype=dtype)
    chosen = torch.tensor([1, 3, 4, 20, 40, 63])
    few = keys._replace(
        key=keys.key[..., chosen],
        value=keys.value[..., chosen],
        key_cache=keys.key_cache[..., chosen].contiguous(),
        value_cache=keys.value_cache[..., chosen].contiguous(),
        bounds=None,
        mirror=KeyMirror(
            keys.mirror.codes[..., :3].contiguous(),
            keys.mirror.scale_low,
            *(moment[..., chosen].contiguous() for moment in keys.mirror[2:]),
        ),
    )
    alone = KeyMirror(few.mirror.codes.clone(), few.mirror.scale_low.clone(), *few.mirror[2:])
    few.append(slice(0, 70), few.lengths, "reference")
    for end in (60, *range(61, 71)):
        rows = slice(0 if end == 60 else end - 1, end)
        lengths = (few.lengths - (70 - end)).clamp(min=0)
        append_codes(few.key[:, :, rows], alone, lengths=lengths, block_table=few.table, backend=backend)
    assert torch.equal(alone.codes, few.mirror.codes)
    assert torch.equal(alone.scale_low.nan_to_num(7.0), few.mirror.scale_low.nan_to_num(7.0))


def test_a_page_that_is_used_again_forgets_its_bounds(backend) -> None:
    keys = filled(backend)
    wide = keys._replace(key=keys.key * 100)
    wide.append(slice(0, 70), wide.lengths, backend)
    keys.append(slice(0, 70), keys.lengths, backend)
    assert_same(keys, filled(backend))


def test_a_cache_without_mirror_or_bounds_takes_any_page(backend) -> None:
    keys = paged_keys((21, 9), page=16)
    cache = torch.full((5, 2, 10, 64), float("nan"))
    table = torch.tensor([[4, 0, 3], [2, -1, -1]], dtype=torch.int32)
    append_tokens(keys.key, keys.value, cache, cache.clone(), lengths=keys.lengths, block_table=table, backend=backend)
    assert torch.equal(cache[4].transpose(0, 1), keys.key[0, :, :10].transpose(0, 1))
    assert torch.equal(cache[3, :, :1], keys.key[0, :, 20:])
    assert torch.equal(cache[2, :, :9], keys.key[1, :, 12:])
    assert cache[1].isnan().all()


def test_a_key_that_is_no_number_leaves_no_code_that_looks_like_one(backend) -> None:
    keys = paged_keys((20,))
    keys.key[0, 1, 7, 3] = float("nan")
    keys.key[0, 0, 9, 3] = float("inf")
    keys.append(slice(0, 20), keys.lengths, backend)
    step = by_position(keys.mirror.scale_low, keys)[0, ..., 0]
    assert step.isnan().nonzero().tolist() == [[0, 9], [1, 7]]


def test_equal_channels_have_one_code(backend) -> None:
    keys = paged_keys((3,))
    keys.key[:] = 2.0
    keys.mirror.center.zero_()
    keys.mirror.spread.fill_(1.0)
    keys.append(slice(0, 3), keys.lengths, backend)
    found = from_codes(by_position(keys.mirror.codes, keys), by_position(keys.mirror.scale_low, keys))
    assert (found[0, :, :3] == 2.0).all()


def test_rounding_outwards_takes_the_next_of_eight_bits() -> None:
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = torch.cat([-every.flip(0), every[1:]])
    coarse = every[(every == 0) | (every.abs() >= 2.0**-6)]
    inside = torch.linspace(-440, 440, 4001)
    x = torch.cat([inside, coarse, inside / 100, inside / 1e5])
    up, down = round_outwards(x, True).float(), round_outwards(x, False).float()
    assert torch.equal(up, coarse[torch.searchsorted(coarse, x)])
    assert torch.equal(down, coarse[torch.searchsorted(coarse, x, right=True) - 1])


def test_statistics_are_those_of_real_tokens() -> None:
    keys = paged_keys((70, 41, 1, 0))
    center, spread = key_statistics(keys.key, keys.lengths)
    for b, length in enumerate((70, 41)):
        own = keys.keys()[b, :, :length]
        torch.testing.assert_close(center[b].double(), own.mean(1), rtol=1e-5, atol=1e-5)
        own = own.std(1, correction=0)
        least = own.square().mean(1, keepdim=True).sqrt() / 64
        torch.testing.assert_close(spread[b].double(), torch.maximum(own, least), rtol=1e-5, atol=1e-5)
    assert torch.equal(center[2].double(), keys.keys()[2, :, 0])
    assert (center[3] == 0).all()
    assert (spread[2:] == 1).all()


def test_a_channel_that_hardly_changes_does_not_get_a_tiny_spread() -> None:
    keys = paged_keys((70,))
    keys.key[..., 5] = 3.0
    _, spread = key_statistics(keys.key)
    torch.testing.assert_close(spread[..., 5], spread.square().mean(-1).sqrt() / 64, rtol=1e-2, atol=0)


def test_the_operations_are_well_made_and_change_in_place() -> None:
    keys = paged_keys(LENGTHS)
    tensors = (keys.key, keys.value, keys.key_cache.zero_(), keys.value_cache.zero_(), keys.lengths, keys.table)
    keys.mirror.scale_low.zero_()
    keys.bounds.values.zero_()
    torch.library.opcheck(
        torch.ops.sparsetrain.append_tokens.default,
        (*tensors, *keys.mirror, *keys.bounds, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.sparsetrain.append_codes.default,
        (keys.key, *keys.places().values(), *keys.mirror, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"key": torch.zeros(2, 2, 20, 32)}, ValueError, "key has shape .* expected .*64"),
        ({"key": torch.zeros(2, 2, 0, 64)}, ValueError, "key has shape"),
        ({"key": torch.zeros(2, 2, 1, 64, requires_grad=True)}, ValueError, "key requires a gradient.*torch.no_grad"),
        ({"mirror": None}, TypeError, "mirror is a NoneType, expected a KeyMirror"),
        ({"lengths": torch.zeros(2)}, TypeError, "lengths is torch.float32"),
        ({"backend": "gluon"}, ValueError, "plain Triton kernel only"),
    ],
)
def test_codes_alone_refuse_arguments_by_name(changed, error, named: str) -> None:
    given = {"key": KEYS.key, "mirror": KEYS.mirror, **KEYS.places(), **changed}
    with pytest.raises(error, match=named):
        append_codes(**given)


KEYS = paged_keys((20, 5))
ARGUMENTS = {
    "key": KEYS.key,
    "value": KEYS.value,
    "key_cache": KEYS.key_cache,
    "value_cache": KEYS.value_cache,
    **KEYS.places(),
    "mirror": KEYS.mirror,
    "bounds": KEYS.bounds,
}
MOMENTS = KEYS.mirror[2:]


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"key": [1.0]}, TypeError, "key is a list, expected a tensor"),
        ({"key": KEYS.key[0]}, ValueError, "key has shape .* expected .batch, kv heads, tokens, head_dim."),
        ({"key": KEYS.key[:, :, :0]}, ValueError, "at least one sequence and token"),
        ({"key": KEYS.key.half()}, TypeError, "key is torch.float16 on cpu, expected torch.float32"),
        ({"value": KEYS.value[:, :, :3]}, ValueError, "value has shape"),
        ({"key_cache": KEYS.key_cache[0]}, ValueError, "key_cache has shape"),
        ({"key_cache": KEYS.key_cache.mT.contiguous().mT}, ValueError, "key_cache has strides .* last stride 1"),
        ({"value_cache": KEYS.value_cache[:1]}, ValueError, "value_cache has shape"),
        ({"lengths": KEYS.lengths.long()}, TypeError, "lengths is torch.int64 on cpu, expected torch.int32"),
        ({"lengths": KEYS.lengths + 60}, ValueError, r"lengths=\[80, 65\] must be 0 to the 32 tokens"),
        ({"block_table": KEYS.table[0]}, ValueError, "block_table is .* expected int32 .batch, max_pages."),
        ({"block_table": KEYS.table[:1]}, ValueError, "block_table has shape"),
        ({"mirror": KEYS.mirror._replace(codes=KEYS.mirror.codes[:2])}, ValueError, "scale_low has shape"),
        ({"mirror": KEYS.mirror._replace(center=None)}, TypeError, "center is a NoneType"),
        ({"mirror": KEYS.mirror._replace(spread=MOMENTS[1].half())}, TypeError, "spread is torch.float16"),
        (
            {"mirror": KeyMirror(KEYS.mirror.codes[:2], KEYS.mirror.scale_low[:2], *MOMENTS)},
            ValueError,
            "codes .* are not of key_cache",
        ),
        ({"bounds": PageBounds(KEYS.bounds.values[:2])}, ValueError, "bounds .* are not of key_cache"),
        (
            {"bounds": PageBounds(KEYS.bounds.values.half())},
            TypeError,
            "bounds is torch.float16, expected",
        ),
        ({"bounds": PageBounds(KEYS.bounds.values, *MOMENTS)}, TypeError, "bounds of torch.float32 have no center"),
        (
            {"bounds": PageBounds(KEYS.bounds.values.to(torch.float8_e4m3fn))},
            TypeError,
            "bounds of torch.float8_e4m3fn need a center",
        ),
        ({"key": KEYS.key.clone().requires_grad_()}, ValueError, "key requires a gradient.*torch.no_grad"),
        ({"backend": "gluon"}, ValueError, "backend='gluon' cannot run this: appending has a plain Triton kernel only"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changed, error, named: str) -> None:
    with pytest.raises(error, match=named):
        append_tokens(**{**ARGUMENTS, **changed})
