"""Selectors: what is passed on is what the full look would pass on where the cheaper look sees all that matters, and
nothing else of the keys is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_steps import small_llama
from transformers import DynamicCache

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.generation.candidates import Always, Tokens
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.settings import parse_decode

CHANNELS = {"select": "channels", "channels": 4, "sinks": 1, "recent": 4, "dense_layers": []}


def make(decode: dict[str, Any], **shape):
    return small_llama(decode=decode, num_hidden_layers=2, **shape)


def filled(decode: dict[str, Any], key: torch.Tensor, lengths: tuple[int, ...] | None = None):
    """A memory that has read these keys ``[B, Hkv, N, D]``, padded on the left."""
    memory: Any = make_memory(None, None, decode=parse_decode(decode))
    starts = None if lengths is None else [key.shape[2] - length for length in lengths]
    query = torch.zeros(len(key), 4, *key.shape[2:])
    memory.attend(torch.nn.Identity(), query, key, key, starts=starts)
    return memory


def keys_of_few_channels(batch: int = 2, tokens: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that differ in four channels of each KV head alone, and differ elsewhere by nothing but a large mean."""
    generator = torch.Generator().manual_seed(0)
    heavy = torch.tensor([[1, 5, 6, 14], [0, 2, 9, 15]])
    key = 100 * torch.randn(batch, 2, 1, 16, generator=generator).expand(-1, -1, tokens, -1).clone()
    key += torch.zeros_like(key).scatter_(
        3, heavy[None, :, None].expand(batch, -1, tokens, -1), torch.randn(batch, 2, tokens, 4, generator=generator)
    )
    return key, heavy


def test_channels_are_those_in_which_keys_differ_and_find_the_largest_logits():
    key, heavy = keys_of_few_channels()
    memory = filled({**CHANNELS, "candidates": 16}, key, (80, 50))
    channels = memory._selector.held()[0]
    assert torch.equal(channels, heavy.expand(2, -1, -1))
    # One query of a group asks for nothing, so that the other alone decides.
    query = torch.zeros(2, 4, 1, 16)
    query[:, ::2] = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    lists, counts = memory._lists(query, {})
    assert counts.tolist() == [[16, 16], [16, 16]]
    for row, length in enumerate((80, 50)):
        for head in range(2):
            logits = key[row, head, 80 - length :] @ query[row, 2 * head, 0]
            best = logits[1 : length - 4].topk(12).indices + 1
            # Labels have 4 bits, so that the last few may differ.
            assert set(best.tolist()) <= set(lists[row, head].tolist())


