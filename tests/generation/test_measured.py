"""What a step is measured to read and lose, and the keys that the oracles take, beside plain sums and searches."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from sparsetrain.generation.measured import MeasuredMemory, OracleMemory, WindowMemory
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.observed import observing
from sparsetrain.generation.settings import parse_decode

HEADS, KV_HEADS, WIDTH = 4, 2, 8
LENGTHS = (11, 7)
"""Tokens of the rows of a batch when a step is measured."""


def step(memory_class, section, lengths=LENGTHS, **options):
    """One step behind a prompt padded on the left: memory, query, and keys and values of each row."""
    generator = torch.Generator().manual_seed(0)
    rows, width = len(lengths), max(lengths)
    query = 2 * torch.randn(rows, HEADS, width, WIDTH, generator=generator)
    key, value = (torch.randn(rows, KV_HEADS, width, WIDTH, generator=generator) for _ in range(2))
    memory = make_memory(None, None, decode=parse_decode(section), listed=memory_class)
    past, new = slice(0, width - 1), slice(width - 1, width)
    starts = [width - length for length in lengths]
    with observing():
        for part, padding in ((past, starts), (new, None)):
            given = (tensor[:, :, part] for tensor in (query, key, value))
            out = memory.attend(torch.nn.Identity(), *given, starts=padding, scale=None, **options)
    pairs = [(key[row, :, start:].double(), value[row, :, start:].double()) for row, start in enumerate(starts)]
    return memory, out, query[:, :, -1].double(), pairs


def weights_of(query, keys):
    """True softmax weights of one row, ``[Hq, n]``."""
    repeated = keys.repeat_interleave(HEADS // KV_HEADS, dim=0)
    return ((repeated @ query[:, :, None])[..., 0] * WIDTH**-0.5).softmax(-1)


def output(weights, values, kept):
    """Attention to the kept keys of each KV head alone, ``[Hq, D]``."""
    outs = []
    for head, weight in enumerate(weights):
        places = sorted(kept[head // (HEADS // KV_HEADS)])
        part = weight[places] / weight[places].sum()
        outs.append(part @ values[head // (HEADS // KV_HEADS), places])
    return torch.stack(outs)


def smallest_set(weight, p, always):
    """The fewest keys that hold ``p``, by trying every set; of those as small the heaviest."""
    others = [place for place in range(len(weight)) if place not in always]
    for size in range(len(others) + 1):
        best = max(combinations(others, size), key=lambda places: float(weight[[*places, *always]].sum()))
        if weight[[*best, *always]].sum() >= p:
            return {*best, *always}
    raise AssertionError


def check(found, row, out, weights, values, kept):
    """Output and measurements of a row are those of the kept keys."""
    expected, whole = (output(weights, values, sets) for sets in (kept, [set(range(weights.shape[-1]))] * KV_HEADS))
    torch.testing.assert_close(out[row, :, 0].double(), expected, rtol=1e-4, atol=1e-4)
    lost = (expected - whole).norm(dim=-1) / whole.norm(dim=-1)
    torch.testing.assert_close(found.error[row].double(), lost, rtol=1e-3, atol=1e-5)
    mass = torch.stack([weights[head, sorted(kept[head // 2])].sum() for head in range(HEADS)])
    torch.testing.assert_close(found.mass[row].double(), mass, rtol=1e-4, atol=1e-5)
    assert found.keys[row] == pytest.approx(sum(map(len, kept)) / KV_HEADS)


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (1, 2)])
def test_the_oracle_of_a_weight_takes_the_smallest_set_of_all(p, sinks, recent):
    section = {"prune": {"p": p, "min_keys": 1}, "sinks": sinks, "recent": recent, "dense_layers": []}
    memory, out, query, pairs = step(OracleMemory, section)
    (found,) = memory.steps
    for row, (keys, values) in enumerate(pairs):
        weights, length = weights_of(query[row], keys), keys.shape[1]
        always = [*range(sinks), *range(length - recent, length)]
        sets = [smallest_set(weight, p, always) for weight in weights]
        # min_keys: one key at least beside those that are read in any case.
        for each, weight in zip(sets, weights, strict=True):
            if each == set(always):
                each.add(max(set(range(length)) - each, key=lambda place: float(weight[place])))
        check(found, row, out, weights, values, [sets[0] | sets[1], sets[2] | sets[3]])
        assert found.mass[row].min() >= p - 1e-5


@pytest.mark.parametrize("k", [1, 3, 6, 20])
def test_the_oracle_of_a_number_takes_the_heaviest_keys_of_a_group(k):
    section = {"refresh": {"every": 1, "keep": k}, "sinks": 0, "recent": 1, "dense_layers": []}
    memory, out, query, pairs = step(OracleMemory, section)
    for row, (keys, values) in enumerate(pairs):
        weights, last = weights_of(query[row], keys), keys.shape[1] - 1
        kept = []
        for pair in weights.unflatten(0, (KV_HEADS, -1)):
            heaviest = sorted(range(last), key=lambda place: -float(pair[:, place].max()))
            kept.append({last, *heaviest[:k]})
        check(memory.steps[0], row, out, weights, values, kept)


def test_a_window_reads_the_first_and_the_last():
    section = {"select": "quest", "candidates": 16, "sinks": 1, "recent": 3, "dense_layers": []}
    memory, out, query, pairs = step(WindowMemory, section)
    for row, (keys, values) in enumerate(pairs):
        kept = {0, *range(keys.shape[1] - 3, keys.shape[1])}
        check(memory.steps[0], row, out, weights_of(query[row], keys), values, [kept] * KV_HEADS)
        assert memory.steps[0].bytes[row] == KV_HEADS * len(kept) * 2 * WIDTH * 2


def test_a_learned_sink_is_no_key_whose_weight_is_read():
    section = {"select": "quest", "candidates": 16, "sinks": 1, "recent": 3, "dense_layers": []}
    plain, *_ = step(WindowMemory, section)
    sunk, *_ = step(WindowMemory, section, sink_logits=torch.tensor([-9.0, 0.0, 2.0, 5.0]))
    torch.testing.assert_close(sunk.steps[0].mass, plain.steps[0].mass, rtol=1e-3, atol=1e-4)


PAIR = 2 * WIDTH * 2
"""Bytes of a key and its value in bf16."""
CODE = WIDTH // 2 + 4
BOUNDS = 2 * WIDTH * 2 // 16


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"prune": {"p": 0.5, "min_keys": 1}}, lambda tokens: tokens * CODE),
        ({"refresh": {"every": 4, "keep": 9}}, lambda tokens: tokens * CODE),
        ({"select": "quest", "candidates": 64}, lambda tokens: tokens * BOUNDS),
        ({"select": "quest", "candidates": 64, "prune": {"p": 0.5}}, lambda tokens: tokens * BOUNDS + 64 * CODE),
    ],
    ids=["codes", "codes for several steps", "bounds", "bounds and codes of candidates"],
)
def test_bytes_count_what_a_choice_is_made_from(section, expected):
    lengths = (160, 96)
    memory, *_ = step(MeasuredMemory, {**section, "sinks": 1, "recent": 2, "dense_layers": []}, lengths)
    (found,) = memory.steps
    for row, length in enumerate(lengths):
        assert found.dense_bytes[row] == length * KV_HEADS * PAIR
        chosen = found.bytes[row] - found.keys[row] * KV_HEADS * PAIR
        assert chosen == KV_HEADS * expected(length)


def test_a_choice_that_is_used_again_costs_nothing():
    section = {"refresh": {"every": 3, "keep": 5}, "sinks": 1, "recent": 2, "dense_layers": []}
    memory, *_ = step(MeasuredMemory, section, (40,))
    token = torch.randn(1, KV_HEADS, 1, WIDTH)
    with observing():
        for _ in range(3):
            memory.attend(torch.nn.Identity(), torch.randn(1, HEADS, 1, WIDTH), token, token, starts=None, scale=None)
    chosen = [float(each.bytes - each.keys * KV_HEADS * PAIR) for each in memory.steps]
    assert chosen == [40 * KV_HEADS * CODE, 0, 0, 43 * KV_HEADS * CODE]
    assert [float(each.keys) for each in memory.steps] == [8, 9, 10, 8]


def test_reading_everything_loses_nothing():
    for memory_class in (MeasuredMemory, OracleMemory):
        memory, *_ = step(memory_class, {"prune": {"p": 1.0, "min_keys": 1}, "sinks": 0, "recent": 1})
        assert memory.steps[0].error.max() == 0
        assert memory.steps[0].keys.tolist() == list(LENGTHS)
