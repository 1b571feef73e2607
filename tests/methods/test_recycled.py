"""Recycled attention is a masked softmax over what its definition lists, in any rows, and refuses what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from largest_allocation import on_cpu
from sparsetrain_kernels.dense import row_reference
from sparsetrain_kernels.key_choice import reference as choice_reference
from sparsetrain_kernels.listed_keys import gathered
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import PassDocuments
from sparsetrain.methods.recycled import oracle
from sparsetrain.methods.recycled.segments import drawn_segments, make_segments
from sparsetrain.methods.registry import parse_attention

BOUNDS, PROMPTS, EVERY = [0, 40, 41, 101, 110], [13, 0, 1, 9], [6, 4, 9, 3]
SETTINGS: dict[str, dict[str, Any]] = {
    "top-k": {"keep": 5, "sinks": 1, "recent": 2},
    "top-k that compete with all": {"keep": 5, "sinks": 0, "recent": 0},
    "top-p": {"keep": 64, "p": 0.4, "sinks": 0, "recent": 1},
    "top-p without room": {"keep": 4, "p": 0.9, "sinks": 2, "recent": 3},
    "by similarity": {"keep": 5, "sinks": 1, "recent": 2, "similarity": 0.1},
}


def built(**settings):
    return parse_attention({"method": "recycled", "every": 6, **settings}).build(2)


def tensors(rows: int = 110, heads: int = 4, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((1, heads, rows, 8), (1, 2, rows, 8), (1, 2, rows, 8))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attend(method, query, key, value, segments, cu_seqlens=None, training: bool = True) -> Tensor:
    layer = nn.Module().train(training)
    layer.layer_idx = 3
    options = {"cu_seqlens": cu_seqlens, "q_start": None, "scale": 0.7, "softcap": None, "sink_logits": None}
    return method.attend(layer, query, key, value, segments=segments, **options)


def chosen(query: Tensor, key: Tensor, keep: int, p: float | None, sinks: int, recent: int) -> Tensor:
    """bool ``[Hkv, n]``: the keys that the last row chooses, by the definition; weights are compared in fp16."""
    length = key.shape[1]
    logits = query.unflatten(0, (len(key), -1)) @ key.mT * 0.7
    weights = (logits - logits.logsumexp(-1, keepdim=True)).half()
    place = torch.arange(length)
    free = (place >= sinks) & (place < length - recent)
    if p is None:
        rank = torch.nn.functional.max_pool1d(weights.amax(1).float(), 7, 1, 3).masked_fill(~free, float("-inf"))
        competes = free.expand(len(key), -1)
    else:
        competes = torch.zeros(len(key), length, dtype=torch.bool)
        mass = weights.double().exp()
        for head, group in enumerate(mass):
            for row in group:
                least = None
                missing, order = p - float(row[~free].sum()), row.masked_fill(~free, -1).argsort(descending=True)
                for index in order[: int(free.sum())].tolist():
                    if missing <= 0 and row[index] != least:
                        break
                    competes[head, index], least = True, row[index]
                    missing -= float(row[index])
        rank = weights.masked_fill(~competes[:, None], float("-inf")).amax(1).float()
    mask = torch.zeros_like(competes)
    for head in range(len(key)):
        # The newest of equal ones, and where p decides none of those that do not all fit.
        order = sorted(competes[head].nonzero()[:, 0].tolist(), key=lambda j: (-float(rank[head, j]), -j))
        if p is not None and len(order) > keep:
            edge = float(rank[head, order[keep]])
            order = [j for j in order if float(rank[head, j]) > edge]
        mask[head, order[:keep]] = True
    return mask


def expected_mask(query, key, segments_of, keep, sinks, recent, p=None, similarity=None) -> Tensor:
    """bool ``[Hkv, N, N]``: the keys of each row, document by document."""
    bounds, prompts, every = segments_of
    heads, rows = key.shape[1], key.shape[2]
    mask = torch.zeros(heads, rows, rows, dtype=torch.bool)
    for first, end, prompt, size in zip(bounds[:-1], bounds[1:], prompts, every, strict=True):
        q, k = query[0, :, first:end].detach(), key[0, :, first:end].detach()
        own = torch.zeros(heads, end - first, end - first, dtype=torch.bool)
        start, last = None, None
        for row in range(end - first):
            begin = max(prompt - 1, 0)
            check = row >= begin and (row - begin) % size == 0
            if check and last is not None and similarity is not None:
                check = float(torch.cosine_similarity(q[:, row].mean(0), last, dim=0)) <= similarity
            if row <= begin or check:
                own[:, row, : row + 1] = True
            if check:
                start, last = row, q[:, row].mean(0)
                listed = chosen(q[:, row], k[:, : row + 1], keep, p, sinks, recent)
            elif row > begin:
                own[:, row, : start + 1] = listed
                own[:, row, :sinks] = True
                own[:, row, max(start + 1 - recent, 0) : row + 1] = True
                own[:, row, row + 1 :] = False
        mask[:, first:end, first:end] = own
    return mask


def masked(query, key, value, mask):
    logits = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].mT * 0.7
    weights = logits.masked_fill(~mask[None, :, None], float("-inf")).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("heads", [2, 4])
def test_output_and_gradients_are_those_of_the_masked_definition(settings, heads):
    query, key, value = tensors(heads=heads)
    segments = make_segments(BOUNDS, PROMPTS, EVERY)
    out = attend(built(**settings), query, key, value, segments, torch.tensor(BOUNDS).int())
    mask = expected_mask(query, key, (BOUNDS, PROMPTS, EVERY), **settings)
    want = masked(query, key, value, mask)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)
    for mine, right in zip(found, torch.autograd.grad(want, (query, key, value), grad), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)
    again = attend(built(**settings), query, key, value, segments, torch.tensor(BOUNDS).int())
    assert torch.equal(again, out)
    assert all(map(torch.equal, found, torch.autograd.grad(again, (query, key, value), grad)))


@pytest.mark.parametrize(
    ("settings", "prompt", "every"),
    [({"keep": 200}, 7, 5), ({"keep": 1, "sinks": 0, "recent": 0}, 0, 1), ({"keep": 1, "sinks": 0}, 60, 5)],
    ids=["all keys are kept", "every token chooses", "all is a prompt"],
)
def test_where_nothing_is_left_out_it_is_causal_attention(settings, prompt, every):
    query, key, value = tensors(60)
    out = attend(built(**settings), query, key, value, make_segments([0, 60], [prompt], [every]))
    want = masked(query, key, value, torch.ones(2, 60, 60, dtype=torch.bool).tril())
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_a_packed_document_is_computed_as_alone():
    query, key, value = (tensor.detach() for tensor in tensors())
    method = built(**SETTINGS["top-k"])
    packed = attend(method, query, key, value, make_segments(BOUNDS, PROMPTS, EVERY), torch.tensor(BOUNDS).int())
    for first, end, prompt, every in zip(BOUNDS[:-1], BOUNDS[1:], PROMPTS, EVERY, strict=True):
        part = (tensor[:, :, first:end] for tensor in (query, key, value))
        alone = attend(method, *part, make_segments([0, end - first], [prompt], [every]))
        assert torch.equal(alone, packed[:, :, first:end])


def test_the_prompt_does_not_know_what_follows():
    query, key, value = (tensor.detach() for tensor in tensors(60))
    method, segments = built(**SETTINGS["top-k"]), make_segments([0, 60], [30], [6])
    before = attend(method, query, key, value, segments)
    for tensor in (query, key, value):
        tensor[:, :, 30:] = 5.0
    assert torch.equal(attend(method, query, key, value, segments)[:, :, :30], before[:, :, :30])


def test_rows_without_a_plan_have_no_prompt_and_the_fixed_length():
    query, key, value = (tensor.detach() for tensor in tensors())
    method = built(every=[3, 5, 12], keep=5)
    cu_seqlens = torch.tensor(BOUNDS).int()
    planned = attend(method, query, key, value, make_segments(BOUNDS, [0] * 4, [5] * 4), cu_seqlens)
    assert torch.equal(attend(method, query, key, value, None, cu_seqlens), planned)
    rows = (tensor[:, :, :50].repeat(2, 1, 1, 1) for tensor in (query, key, value))
    alone = attend(method, *(tensor[:, :, :50] for tensor in (query, key, value)), None)
    assert torch.equal(attend(method, *rows, None), alone.repeat(2, 1, 1, 1))


def test_segments_are_drawn_by_seed_step_and_name():
    def draw(seed, step, names=("a", "b", "c"), text_prefix="none"):
        documents = PassDocuments([0, 100, 300, 700], [50, 1, 1], names, seed, step)
        return drawn_segments(documents, (8, 16, 32), text_prefix=text_prefix, fixed=16)

    def lengths(segments):
        return [int(segments.starts[segments.documents == first].diff()[0]) for first in (0, 100, 300)]

    assert torch.equal(draw(1, 2).starts, draw(1, 2).starts)
    assert {length for step in range(20) for length in lengths(draw(1, step))} == {8, 16, 32}
    assert [lengths(draw(1, step)) for step in range(9)] != [lengths(draw(2, step)) for step in range(9)]
    # A document's own draw is the same in any row.
    assert lengths(draw(1, 5))[1:] == lengths(draw(1, 5, ("z", "b", "c")))[1:]
    # The row before the first target chooses; what has no prompt begins at once, or somewhere.
    assert draw(1, 2).starts[draw(1, 2).documents == 0][0] == 49
    assert draw(1, 2).starts[draw(1, 2).documents == 300][0] == 300
    begins = {int(draw(1, step, text_prefix="uniform").prompts.numel()) for step in range(8)}
    assert len(begins) > 4
    # In evaluation nothing is drawn.
    assert lengths(draw(None, 0, text_prefix="uniform")) == [16, 16, 16]


def test_padding_at_the_end_is_a_prompt():
    documents = PassDocuments([0, 20, 23], [5, 3], ["a"], 0, 0)
    segments = drawn_segments(documents, (4,), text_prefix="uniform", fixed=4)
    assert segments.starts[segments.documents == 20].tolist() == [22]


def test_the_oracle_refuses_other_choices(monkeypatch):
    query, key, value = (tensor.detach() for tensor in tensors(60))
    method, options = built(keep=5, recent=2), {"scale": 0.7, "cu_seqlens": torch.tensor([0, 60]).int()}
    call = {"segments": make_segments([0, 60], [4], [6]), "document": slice(0, 60), **options}
    rows, right = method.expected(None, query, key, value, **call)
    out = attend(method, query, key, value, call["segments"], options["cu_seqlens"])
    torch.testing.assert_close(out[:, :, rows], right, rtol=0, atol=1e-12)
    choose = oracle.choose

    def others(*args):
        lists, counts = choose(*args)
        return (lists - 1).clamp_min(0), counts

    monkeypatch.setattr(oracle, "choose", others)
    with pytest.raises(ModelError, match="chose other keys"):
        method.expected(None, query, key, value, **call)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_the_oracle_knows_that_equal_keys_may_not_fit(spread):
    """Of equal keys that do not all fit a top-p has none: a list is then shorter than it may be."""
    query, key, value = (tensor.detach() for tensor in tensors(60))
    method, options = built(keep=8, p=0.8, sinks=1, recent=0), {"scale": 0.7, "cu_seqlens": torch.tensor([0, 60]).int()}
    call = {"segments": make_segments([0, 60], [4], [6]), "document": slice(0, 60), **options}
    out = attend(method, query * spread, key, value, call["segments"], options["cu_seqlens"])
    rows, right = method.expected(None, query * spread, key, value, **call)
    torch.testing.assert_close(out[:, :, rows], right, rtol=0, atol=1e-12)


def test_the_oracle_refuses_a_top_p_with_too_little_weight(monkeypatch):
    query, key, value = (tensor.detach() for tensor in tensors(60))
    method = built(keep=60, p=0.8, sinks=0, recent=0)
    call = {"segments": make_segments([0, 60], [4], [6]), "document": slice(0, 60), "scale": 0.7}
    method.expected(None, query, key, value, **call)
    choose = oracle.choose

    def fewer(*args):
        lists, counts = choose(*args)
        return lists, counts - (counts > 3).int()

    monkeypatch.setattr(oracle, "choose", fewer)
    with pytest.raises(ModelError, match="chose other keys"):
        method.expected(None, query, key, value, **call)


def test_the_weight_that_is_read_is_told_by_layer_and_age():
    query, key, value = (tensor.detach() for tensor in tensors(110))
    method = built(**SETTINGS["top-k"])
    assert method.observations() == {}
    method.observing = True
    segments = make_segments(BOUNDS, PROMPTS, EVERY)
    attend(method, query, key, value, segments, torch.tensor(BOUNDS).int())
    found = method.observations()
    ages = {f"recycled/kept_mass/age_{age:04}" for age in (1, 2, 4)}
    assert found.keys() == {"recycled/kept_mass/layer_03", *ages}
    assert all(0.1 < share < 1 for share in found.values())
    assert method.observations() == {}
    method = built(keep=200)
    method.observing = True
    attend(method, query, key, value, segments, torch.tensor(BOUNDS).int())
    assert method.observations()["recycled/kept_mass/layer_03"] == pytest.approx(1)


@pytest.mark.parametrize("p", [None, 0.5])
def test_there_is_no_tensor_of_starts_by_keys(p, monkeypatch):
    for module in (choice_reference, row_reference, gathered):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2**16)
    length, every = 2048, 2
    query, key, value = tensors(length)
    method = built(every=every, keep=8, p=p)

    def run() -> None:
        attend(method, query, key, value, None).sum().backward()

    # One number a byte at least.
    assert query.numel() * 8 <= on_cpu(run) < length * (length // every)


def test_the_density_counts_pairs():
    method = built(every=6, keep=5, sinks=0, recent=0)
    query, key, _ = tensors(90)
    mask = expected_mask(query, key, ([0, 90], [0], [6]), keep=5, sinks=0, recent=0)
    assert method.density(90) == pytest.approx(float(mask.sum()) / 2 / (90 * 91 / 2))
    assert parse_attention({"method": "recycled", "every": 16, "keep": 1024}).build().density(32768) < 0.13


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every"),
        ({"every": []}, "every"),
        ({"every": [8, 16, 8]}, r"every=\[8, 16, 8\] lists 8 twice"),
        ({"every": [8, -1]}, "every"),
        ({"keep": 0}, "keep=0: .*greater than 0"),
        ({"p": 1.5}, "p=1.5: .*less than or equal to 1"),
        ({"similarity": 2}, "similarity=2"),
        ({"text_prefix": "some"}, "text_prefix"),
        ({"pooling": "mean"}, "there is no 'pooling'"),
        ({"block": 256}, "there is no 'block'"),
        ({"topk": 64}, "there is no 'topk'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        parse_attention({"method": "recycled", **settings})


def test_calls_that_it_would_ignore_a_part_of_are_refused():
    query, key, value = (tensor.detach() for tensor in tensors(20))
    layer, options = nn.Module(), {"cu_seqlens": None, "scale": None}
    for name, given in (("softcap", 30.0), ("sink_logits", torch.zeros(4))):
        with pytest.raises(ModelError, match=f"does not support {name}"):
            built().attend(layer, query, key, value, **options, **{name: given})
    with pytest.raises(ModelError, match="cache of 20 keys for 10 queries"):
        built().attend(layer, query[:, :, :10], key, value, **options)