@pytest.mark.parametrize("select", [{"select": "channels", "channels": 4}, {"select": "quest"}], ids=str)
def test_candidates_may_be_a_share_of_the_longest_prompt(select):
    key, _ = keys_of_few_channels(tokens=320)
    decode = {**CHANNELS, **select, "recent": 1, "sinks": 0}
    decode = {name: value for name, value in decode.items() if name != "channels" or select["select"] == "channels"}
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    for share, tokens in ((0.1, 32), (0.25, 80), (0.001, 16)):
        some, as_many = (filled({**decode, "candidates": each}, key, (320, 90)) for each in (share, tokens))
        for got, want in zip(some._lists(query, {}), as_many._lists(query, {}), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("prune", [None, {"p": 0.6}], ids=["read", "pruned"])
def test_pages_are_not_ranked_where_there_is_room_for_all(prune, monkeypatch):
    key, _ = keys_of_few_channels(tokens=320)
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    decode = {"select": "quest", "prune": prune, "sinks": 1, "recent": 4, "dense_layers": []}
    ranked = filled({**decode, "candidates": 320}, key, (320, 90))
    assert ranked._room() > 320
    lists, counts = ranked._lists(query, {})

    def page_scores(*_: Any, **__: Any) -> None:
        raise AssertionError("pages are ranked")

    monkeypatch.setattr("sparsetrain.generation.selectors.page_scores", page_scores)
    found = filled(decode, key, (320, 90))._lists(query, {})
    assert torch.equal(found[1], counts)
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        listed = slice(int(counts[row, head]))
        assert torch.equal(found[0][row, head, listed], lists[row, head, listed])
    if prune is None:
        assert counts.tolist() == [[315, 315], [85, 85]]


def test_labels_have_four_bits_of_the_channels_alone():
    key, _ = keys_of_few_channels()
    memory = filled({**CHANNELS, "candidates": 16}, key)
    pages, heads, page, _ = memory.keys.shape
    beside = {name: tensor.nbytes for name, tensor in memory.beside.items()}
    assert beside == {"label_codes": pages * heads * page * 2, "label_scale_low": pages * heads * page * 4}
    assert memory.nbytes() >= 2 * memory.keys.nbytes + sum(beside.values())


@pytest.mark.parametrize("prune", [None, {"p": 0.6, "min_keys": 1}], ids=["read", "pruned"])
@pytest.mark.parametrize("select", [{"select": "channels", "channels": 4}, {"select": "quest"}], ids=str)
def test_keys_that_are_not_passed_on_are_not_read(select, prune):
    """What a step reads is known from the same step before, which is taken back; every other key and value is then no
    number."""
    section = {**CHANNELS, **select, "candidates": 16, "prune": prune}
    section = {name: value for name, value in section.items() if name != "channels" or select["select"] == "channels"}
    model, ids = make(section), torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        lists: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in cache.layers:
            choose = layer.memory._lists
            layer.memory._lists = lambda *given, choose=choose: lists.append(choose(*given)) or lists[-1]
        want = model(ids[:, -1:], past_key_values=cache).logits
        cache.crop(-1)
        for layer, (positions, counts) in zip(cache.layers, tuple(lists), strict=True):
            memory = layer.memory
            read = torch.zeros(2, 256 * memory.table.shape[1], dtype=torch.bool)
            read[:, :1] = read[:, 90 - 4 :] = True
            for head in range(2):
                read[head, positions[0, head, : counts[0, head]].long()] = True
            assert not read.all()
            unread = ~read.unflatten(1, (-1, 256))
            for held in (memory.keys, memory.values):
                held[memory.table[0].long()] = held[memory.table[0].long()].masked_fill(
                    unread.transpose(0, 1)[..., None], float("nan")
                )
        got = model(ids[:, -1:], past_key_values=cache).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("select", [{"select": "channels", "channels": 4}, {"select": "quest"}], ids=str)
def test_rows_take_what_is_kept_beside_their_keys_along(select):
    """To other places, more often than before, and again after a reset, in the same tensors and in new ones."""
    key, _ = keys_of_few_channels(3)
    decode = {**CHANNELS, **select, "candidates": 16, "prune": {"p": 0.5, "min_keys": 1}}
    decode = {name: value for name, value in decode.items() if name != "channels" or select["select"] == "channels"}
    memory, query = filled(decode, key, (80, 50, 61)), torch.randn(3, 4, 1, 16)
    lists, counts = memory._lists(query, {})
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([1, 1, 2, 0])):
        memory.select_rows(rows)
        query, lists, counts = query[rows], lists[rows], counts[rows]
        found, same = memory._lists(query, {})
        assert torch.equal(same, counts)
        listed = torch.arange(lists.shape[-1]) < counts[..., None]
        assert torch.equal(found.where(listed, -1), lists.where(listed, -1))
    memory.reset()
    other = torch.randn(4, 2, 60, 16, generator=torch.Generator().manual_seed(4))
    memory.attend(torch.nn.Identity(), torch.zeros(4, 4, 60, 16), other, other, starts=None)
    fresh = filled(decode, other)
    for got, want in zip(memory._lists(query, {}), fresh._lists(query, {}), strict=True):
        assert got.shape == want.shape
    assert torch.equal(memory._lists(query, {})[1], fresh._lists(query, {})[1])


