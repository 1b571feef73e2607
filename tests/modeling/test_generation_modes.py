"""Every way to generate gives, token by token, what passes over the whole text without a cache give."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from sparsetrain.errors import ModelError
from sparsetrain.modeling import SparseCache, sparsify
from sparsetrain.modeling.cache import MemoryLayer

METHODS = {
    "full": {"method": "full"},
    "power": {"method": "power", "block": 4, "window": 2, "sinks": 1},
    "sliding": {"method": "sliding", "block": 4, "window": 2, "sinks": 1},
    "stride": {"method": "stride", "block": 4, "window": 2, "sinks": 0, "stride": 3},
    "dilated": {"method": "dilated", "block": 4, "window": 3, "dilation": 2},
    "longnet": {"method": "longnet", "block": 4, "segments": [[2, 1], [8, 2]], "head_shift": True},
    "by head": {"method": "power", "block": 4, "window": 2, "sinks": 1, "split": "heads", "farthest": 5, "base": 3},
    "dense layer": {"method": "sliding", "block": 4, "window": 2, "sinks": 1, "dense_layers": [1]},
    "replaced": {"method": "power", "block": 4, "window": 2, "sinks": 1, "replace_sliding_layers": True},
}
MODELS = [
    *(("llama", name) for name in ("power", "by head", "dense layer")),
    ("qwen3", "stride"),
    ("mistral", "replaced"),
    *(("gemma3_text", name) for name in ("full", "replaced")),
    *(("gpt_oss", name) for name in ("dilated", "replaced")),
]
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTHS = (23, 3, 14)


@pytest.fixture(params=MODELS, ids=" ".join)
def model(request, tiny):
    family, method = request.param
    config = {"sliding_window": 7} if family == "mistral" else {}
    return sparsify(tiny(family, **config), METHODS[method])


def assert_greedy(model, prompts, written):
    """Every token that was written is the likeliest by a pass without a cache over the text before it.

    One pass over a text finds the likeliest behind each of its beginnings.

    Args:
        prompts: ``[1, tokens]`` each.
        written: ``[rows, new tokens]``: what was written behind each.
    """
    for prompt, row in zip(prompts, written, strict=True):
        text = torch.cat([prompt, row[None, :-1]], 1)
        with torch.no_grad():
            likeliest = model(text, use_cache=False).logits[0].argmax(-1)
        assert row.tolist() == likeliest[prompt.shape[1] - 1 :].tolist()


def assert_every_mode(model, ids, make_cache):
    """Of one row, ``[1, tokens]``: greedy, with a prompt in chunks, with looked-up guesses, and with beams.

    Args:
        make_cache: makes the cache of each of them.
    """

    def generate(**settings):
        return model.generate(ids, past_key_values=make_cache(), **{**GREEDY, **settings}).tolist()

    want = generate()
    assert_greedy(model, [ids], torch.tensor(want)[:, ids.shape[1] :])
    assert generate(prefill_chunk_size=8) == want
    assert generate(prompt_lookup_num_tokens=5) == want
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9}
    assert generate(**beams) == model.generate(ids, use_cache=False, **{**GREEDY, **beams}).tolist()


def left_padded(tokens, lengths=LENGTHS):
    prompts, width = [tokens(length, seed=length) for length in lengths], max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :], mask[row, width - prompt.shape[1] :] = prompt, 1
    return prompts, ids, mask


def test_one_row_in_every_mode(model, tokens):
    ids = tokens(21)
    out = model.generate(ids, **GREEDY)
    assert_greedy(model, [ids], out[:, 21:])
    assert model.generate(ids, prefill_chunk_size=6, **GREEDY).tolist() == out.tolist()
    # Drafts copied from the prompt are mostly wrong: what they wrote is taken back.
    assert model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY).tolist() == out.tolist()


@pytest.mark.parametrize(("family", "method"), [("llama", "power"), ("gpt_oss", "replaced")])
def test_an_empty_cache_of_the_user_is_taken_over(family, method, tiny, tokens):
    model, ids = sparsify(tiny(family), METHODS[method]), tokens(21)
    assert_greedy(model, [ids], model.generate(ids, past_key_values=DynamicCache(), **GREEDY)[:, 21:])


def test_rows_of_unequal_length_with_a_second_turn(model, tokens):
    prompts, ids, mask = left_padded(tokens)
    outs = []
    for chunk in (None, 5):
        cache = DynamicCache(config=model.config)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **GREEDY)
        outs.append(out.tolist())
    written = out[:, ids.shape[1] :]
    assert_greedy(model, prompts, written)
    assert outs[0] == outs[1]
    turn = torch.cat([tokens(9, seed=row) for row in range(3)])
    texts = [torch.cat([prompt, written[None, row], turn[None, row]], 1) for row, prompt in enumerate(prompts)]
    more = torch.cat([out, turn], 1)
    mask = torch.cat([mask, mask.new_ones(3, more.shape[1] - mask.shape[1])], 1)
    again = model.generate(more, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert_greedy(model, texts, again[:, more.shape[1] :])


def test_beams_and_samples_follow_their_rows(model, tokens):
    _, ids, mask = left_padded(tokens, (12, 5))
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    assert model.generate(ids, **beams).tolist() == model.generate(ids, use_cache=False, **beams).tolist()
    sampled = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "attention_mask": mask}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, use_cache=use_cache, **sampled).tolist())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("method", ["power", "longnet"])
def test_drafts_of_another_model_change_nothing(method, tiny, tokens):
    """Right ones, of the model's own dense original, and wrong ones, of a model that knows nothing."""
    model, ids = sparsify(tiny("llama"), METHODS[method]), tokens(21)
    long = {**GREEDY, "max_new_tokens": 24}
    want = model.generate(ids, **long)
    assert_greedy(model, [ids], want[:, 21:])
    stranger = tiny("llama", num_hidden_layers=1)
    torch.nn.init.normal_(stranger.lm_head.weight)
    for draft in (sparsify(tiny("llama"), METHODS[method]), tiny("llama"), sparsify(stranger, METHODS[method])):
        for drafted in (3, 20):
            draft.generation_config.num_assistant_tokens = drafted
            # Of a pad token among its own the draft model would make a mask.
            settings = {**long, "pad_token_id": None}
            out = model.generate(ids, assistant_model=draft, **settings)
            assert out.tolist() == want.tolist()


