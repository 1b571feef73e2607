"""Budgets and host memory of a SparseCache: what they hold gives what passes without a cache give, or is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import FULL, LEARNED, PATTERN, RECYCLED, WINDOW
from sparsetrain.generation.limits import KINDS, REASONS
from sparsetrain.generation.offloaded import OffloadedMemory
from sparsetrain.modeling import sparsify
from sparsetrain.patterns import PowerPattern

from .test_generation_modes import GREEDY, METHODS, assert_every_mode, assert_greedy, left_padded
from .test_sparse_cache import compiled, graphs, pages_alive

NEW = GREEDY["max_new_tokens"]
MODELS = [
    *(("llama", name) for name in ("stride", "longnet")),
    ("gemma3_text", "power"),
]
SPARSEK = {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2}
LAYERS = {
    FULL: METHODS["full"],
    RECYCLED: {"method": "recycled", "every": 4, "keep": 8},
    WINDOW: METHODS["sliding"],
    PATTERN: METHODS["power"],
    LEARNED: SPARSEK,
}


@pytest.fixture(params=MODELS, ids=" ".join)
def model(request, tiny):
    family, method = request.param
    return sparsify(tiny(family), METHODS[method])


def offloaded(model, max_length, **settings):
    return sparsetrain.SparseCache(model, max_length=max_length, offload=True, **settings)


def test_one_row_in_every_mode_with_its_keys_on_the_host(model, tokens):
    assert_every_mode(model, tokens(33), lambda: offloaded(model, 33 + NEW + 6))  # drafts on top


def test_a_padded_batch_and_another_turn_with_the_keys_on_the_host(model, tokens):
    prompts, ids, mask = left_padded(tokens)
    cache = offloaded(model, 80)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert_greedy(model, prompts, out[:, ids.shape[1] :])
    turn = torch.cat([out, tokens(11).expand(len(prompts), -1)], dim=1)
    mask = torch.cat([mask, torch.ones(len(prompts), turn.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    again = model.generate(turn, attention_mask=mask, past_key_values=cache, **GREEDY)
    own = [turn[row : row + 1, ids.shape[1] - prompt.shape[1] :] for row, prompt in enumerate(prompts)]
    assert_greedy(model, own, again[:, turn.shape[1] :])


def test_steps_that_read_from_the_host_compile_to_one_graph(tiny, tokens):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = sparsify(tiny("llama"), METHODS["dilated"])
    prompts, ids, mask = left_padded(tokens)
    cache = offloaded(model, 90)
    long = {**GREEDY, "max_new_tokens": 40}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, compile_config=compiled(), **long)
    assert_greedy(model, prompts, out[:, ids.shape[1] :])
    # Taken back, and on with another text, in steps that are not compiled.
    cache.crop(-50)
    turn = torch.cat([out[:, :13], tokens(11).expand(len(prompts), -1)], dim=1)
    with torch.no_grad():
        steps = [model(token, past_key_values=cache).logits for token in turn[:, 12:].split(1, dim=1)]
        want = model(turn[:1], use_cache=False).logits[:, -12:]  # the row without padding
    torch.testing.assert_close(torch.cat(steps, 1)[:1], want, rtol=1e-4, atol=1e-4)
    assert graphs() == 1


def test_a_step_compiled_by_its_user_says_when_its_pages_come(tiny, tokens):
    torch._dynamo.reset()
    model = sparsify(tiny("llama", num_hidden_layers=1), METHODS["power"])
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    ids = tokens(61)
    cache = offloaded(model, 90)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        found = []
        for token in ids[:, 30:60].split(1, dim=1):
            cache.prepare(1)
            found.append(step(token, past_key_values=cache).logits)
        want = model(ids[:, :60], use_cache=False).logits[:, 30:]
        torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-4, atol=1e-4)
        with pytest.raises(Exception, match=r"no way to bring pages from the host.*cache\.prepare"):
            step(ids[:, 60:], past_key_values=cache)


def test_any_number_of_tokens_is_taken_back_from_the_host(tiny, tokens):
    model = sparsify(tiny("llama"), METHODS["dilated"])
    cache, ids = offloaded(model, 120), tokens(100)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-90)
        logits = model(ids[:, 10:60], past_key_values=cache).logits
        want = model(ids[:, :60], use_cache=False).logits[:, 10:]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


def test_bytes_of_the_device_and_of_the_host_are_told_apart(tiny, tokens):
    model = sparsify(tiny("llama"), METHODS["power"])
    ids, room = tokens(128), {"max_length": 2048}
    whole, half = sparsetrain.SparseCache(model, **room), sparsetrain.SparseCache(model, offload=True, **room)
    for cache in (whole, half):
        model.generate(ids, past_key_values=cache, **GREEDY)
    page = 2 * whole.layers[0].memory.keys[0].nbytes
    for layer in half.layers:
        assert isinstance(layer.memory, OffloadedMemory)
        assert layer.memory.nbytes() == layer.memory.slots * page + 4 * 512 + 4
        assert layer.memory.slots == 19  # of 512: what a text of 2,048 tokens reads in two neighbouring blocks
    assert 4 * half.nbytes() < whole.nbytes()
    assert whole.host_nbytes() == 0
    assert half.host_nbytes() == len(half.layers) * 48 * page  # of 128 + 13 tokens, in steps of 16 pages
    # Layers with full attention beside them keep what they have.
    model = sparsify(tiny("llama"), {**METHODS["power"], "dense_layers": [1]})
    cache = offloaded(model, 160, budget=52)
    assert_greedy(model, [ids], model.generate(ids, past_key_values=cache, **GREEDY)[:, 128:])
    assert [layer.memory.host_nbytes() > 0 for layer in cache.layers[:2]] == [True, False]


def test_a_budget_that_does_not_hold_what_is_read_is_refused_with_the_number(tiny, tokens):
    ids = tokens(128)
    pattern = PowerPattern(4, 2, 1)
    together = max(len({*pattern.key_blocks(block), *pattern.key_blocks(block + 1)}) for block in range(35))
    for method, needed, offload in (
        ("power", 4 * pages_alive(METHODS["power"], 32, 36), False),
        ("power", 4 * together, True),
        ("sliding", 4 * pages_alive(METHODS["sliding"], 32, 36), False),
    ):
        model = sparsify(tiny("llama"), METHODS[method])
        cache = sparsetrain.SparseCache(model, max_length=144, budget=needed - 1, offload=offload)
        message = rf"budget={needed - 1}: .*128 tokens.*max_length=144.* {needed} tokens .*set budget to {needed}"
        with pytest.raises(ModelError, match=message):
            cache.check_prompts([3, 128])
        with pytest.raises(ModelError, match=message):
            model.generate(ids, past_key_values=cache, **GREEDY)
        cache = sparsetrain.SparseCache(model, max_length=144, budget=needed, offload=offload)
        cache.check_prompts([128])
        assert_greedy(model, [ids], model.generate(ids, past_key_values=cache, **GREEDY)[:, 128:])
    model = sparsify(tiny("llama"), SPARSEK)
    with pytest.raises(ModelError, match=r"budget=12: the attention method keeps 13 tokens.*set budget to 13"):
        sparsetrain.SparseCache(model, max_length=144, budget=12)
    sparsetrain.SparseCache(model, max_length=144, budget=13)
    for budget in (0, -4, True, "half", 2.5):
        with pytest.raises(ModelError, match=f"budget={budget} must be auto, or a number of tokens"):
            sparsetrain.SparseCache(model, max_length=144, budget=budget)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("limit", KINDS)
def test_every_cell_of_the_table(kind, limit, tiny):
    model = sparsify(tiny("llama"), LAYERS[kind])
    given = {"budget": 100} if limit == "budget" else {"offload": True}
    if kind in KINDS[limit]:
        assert (kind, limit) not in REASONS
        sparsetrain.SparseCache(model, max_length=144, **given)
    else:
        with pytest.raises(ModelError, match=rf"{limit}=\w+: the layers of this model have {kind}: ") as error:
            sparsetrain.SparseCache(model, max_length=144, **given)
        assert REASONS[kind, limit] in str(error.value)


def test_keys_that_are_chosen_in_a_step_cannot_wait_on_the_host(tiny):
    model = sparsetrain.set_decode(sparsify(tiny("llama"), METHODS["full"]), {"select": "quest", "dense_layers": []})
    with pytest.raises(ModelError, match=r"offload=True: .*chooses among them while it runs \(decode\).*would wait"):
        sparsetrain.SparseCache(model, max_length=144, offload=True)


@pytest.mark.parametrize("static", [False, True])
def test_a_pass_that_breaks_off_in_the_last_layer_ends_the_cache(tiny, tokens, monkeypatch, static):
    model, ids = sparsify(tiny("llama"), {"method": "power", "block": 8, "window": 2, "sinks": 1}), tokens(20)
    cache = sparsetrain.SparseCache(model, max_length=40) if static else DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache)
    memory = cache.layers[-1].memory
    with monkeypatch.context() as patch:

        def breaks(*args, **options):
            raise KeyboardInterrupt

        patch.setattr(memory, "attend", breaks)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 12:13], past_key_values=cache)
    with pytest.raises(ModelError, match="a pass was broken off in the attention of this cache; start again"):
        model(ids[:, 13:14], past_key_values=cache)
    cache.reset()
    out = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(out, model(ids, use_cache=False).logits)
