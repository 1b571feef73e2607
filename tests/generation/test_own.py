"""``decode.select: own``: Twilight among the keys that a block pattern or SparseK reads in any case."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from decode_steps import logits as steps
from decode_steps import prompts, small_llama
from transformers import CompileConfig, DynamicCache

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.generation.listed import ListedMemory
from sparsetrain.generation.observed import observing
from sparsetrain.generation.settings import parse_decode
from sparsetrain.inference.calibrate import calibrate

PATTERNS: dict[str, dict[str, Any]] = {
    "power": {"method": "power", "block": 16, "window": 2, "sinks": 1},
    "stride": {"method": "stride", "block": 16, "window": 1, "sinks": 0, "stride": 3},
    "dilated": {"method": "dilated", "block": 16, "window": 3, "dilation": 2},
    "longnet": {"method": "longnet", "block": 16, "segments": [[2, 1], [4, 2]]},
    "longnet, heads apart": {"method": "longnet", "block": 16, "segments": [[2, 1], [8, 2]], "head_shift": True},
}
SPARSEK = {gate: {"method": "sparsek", "topk": 12, "window": 8, "sinks": 2, "gate": gate} for gate in ("value", "log")}
METHODS = PATTERNS | {f"sparsek, {gate}": method for gate, method in SPARSEK.items()}
OWN = {"select": "own", "sinks": 2, "recent": 20, "dense_layers": [0]}
FEW = {**OWN, "recent": 3, "prune": {"p": 0.5, "min_keys": 1}}
EVERYTHING = {**OWN, "prune": {"p": 1.0}}
SEVERAL = ["stride", "longnet, heads apart", "sparsek, value", "sparsek, log"]
"""One list for all heads and one for each, and both gates."""


logits = partial(steps, count=24)
"""Over block boundaries."""


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_all_weight_is_the_method(method):
    """Over block boundaries, past the first pages of a ring, in rows that differ in length."""
    ids, mask = prompts(90, 33, 7)
    want, tokens, _ = logits(small_llama(method), ids, mask)
    got, same, _ = logits(small_llama(method, EVERYTHING), ids, mask)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["power", "longnet, heads apart"])
def test_lists_grow_with_the_text(name):
    ids, mask = prompts(100)
    want, _, _ = logits(small_llama(PATTERNS[name]), ids, mask, count=50)
    got, _, _ = logits(small_llama(PATTERNS[name], EVERYTHING), ids, mask, count=50)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_cache_is_used_again():
    model = small_llama(PATTERNS["longnet, heads apart"], FEW)
    cache = sparsetrain.SparseCache(model, max_length=130)
    logits(model, *prompts(90, 33), past_key_values=cache)
    cache.reset()
    ids, mask = prompts(50, 70)
    got, _, _ = logits(model, ids, mask, past_key_values=cache)
    torch.testing.assert_close(got, logits(model, ids, mask)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stride", "longnet, heads apart"])
def test_less_weight_reads_fewer_keys_of_the_pattern(name):
    method = PATTERNS[name]
    ids, mask = prompts(90)
    want, _, _ = logits(small_llama(method), ids, mask)
    with observing():
        got, _, cache = logits(small_llama(method, FEW), ids, mask)
    assert not torch.allclose(got[:, 1:], want[:, 1:], atol=1e-2)
    torch.testing.assert_close(got[:, 0], want[:, 0])
    memories = [layer.memory for layer in cache.layers]
    assert [isinstance(memory, ListedMemory) for memory in memories] == [False, True, True]
    seen = memories[1].observations()
    assert 0.02 < seen["kept"] < 0.9
    assert seen["dropped"] == 0
    assert 0.4 < seen["mass_min"] <= seen["mass_mean"] < 1.0001
    with observing():
        _, _, cache = logits(small_llama(method, EVERYTHING), ids, mask)
    assert cache.layers[1].memory.observations()["kept"] == 1.0


@pytest.mark.parametrize("name", SEVERAL)
def test_rows_of_a_batch_are_as_alone(name):
    model = small_llama(METHODS[name], FEW)
    ids, mask = prompts(90, 40)
    together, _, _ = logits(model, ids, mask, count=12)
    for row, length in enumerate((90, 40)):
        alone, _, _ = logits(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:], count=12)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SEVERAL)
def test_guesses_change_nothing(name):
    """Right ones and wrong ones, over block boundaries."""
    model = small_llama(METHODS[name], FEW, initializer_range=0.1)
    ids = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(1, 5)
    mask = torch.ones_like(ids)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    new, wrong = ids[:, 20:44], ids[:, :10]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        want = torch.cat([model(token, past_key_values=caches[0]).logits for token in new.split(1, dim=1)], dim=1)
        caches[1].activate_past_recording()
        got = model(torch.cat([new[:, :4], wrong], 1), past_key_values=caches[1]).logits[:, :4]
        caches[1].crop(-10)
        got = torch.cat([got, model(new[:, 4:12], past_key_values=caches[1]).logits], dim=1)
        caches[1].crop(-8)
        got = torch.cat([got[:, :4], model(new[:, 4:], past_key_values=caches[1]).logits], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=22, do_sample=False)
    guessed = model.generate(ids, attention_mask=mask, max_new_tokens=22, do_sample=False, prompt_lookup_num_tokens=5)
    assert torch.equal(greedy, guessed)


@pytest.mark.parametrize("name", ["longnet, heads apart", "sparsek, value"])
def test_steps_compile_to_one_graph(name):
    """In room that is made once, where pages that no step reads are not kept."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    model = small_llama(METHODS[name], {**FEW, "dense_layers": []}, num_hidden_layers=1)
    ids, mask = prompts(90, 33)
    want, _, _ = logits(model, ids, mask, count=12)
    cache = sparsetrain.SparseCache(model, max_length=110)
    got, _, _ = logits(model, ids, mask, count=12, past_key_values=cache, compile_config=config)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", PATTERNS)
