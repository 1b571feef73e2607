"""Generation with a key/value cache gives what a forward pass over the whole text gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsetrain.errors import ModelError
from sparsetrain.modeling import load_model, sparsify
from sparsetrain.recipe.schema import ModelSection

from .conftest import FAMILIES
from .test_generation_modes import assert_greedy

METHODS = [
    {"method": "full"},
    {"method": "power", "block": 4, "window": 2, "sinks": 1},
    {"method": "sliding", "block": 4, "window": 2, "sinks": 1},
    {"method": "stride", "block": 4, "window": 2, "sinks": 0, "stride": 3},
    {"method": "dilated", "block": 4, "window": 3, "dilation": 2},
    {"method": "longnet", "block": 4, "segments": [[2, 1], [8, 2]], "head_shift": True},
    {"method": "power", "block": 4, "window": 1, "sinks": 1, "base": 4},
    {"method": "power", "block": 4, "window": 1, "sinks": 1, "split": "layers", "farthest": 4},
    {"method": "power", "block": 4, "window": 1, "sinks": 1, "split": "heads", "farthest": 8},
    {"method": "ruler", "block": 4, "window": 1, "sinks": 0, "keep": 1, "levels": 3},
]
POWER = METHODS[1]
SETTINGS = {"rtol": 1e-4, "atol": 1e-4}
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("attention", METHODS, ids=lambda attention: attention["method"])
def test_greedy_generation_equals_repeated_forward_passes(attention, tiny, tokens):
    model = sparsify(tiny("llama"), attention)
    ids = tokens(41)
    assert_greedy(model, [ids], model.generate(ids, **GREEDY)[:, 41:])


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        *(("llama", chunks) for chunks in ([45], [20, 25], [1] * 45)),
        *((family, [7, 1, 30, 1, 1, 5]) for family in FAMILIES),
    ],
    ids=lambda given: given if isinstance(given, str) else f"{len(given)} chunks",
)
def test_prefill_in_chunks_equals_one_pass(family, chunks, tiny, tokens):
    model, ids, cache, logits = sparsify(tiny(family), POWER), tokens(45), None, []
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, **SETTINGS)


def test_left_padded_generation_equals_one_by_one(family, tiny, tokens):
    model = sparsify(tiny(family), POWER)
    prompts = [tokens(length, seed=length) for length in (21, 3, 14)]
    width = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    assert_greedy(model, prompts, model.generate(ids, attention_mask=mask, **GREEDY)[:, width:])


def test_right_padding_changes_nothing_before_it(tiny, tokens):
    model, ids = sparsify(tiny("llama"), POWER), tokens(30)
    mask = torch.ones_like(ids)
    mask[0, 22:] = 0
    padded = model(ids, attention_mask=mask, use_cache=False).logits[:, :22]
    torch.testing.assert_close(padded, model(ids[:, :22]).logits, **SETTINGS)


def test_padding_between_real_tokens_is_refused(tiny, tokens):
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(ModelError, match="between real tokens"):
        sparsify(tiny("llama"), POWER)(tokens(20), attention_mask=mask)


def test_a_real_checkpoint_tells_the_same_story(test_data):
    folder = str(test_data / "models" / "stories260K_hf")
    model, tokenizer = load_model(ModelSection(path=folder, dtype="float32"), {"method": "full"}, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    story = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    assert story.tolist() == plain.generate(**inputs, max_new_tokens=100, do_sample=False).tolist()
    assert "there was a little girl" in tokenizer.decode(story[0])