def test_guesses_are_taken_back_where_the_longest_prompt_has_gone():
    """Codes stay centred by the prompt of the row that is left, as if nothing had been guessed."""
    model = make({"prune": {"p": 0.5, "min_keys": 1}, "dense_layers": []})
    ids, mask = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(0)), torch.ones(2, 90).long()
    mask[1, :50] = 0
    found = []
    for guesses in (0, 3):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            if guesses:
                model(ids[1:, -guesses:], past_key_values=cache)
                cache.crop(-guesses)
            found.append(model(ids[1:, -1:], past_key_values=cache).logits)
        found.append(torch.stack([layer.memory._center for layer in cache.layers]))
    torch.testing.assert_close(found[:2], found[2:], rtol=0, atol=0)


def test_short_rows_have_no_token_twice():
    """Fewer tokens than are read in any case, none of which is a candidate."""
    always = Always(torch.tensor([3, 1, 9], dtype=torch.int32), 2, 4)
    lists = torch.tensor([[[7, 7]], [[7, 7]], [[2, 4]]], dtype=torch.int32)
    tokens = Tokens(lists, torch.tensor([[0], [0], [2]], dtype=torch.int32), always)
    columns = tokens.scored()["page_lists"]
    assert columns.shape[2] % 16 == 0
    assert [sorted(row[row >= 0].tolist()) for row in columns[:, 0]] == [[0, 1, 2], [0], [0, 1, 2, 4, 5, 6, 7, 8]]


def test_calibrated_channels_are_used():
    key, _ = keys_of_few_channels()
    own = [[0, 1, 2, 3], [4, 5, 6, 7]]
    memory = filled({**CHANNELS, "candidates": 16, "heavy_channels": {0: own}}, key)
    assert torch.equal(memory._selector.held()[0], torch.tensor(own).expand(2, -1, -1))


def test_a_record_brings_calibrated_channels_back(tmp_path):
    own = {layer: [[0, 1, 2, 3], [4, 5, 6, 7]] for layer in range(2)}
    model = make({**CHANNELS, "candidates": 16, "heavy_channels": own})
    sparsetrain.save(model, tmp_path / "saved")
    loaded = sparsetrain.load(tmp_path / "saved").eval()
    assert loaded.config.sparsetrain["decode"]["heavy_channels"] == {str(layer): each for layer, each in own.items()}
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(2))
    arguments = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **arguments), model.generate(ids, **arguments))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channels": 64}, "decode.channels=64: the keys of layer 0 have 16; lower it"),
        ({"heavy_channels": {0: [[0, 1, 2, 3]], 1: [[0, 1, 2, 3]]}}, "names 1 KV heads in layer 0.*has 2 KV heads"),
        ({"heavy_channels": dict.fromkeys((0, 1), [[0, 1, 2, 99]] * 2)}, "channels up to 99.* of 16 channels"),
        ({"heavy_channels": {1: [[0, 1, 2, 3]] * 2}}, "names layers 1, and the layers that read fewer keys are 0, 1"),
        ({"heavy_channels": {0: [], 1: []}}, "heavy_channels of layer 0 names no KV head; give 4 channels of each"),
        ({"heavy_channels": {0: [[0, 1, 2]] * 2}}, "layer 0, KV head 0 must be 4 different channels"),
        ({"candidates": 15}, "candidates=15 must be a whole number of 16 tokens or more, or a share below 1"),
        ({"candidates": 20.5}, "candidates=20.5 must be"),
        ({"candidates": 0}, "decode.candidates: .*greater than 0"),
        ({"channels": 3}, "decode.channels: .*multiple of 2"),
        ({"select": "quest"}, "channels=4 is for select=channels"),
    ],
)
def test_channels_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ModelError, match=message):
        make({**CHANNELS, **changed}).generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=2)