def test_pages_that_the_pattern_does_not_list_are_not_read(name):
    """Whatever they hold: in a ring they hold other tokens, here nothing that is a number."""
    model = small_llama(PATTERNS[name], FEW)
    ids, _ = prompts(90)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        want = model(ids[:, -1:], past_key_values=cache).logits
        cache.crop(-1)
        spoiled = 0
        for layer in cache.layers[1:]:
            memory, pattern = layer.memory, layer.memory.pattern
            listed = {block for head in range(2) for block in pattern.key_blocks(89 // 16, head)}
            read = {int(memory.table[0, block]) for block in listed}
            unread = [page for page in range(len(memory.keys)) if page not in read]
            spoiled += len(unread)
            for held in (memory.keys, memory.values, memory.beside["scale_low"]):
                held[unread] = float("nan")
        got = model(ids[:, -1:], past_key_values=cache).logits
    assert spoiled > 0
    assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "chunk"), [("power", 40), ("dilated", 16)])
def test_chunked_prompts_and_turns_attend_by_the_method(name, chunk):
    ids, mask = prompts(90, 60)
    want, _, _ = logits(small_llama(PATTERNS[name]), ids, mask, count=8, prefill_chunk_size=chunk)
    got, _, cache = logits(small_llama(PATTERNS[name], EVERYTHING), ids, mask, count=8, prefill_chunk_size=chunk)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert cache.layers[1].memory.nbytes() > 0


def test_beams_take_their_codes_along():
    model = small_llama(PATTERNS["dilated"], EVERYTHING)
    ids, mask = prompts(60, 21)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), small_llama(PATTERNS["dilated"]).generate(ids, **arguments))


def test_what_is_read_of_sparseks_slots_is_counted():
    ids, mask = prompts(90)
    with observing():
        _, _, cache = logits(small_llama(SPARSEK["value"], FEW), ids, mask)
    seen = [layer.memory.observations() for layer in cache.layers]
    assert seen[0] == {}
    assert 0.2 < seen[1]["kept"] < 0.95
    assert 0.4 < seen[1]["mass_min"] <= seen[1]["mass_mean"] < 1.0001


def test_a_record_brings_it_back(tmp_path):
    model = small_llama(PATTERNS["power"], FEW)
    sparsetrain.save(model, tmp_path / "saved")
    loaded = sparsetrain.load(tmp_path / "saved").eval()
    assert loaded.config.sparsetrain["decode"]["select"] == "own"
    ids, mask = prompts(70)
    assert torch.equal(logits(loaded, ids, mask)[0], logits(model, ids, mask)[0])


def test_sparsek_is_told_to_be_for_measurement(caplog):
    with caplog.at_level(logging.WARNING):
        small_llama(SPARSEK["value"], FEW)
    assert "for measurement" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        small_llama(PATTERNS["power"], FEW)
    assert not caplog.text


@pytest.mark.parametrize(
    ("method", "decode", "message"),
    [
        ({"method": "power", "block": 8, "window": 2}, FEW, "blocks of 8 tokens, and keys are chosen in pages of 16"),
        (PATTERNS["power"], OWN, "decode: select=own reads what the method reads.*give prune"),
        (PATTERNS["power"], {**FEW, "candidates": 64}, "candidates=64 is for select=quest or channels"),
        ({"method": "full"}, FEW, "decode.select=own does not go with full attention"),
        ({"method": "sliding", "block": 16, "window": 2}, FEW, "decode.select=own does not go with a sliding window"),
        (PATTERNS["power"], {"prune": {"p": 0.9}}, "decode.select=full does not go with a block pattern.*select=own"),
        (PATTERNS["power"], {**FEW, "refresh": {"every": 2}}, "decode.refresh does not go with a block pattern"),
        (PATTERNS["power"], {**FEW, "dense_layers": [0, 1, 2]}, "leaves no layer to read fewer keys in.*0, 1, 2"),
    ],
)
def test_what_cannot_be_done_is_refused(method, decode, message):
    with pytest.raises(ModelError, match=message):
        small_llama(method, decode)


def test_what_lies_on_the_host_is_not_pruned():
    model = small_llama(PATTERNS["power"], FEW)
    with pytest.raises(ModelError, match=r"decode.select=own\) keep them on the device"):
        sparsetrain.SparseCache(model, max_length=100, offload=True)


def test_own_keys_are_not_calibrated():
    with pytest.raises(ModelError, match="select=own is not measured"):
        calibrate(small_llama(PATTERNS["power"]), [[1] * 200], parse_decode(FEW), error=0.1)
