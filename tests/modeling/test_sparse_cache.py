"""A SparseCache holds what is read again, in tensors that stay, and gives what passes without a cache give."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify
from sparsetrain.patterns import PowerPattern, SlidingPattern

from .test_generation_modes import GREEDY, METHODS, assert_every_mode, assert_greedy, left_padded

SPARSEK = {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2, "score_buffer": 4096}
MODELS = [
    *(("llama", name) for name in ("full", "stride", "dense layer", "sparsek")),
    ("qwen3", "dilated"),
    ("mistral", "replaced"),
    ("gemma3_text", "sparsek"),
    ("gpt_oss", "replaced"),
]
COMPILED = [("llama", "full"), ("llama", "by head"), ("gpt_oss", "power"), ("gemma3_text", "sparsek")]
NEW = GREEDY["max_new_tokens"]


def make(family, method, tiny, **config):
    config |= {"sliding_window": 7} if family == "mistral" else {}
    return sparsify(tiny(family, **config), SPARSEK if method == "sparsek" else METHODS[method])


def compiled():
    """Decoding steps compiled on a CPU too, as one graph."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(("family", "method"), MODELS)
def test_one_row_in_every_mode(family, method, tiny, tokens):
    model = make(family, method, tiny)
    room = {"max_length": 33 + NEW + 6, "rollback": 8}  # drafts on top
    assert_every_mode(model, tokens(33), lambda: sparsetrain.SparseCache(model, **room))


@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_a_padded_batch_compiled_is_one_graph_over_all_steps(family, method, tiny, tokens):
    model = make(family, method, tiny, num_hidden_layers=1 if family == "llama" else 2)
    prompts, ids, mask = left_padded(tokens)
    cache = sparsetrain.SparseCache(model, max_length=60)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, compile_config=compiled(), **GREEDY)
    assert_greedy(model, prompts, out[:, ids.shape[1] :])
    assert graphs() == 1
    # Another batch without padding, in the same cache.
    cache.reset()
    prompts = [tokens(23, seed=row) for row in range(3)]
    again = model.generate(torch.cat(prompts), past_key_values=cache, compile_config=compiled(), **GREEDY)
    assert_greedy(model, prompts, again[:, 23:])
    assert graphs() == 1


def test_rows_that_begin_after_the_first_call_are_read_one_by_one(tiny, tokens):
    _, ids, mask = left_padded(tokens)
    for method in (METHODS["power"], SPARSEK):
        model = sparsify(tiny("llama"), method)
        want = model.generate(ids, attention_mask=mask, **GREEDY)
        cache = sparsetrain.SparseCache(model, max_length=64)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=1, **GREEDY)
        assert out.tolist() == want.tolist()


def test_only_what_a_later_token_reads_is_kept(tiny, tokens):
    ids = tokens(128)
    for method in ("power", "sliding"):
        model = sparsify(tiny("llama"), METHODS[method])
        cache = sparsetrain.SparseCache(model, max_length=144)
        out = model.generate(ids, past_key_values=cache, **{**GREEDY, "max_new_tokens": 16})
        assert_greedy(model, [ids], out[:, 128:])
        assert {layer.memory.slots for layer in cache.layers} == {pages_alive(METHODS[method], 32, 36)}
        held = [tensor for layer in cache.layers for tensor in vars(layer.memory).values()]
        assert cache.nbytes() == sum(each.nbytes for each in held if isinstance(each, torch.Tensor))


def pages_alive(section, prompt, horizon):
    """Pages that a later block reads, by the lists, at the moment when most are alive."""
    kind = {"power": PowerPattern, "sliding": SlidingPattern}[section["method"]]
    pattern = kind(section["block"], section["window"], section["sinks"])
    return max(
        len({page for t in range(block, horizon) for page in pattern.key_blocks(t) if page <= block})
        for block in range(prompt, horizon)
    )


@torch.no_grad()
def test_a_text_may_end_with_its_prompt(tiny, tokens):
    for method in (METHODS["power"], {"method": "full"}):
        model = sparsify(tiny("llama"), method)
        ids = tokens(256)
        cache = sparsetrain.SparseCache(model, max_length=256)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
        with pytest.raises(ModelError, match="grows to 257 tokens"):
            model(ids[:, :1], past_key_values=cache)