def test_every_layer_has_a_memory_and_rings_stay_small(tiny, tokens):
    model = sparsify(tiny("gpt_oss"), METHODS["sliding"])
    cache, sizes = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(tokens(40), past_key_values=cache)
        for token in tokens(120).split(1, dim=1):
            model(token, past_key_values=cache)
            sizes.append([layer.memory.keys.nbytes for layer in cache.layers])
    assert all(isinstance(layer, MemoryLayer) for layer in cache.layers)
    assert all(size == sizes[50] for size in sizes[50:])
    for layer in cache.layers:
        held = [tensor for tensor in vars(layer.memory).values() if isinstance(tensor, torch.Tensor)]
        assert layer.memory.nbytes() == sum(tensor.nbytes for tensor in held)


def test_what_was_not_remembered_is_refused_when_it_is_read(tiny, tokens):
    model, ids = sparsify(tiny("llama"), METHODS["power"]), tokens(20)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(out.logits[:, :15], model(ids[:, :15]).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="pad on the left"):
        model(ids[:, :1], past_key_values=out.past_key_values)
    out.past_key_values.reset()
    again = model(ids, past_key_values=out.past_key_values)
    torch.testing.assert_close(again.logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_gives_gradients_to_the_first_call_and_refuses_them_later(tiny, tokens):
    model, ids = sparsify(tiny("llama"), METHODS["power"]), tokens(20)
    grads = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.equal(*grads)
    cache = model(ids, use_cache=True).past_key_values
    for more in (1, 30):
        loss = model(tokens(more), past_key_values=cache).logits.sum()
        with pytest.raises(ModelError, match="keeps no gradients; pass use_cache=False"):
            loss.backward()


def test_static_caches_of_transformers_are_refused(tiny, tokens):
    with pytest.raises(ModelError, match="static caches of transformers are not supported"):
        sparsify(tiny("llama"), METHODS["power"]).generate(tokens(21), cache_implementation="static", **GREEDY)


@pytest.mark.parametrize("cache", [DynamicCache, partial(SparseCache, max_length=40)], ids=["dynamic", "sparse"])
def test_a_cache_that_is_not_to_be_used_is_refused(cache, tiny, tokens):
    model, ids = sparsify(tiny("llama"), METHODS["power"]), tokens(21)
    given = cache(model) if isinstance(cache, partial) else cache(config=model.config)
    refused = pytest.raises(ModelError, match=r"use_cache=False, and past_key_values is a cache.* pass use_cache=True")
    with refused:
        model.generate(ids, past_key_values=given, use_cache=False, **GREEDY)
    # As models are saved that were trained with checkpointing.
    model.generation_config.use_cache = False
    with refused:
        model.generate(ids, past_key_values=given, **GREEDY)
    want = model.generate(ids, **GREEDY)
    assert_greedy(model, [ids], want[:, 21:])
    # Nothing was read.
    given.reset()
    assert model.generate(ids, past_key_values=given, use_cache=True, **GREEDY).tolist() == want.tolist()
