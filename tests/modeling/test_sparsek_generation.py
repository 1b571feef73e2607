"""SparseK generates in constant memory what a forward pass over the whole text gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparsetrain.errors import ModelError
from sparsetrain.generation.pages import PagedMemory
from sparsetrain.methods.sparsek.memory import SparseKMemory
from sparsetrain.modeling import sparsify
from sparsetrain.modeling.cache import MemoryLayer

# No more than score_buffer tokens compete in these tests, so thresholds are exact.
SPARSEK = {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2, "slope": 1e-3, "score_buffer": 4096}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "phi3", "gemma3_text"]
TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def assert_is_argmax(model, generated, prompt):
    """Every generated token is what one pass over the text before it, without a cache, finds likeliest."""
    with torch.no_grad():
        likeliest = model(generated, use_cache=False).logits.argmax(-1)
    assert generated[:, prompt.shape[1] :].tolist() == likeliest[:, prompt.shape[1] - 1 : -1].tolist()


def read(model, ids, chunks):
    """Logits of a text read in chunks, and the cache."""
    cache, logits = None, []
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_a_pass_without_a_cache(family, tiny, tokens):
    model = sparsify(tiny(family), SPARSEK)
    for length in (1, 4, 40) if family == "llama" else (10,):
        ids = tokens(length)
        assert_is_argmax(model, model.generate(ids, **GREEDY), ids)


@pytest.mark.parametrize(
    "section",
    [
        {"gate": "log"},
        {"gate": "straight"},
        {"scores": "layer"},
        {"scorer": "random"},
        {"normalize": False},
        {"sinks": 0, "window": 1},
        {"dense_layers": [0]},
    ],
    ids=str,
)
def test_every_variant_reads_token_by_token_as_at_once(section, tiny, tokens):
    model, ids = sparsify(tiny("llama"), {**SPARSEK, **section}), tokens(36)
    logits, _ = read(model, ids, [1] * 36)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **TIGHT)


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        ("llama", [80]),
        ("llama", [20, 60]),
        *((family, [7, 1, 40, 1, 1, 30]) for family in ("llama", "gpt2", "gemma3_text")),
    ],
    ids=str,
)
def test_prefill_in_chunks_equals_one_pass(family, chunks, tiny, tokens):
    model, ids = sparsify(tiny(family), SPARSEK), tokens(80)
    logits, _ = read(model, ids, chunks)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **TIGHT)


def test_hundreds_of_steps_stay_equal_and_the_cache_does_not_grow(tiny, tokens):
    model = sparsify(tiny("llama", num_hidden_layers=1, max_position_embeddings=4096).double(), SPARSEK)
    ids = tokens(400)
    with torch.no_grad():
        logits, cache = read(model, ids[:, :100], [100])
        sizes = [tensor.shape for tensor in vars(cache.layers[0].memory.state.slots).values()]
        pieces = [logits]
        for token in ids[:, 100:].split(1, dim=1):
            pieces.append(model(token, past_key_values=cache).logits)
        whole = model(ids, use_cache=False).logits
    # The model's norms and rotations are fp32 whatever its dtype.
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
    state = cache.layers[0].memory.state
    assert [tensor.shape for tensor in vars(state.slots).values()] == sizes
    assert state.slots.keys.shape[2] == 5 + 6 + 2
    assert cache.get_seq_length() == state.lengths[0] == 400


def test_left_padded_generation_equals_one_by_one(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    prompts = [tokens(length, seed=length) for length in (41, 3, 20, 1)]
    ids, mask = torch.zeros(4, 41, dtype=torch.long), torch.zeros(4, 41, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 41 - prompt.shape[1] :], mask[row, 41 - prompt.shape[1] :] = prompt, 1
    for chunk in (None, 7):
        together = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
        for row, prompt in enumerate(prompts):
            assert_is_argmax(model, together[row : row + 1, 41 - prompt.shape[1] :], prompt)


def test_beam_search_follows_its_beams(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), tokens(40)
    beams = {"num_beams": 3, "num_return_sequences": 3, **GREEDY}
    cached = model.generate(ids, **beams)
    assert cached.tolist() == model.generate(ids, use_cache=False, **beams).tolist()


def test_right_padding_is_refused_with_a_cache(tiny, tokens):
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 15:] = 0
    with pytest.raises(ModelError, match="pad on the left"):
        sparsify(tiny("llama"), SPARSEK)(tokens(20), attention_mask=mask, use_cache=True)


def test_packed_documents_are_refused_with_a_cache(tiny, tokens):
    place = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with pytest.raises(ModelError, match="packed documents cannot share"):
        sparsify(tiny("llama"), SPARSEK)(tokens(50), position_ids=place, use_cache=True)


def test_an_empty_cache_of_the_user_is_taken_over(tiny, tokens):
    model, ids, cache = sparsify(tiny("llama"), SPARSEK), tokens(40), DynamicCache()
    generated = model.generate(ids, past_key_values=cache, **GREEDY)
    assert all(isinstance(layer, MemoryLayer) for layer in cache.layers)
    assert_is_argmax(model, generated, ids)


def test_only_sparse_layers_forget(tiny, tokens):
    model = sparsify(tiny("llama"), {**SPARSEK, "dense_layers": [0]})
    _, cache = read(model, tokens(60), [60])
    assert [type(layer.memory) for layer in cache.layers] == [PagedMemory, SparseKMemory]
    assert cache.layers[0].memory.lengths.tolist() == [60]


def test_replaced_sliding_layers_need_no_special_cache(tiny, tokens):
    model = sparsify(tiny("gemma3_text"), {**SPARSEK, "replace_sliding_layers": True})
    ids = tokens(40)
    assert_is_argmax(model, model.generate(ids, **GREEDY), ids)


def test_a_cache_can_be_used_again_after_reset(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), tokens(40)
    _, cache = read(model, tokens(50, seed=3), [50])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert model.generate(ids, past_key_values=cache, **GREEDY).tolist() == model.generate(ids, **GREEDY).tolist()


def test_rows_of_a_cache_can_be_repeated_and_selected(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), torch.cat([tokens(40), tokens(40, seed=1)])
    _, cache = read(model, ids, [40])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    after, expected = tokens(1, seed=8).expand(2, 1), torch.cat([ids, tokens(1, seed=8).expand(2, 1)], 1)
    logits = model(after, past_key_values=cache).logits
    torch.testing.assert_close(logits[:, -1], model(expected, use_cache=False).logits[:, -1], **TIGHT)


def test_caches_of_other_methods_are_refused(tiny, tokens):
    model = sparsify(tiny("llama"), {"method": "full"})
    _, cache = read(model, tokens(30), [30])
    sparsify(model, SPARSEK)
    with pytest.raises(ModelError, match="30 tokens of another attention method; start again"):
        model(tokens(1), past_key_values=cache)
    _, cache = read(model, tokens(30), [30])
    sparsify(model, {"method": "full"})
    with pytest.raises(ModelError, match="30 tokens of another attention method; start again"):
        model(tokens(1), past_key_values=cache)


@pytest.mark.parametrize("section", [{}, {"normalize": False}, {"scores": "layer"}], ids=str)
def test_tokens_taken_back_leave_no_trace(section, tiny, tokens):
    """Drafts of 1 to 20 tokens, read at once or one by one, over many evictions."""
    model, ids = sparsify(tiny("llama"), {**SPARSEK, **section}), tokens(90)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache = model(ids[:, :30]).past_key_values
        cache.activate_past_recording()
        at, generator = 30, torch.Generator().manual_seed(0)
        while at < 66:
            drafted, right = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
            right = min(right, drafted)
            draft = torch.cat([ids[:, at : at + right], tokens(drafted - right, seed=at)], 1)
            parts = [drafted] if drafted % 2 else [1] * drafted
            logits = [model(part, past_key_values=cache).logits for part in draft.split(parts, dim=1)]
            cache.crop(right - drafted)
            torch.testing.assert_close(torch.cat(logits, 1)[:, :right], want[:, at : at + right], **TIGHT)
            at += right
            assert cache.get_seq_length() == at
            assert cache.layers[0].memory.state.lengths == [at]
        rest = model(ids[:, at:], past_key_values=cache).logits
    torch.testing.assert_close(rest, want[:, at:], **TIGHT)


@pytest.mark.parametrize(("prompt", "back"), [(40, 1), (40, 30), (300, 64)])
def test_the_end_of_a_prompt_can_be_taken_back(prompt, back, tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), tokens(prompt + 20)
    _, cache = read(model, ids[:, :prompt], [prompt])
    cache.crop(-back)
    with torch.no_grad():
        logits = model(ids[:, prompt - back :], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, prompt - back :], **TIGHT)


def test_assisted_generation_and_prompt_lookup_equal_greedy(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    ids, settings = tokens(200), {**GREEDY, "max_new_tokens": 16, "pad_token_id": None}
    want = model.generate(ids, **settings).tolist()
    # The dense original is often right, the stranger never, and one with fewer keys forgets too.
    stranger = tiny("llama", num_hidden_layers=1)
    torch.nn.init.normal_(stranger.lm_head.weight)
    dense, fewer = tiny("llama"), sparsify(tiny("llama"), {**SPARSEK, "topk": 2})
    for draft, drafted in ((dense, 20), (stranger, 20), (fewer, 3)):
        draft.generation_config.num_assistant_tokens = drafted
        assert model.generate(ids, assistant_model=draft, **settings).tolist() == want
    assert model.generate(ids, prompt_lookup_num_tokens=6, **settings).tolist() == want


def test_what_is_remembered_for_a_round_is_counted_and_forgotten(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    _, cache = read(model, tokens(60), [60])
    memory = cache.layers[0].memory
    remembered, sizes = memory.nbytes(), []
    cache.crop(0)
    plain = memory.nbytes()
    cache.activate_past_recording()
    with torch.no_grad():
        for token in tokens(220).split(1, dim=1):
            model(token, past_key_values=cache)
            sizes.append(memory.nbytes())
    assert plain < remembered
    assert plain < min(sizes)
    assert max(sizes[:150]) == max(sizes)
    cache.crop(0)
    assert memory.nbytes() == plain


def test_what_cannot_be_taken_back_is_refused(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    _, cache = read(model, tokens(30), [30])
    with torch.no_grad():
        for token in tokens(200).split(1, dim=1):
            model(token, past_key_values=cache)
    with pytest.raises(ModelError, match=r"cannot take back 2 tokens.*activate_past_recording\(\)"):
        cache.crop(-2)
    with pytest.raises(ModelError, match="static caches of transformers are not supported"):
        model(tokens(5), past_key_values=StaticCache(config=model.config, max_cache_len=64))
