"""A pass of training computes with recycled attention what generation computes step by step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from decode_steps import SHAPE, logits, prompts, small_llama
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.generation.listed import ListedMemory
from sparsetrain.generation.observed import observing
from sparsetrain.methods.base import PassDocuments
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.passes import PLANNED_ARGUMENT

SETTINGS: dict[str, dict[str, Any]] = {
    "top-k": {"every": 4, "keep": 6, "sinks": 1, "recent": 2},
    "top-k that compete with all": {"every": 5, "keep": 6, "sinks": 0, "recent": 0},
    "drawn in training": {"every": [2, 8, 3], "keep": 6, "sinks": 1, "recent": 2},
    "top-p": {"every": 3, "keep": 20, "p": 0.5, "sinks": 0, "recent": 1},
    "by similarity": {"every": 4, "keep": 6, "similarity": 0.3, "sinks": 1, "recent": 2},
    "with a dense layer": {"every": 4, "keep": 6, "recent": 2, "dense_layers": [0]},
    "all keys": {"every": 6, "keep": 4096},
    "every token": {"every": 1, "keep": 1},
}


def make(attention: dict[str, Any] | None = None, **shape: Any) -> Any:
    return small_llama(attention, **{"num_hidden_layers": 2, **shape})


def recycled(name: str, **shape: Any) -> Any:
    return make({"method": "recycled", **SETTINGS[name]}, **shape)


def one_pass(model: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a document, ``[1, n, vocabulary]``, as training computes them."""
    method = next(method for _, _, method in sparse_layers(model) if method is not None)
    count = tokens.shape[1]
    planned = method.plan_pass(PassDocuments([0, count], [prompt], ["a document"]))
    with torch.no_grad():
        return model(
            tokens,
            position_ids=torch.arange(count)[None],
            cu_seqlens=torch.tensor([0, count]).int(),
            use_cache=False,
            **{PLANNED_ARGUMENT: planned},
        ).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_of_training_are_steps_of_generation(name):
    model = recycled(name)
    ids, mask = prompts(50)
    steps, tokens, cache = logits(model, ids, mask, count=20)
    assert isinstance(cache.layers[1].memory, ListedMemory)
    assert isinstance(cache.layers[0].memory, ListedMemory) == (name != "with a dense layer")
    rows = one_pass(model, torch.cat([ids, tokens], 1), prompt=50)[:, 49:-1]
    torch.testing.assert_close(rows, steps, rtol=1e-4, atol=1e-4)
    dense = make()
    if name in ("all keys", "every token"):
        torch.testing.assert_close(steps, logits(dense, ids, mask, count=20)[0], rtol=1e-4, atol=1e-4)
    else:
        every = one_pass(model, torch.cat([ids, tokens], 1), prompt=70)[:, 49:-1]
        assert not torch.allclose(rows[:, 1:], every[:, 1:], atol=1e-2)
        torch.testing.assert_close(rows[:, 0], every[:, 0])


def test_rows_of_a_padded_batch_are_as_alone():
    model = recycled("top-k")
    ids, mask = prompts(60, 21)
    together, tokens, _ = logits(model, ids, mask, count=9)
    for row, length in enumerate((60, 21)):
        text = torch.cat([ids[row : row + 1, -length:], tokens[row : row + 1]], 1)
        alone = one_pass(model, text, prompt=length)[:, length - 1 : -1]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_settings_of_training_are_recorded_and_used(tmp_path):
    model = recycled("drawn in training", num_hidden_layers=3)
    record = model.config.sparsetrain["decode"]
    assert record["refresh"]["every"] == 3
    assert (record["refresh"]["keep"], record["refresh"]["choose"], record["refresh"]["staggered"]) == (
        6,
        "full",
        False,
    )
    assert (record["sinks"], record["recent"], record["dense_layers"]) == (1, 2, [])
    ids, mask = prompts(40)
    want = logits(model, ids, mask)[0]
    sparsetrain.save(model, tmp_path / "saved")
    loaded = sparsetrain.load(tmp_path / "saved").eval()
    assert loaded.config.sparsetrain == model.config.sparsetrain
    assert torch.equal(logits(loaded, ids, mask)[0], want)
    # Other settings, and none, are kept as well.
    other = {**record, "refresh": {**record["refresh"], "every": 7}}
    for section in (other, None):
        sparsetrain.set_decode(model, section)
        folder = tmp_path / ("other" if section else "none")
        sparsetrain.save(model, folder)
        again = sparsetrain.load(folder).eval()
        assert again.config.sparsetrain.get("decode", {}).get("refresh", {}).get("every") == (7 if section else None)
        found = logits(again, ids, mask)[0]
        assert torch.equal(found, logits(model, ids, mask)[0])
        assert not torch.equal(found, want)
    dense = make(num_hidden_layers=3)
    torch.testing.assert_close(found, logits(dense, ids, mask)[0])