def test_a_horizon_is_not_passed(tiny, tokens):
    model = sparsify(tiny("llama"), METHODS["power"])
    for config in (None, compiled()):
        cache = sparsetrain.SparseCache(model, max_length=30)
        with pytest.raises(ModelError, match=r"grows to 31 tokens.*max_length=30.*larger max_length.*max_new_tokens"):
            model.generate(tokens(21), past_key_values=cache, compile_config=config, **GREEDY)
    cache = sparsetrain.SparseCache(model, max_length=30)
    with pytest.raises(ModelError, match="grows to 31 tokens"):
        model.generate(tokens(31), past_key_values=cache, **GREEDY)
    with torch.no_grad():
        model(tokens(30), past_key_values=cache)
        with pytest.raises(ModelError, match="grows to 31 tokens"):
            model(tokens(1), past_key_values=cache)
    for wrong in (0, 2.5, True, "30"):
        with pytest.raises(ModelError, match=f"max_length={wrong!r} must be a number of tokens of at least 1"):
            sparsetrain.SparseCache(model, max_length=wrong)


def test_tokens_are_taken_back_only_where_the_pages_are_still_there(tiny, tokens):
    model = sparsify(tiny("llama"), METHODS["sliding"])
    cache = sparsetrain.SparseCache(model, max_length=200)
    with torch.no_grad():
        model(tokens(100), past_key_values=cache)
        cache.crop(0)
        with pytest.raises(ModelError, match=r"20 tokens cannot be taken back.*larger rollback"):
            cache.crop(-20)
    cache = sparsetrain.SparseCache(model, max_length=200, rollback=20)
    with torch.no_grad():
        model(tokens(100), past_key_values=cache)
        cache.crop(-20)
        logits = model(tokens(100)[:, 80:], past_key_values=cache).logits
        want = model(tokens(100), use_cache=False).logits[:, 80:]
    assert int(cache.get_seq_length()) == 100
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


def test_caches_of_other_models_and_methods_are_refused(tiny, tokens):
    model, other = (sparsify(tiny("llama"), METHODS["power"]) for _ in range(2))
    cache = sparsetrain.SparseCache(model, max_length=60)
    with pytest.raises(ModelError, match="made for another model"):
        other.generate(tokens(21), past_key_values=cache, **GREEDY)
    sparsify(model, METHODS["sliding"])
    with pytest.raises(ModelError, match="before the model's attention method changed"):
        model.generate(tokens(21), past_key_values=cache, **GREEDY)
    with pytest.raises(ModelError, match="another attention method"):
        tiny("llama").generate(tokens(21), past_key_values=cache, **GREEDY)
    with pytest.raises(ModelError, match=r"has no attention method; call sparsetrain\.sparsify"):
        sparsetrain.SparseCache(tiny("llama"), max_length=60)


@pytest.mark.parametrize(
    "make", [lambda model: sparsetrain.SparseCache(model, max_length=60), lambda _: DynamicCache()]
)
def test_a_cache_that_a_pass_left_half_filled_is_refused(make, tiny, tokens):
    model = sparsify(tiny("llama"), METHODS["power"])
    for read in (0, 20):
        cache = make(model)
        with torch.no_grad():
            if read:
                model(tokens(read), past_key_values=cache)
            hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tokens(3), past_key_values=cache)
            hook.remove()
            with pytest.raises(
                ModelError, match=rf"layer 0 has read {read + 6} tokens.*layer 1 {read + 3}: .*start again"
            ):
                model(tokens(3), past_key_values=cache)


@pytest.mark.parametrize("method", ["power", "sparsek"])
@pytest.mark.parametrize(
    "make", [lambda model: sparsetrain.SparseCache(model, max_length=60), lambda _: DynamicCache()]
)
def test_a_call_that_does_not_go_on_from_the_cache_is_refused(method, make, tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK if method == "sparsek" else METHODS[method])
    cache = make(model)
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
        with pytest.raises(ModelError, match=r"holds a batch of 1, and this call has one of 2.*batch_repeat_inter"):
            model(tokens(3).repeat(2, 1), past_key_values=cache)
    for wrong in (-21, 5):
        with pytest.raises(ModelError, match=rf"crop\({wrong}\): .*at most the 20 that this cache holds"):
            cache.crop(wrong)