def test_the_recorded_length_can_be_chosen():
    model = make({"method": "recycled", "every": [8, 16, 32, 64], "generate_every": 32})
    assert model.config.sparsetrain["decode"]["refresh"]["every"] == 32
    model = make({"method": "recycled", "every": [8, 16, 32, 64]})
    assert model.config.sparsetrain["decode"]["refresh"]["every"] == 16


def test_a_damaged_record_is_refused(tmp_path):
    sparsetrain.save(recycled("top-k"), tmp_path)
    for file in ("config.json", "sparsetrain.json"):
        values = json.loads((tmp_path / file).read_text())
        record = values["sparsetrain"] if file == "config.json" else values
        record["attention"]["keep"] = 0
        (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ModelError, match="keep"):
        sparsetrain.load(tmp_path)


def test_a_cache_is_not_left_to_transformers():
    """A chunk of a prompt, and one more: the past is read whole, and the end of the last chunk chooses."""
    model = recycled("top-k")
    ids, mask = prompts(96)
    whole, chunked = (logits(model, ids, mask, **given)[0] for given in ({}, {"prefill_chunk_size": 32}))
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (Gemma2Config, {}, "has soft-capped logits, which recycled attention does not support"),
        (GptOssConfig, {"head_dim": 16, "num_local_experts": 2}, "has learned sink logits, which recycled"),
        (MistralConfig, {"sliding_window": 16}, "no layer of MistralModel would take recycled.*replace_sliding_layers"),
    ],
    ids=["soft caps", "learned sinks", "windows"],
)
def test_models_that_do_not_fit_are_refused(config, shape, message):
    model = AutoModelForCausalLM.from_config(config(**SHAPE | shape))
    with pytest.raises(ModelError, match=message):
        sparsetrain.sparsify(model, {"method": "recycled"})


def test_windows_are_replaced_where_that_is_asked_for():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=16)).eval()
    sparsetrain.sparsify(model, {"method": "recycled", **SETTINGS["top-k"], "replace_sliding_layers": True})
    ids, mask = prompts(50)
    steps, tokens, _ = logits(model, ids, mask, count=9)
    rows = one_pass(model, torch.cat([ids, tokens], 1), prompt=50)[:, 49:-1]
    torch.testing.assert_close(rows, steps, rtol=1e-4, atol=1e-4)


def test_steps_that_choose_count_all_keys_and_the_others_few():
    model = make({"method": "recycled", "every": 5, "keep": 6, "sinks": 1, "recent": 2}, num_hidden_layers=1)
    ids, mask = prompts(50)
    with observing():
        _, _, cache = logits(model, ids, mask, count=11)
    # Ten steps behind the prompt, of which the fifth and the tenth choose; the prompt's end chose for the first four.
    read = [6 + 3 + 1 + age for age in (0, 1, 2, 3)]
    keys = [*read, 55, *read, 60]
    share = sum(keys) / sum(range(51, 61))
    seen = cache.layers[0].memory.observations()
    assert seen["kept"] == pytest.approx(share)
    assert 0 < seen["mass_mean"] <= 1
