"""``sparsetrain.generate`` writes what ``model.generate`` writes, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decode_steps import small_llama
from transformers import LogitsProcessor, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.generation.observed import observing
from sparsetrain.inference.captured_step import CapturedStep
from sparsetrain.inference.loop import why_not

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "power": {"method": "power", "block": 8, "window": 2, "sinks": 1},
    "sliding": {"method": "sliding", "block": 8, "window": 2, "sinks": 1},
    "sparsek": {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2, "score_buffer": 4096},
}
DECODE = {"prune": {"p": 0.6, "min_keys": 1}, "refresh": {"every": 3}, "sinks": 1, "recent": 2, "dense_layers": [0]}
ONE, THREE = (33,), (33, 7, 20)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "chunks": {"do_sample": False, "prefill_chunk_size": 8},
}
NEW = 17


def texts(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the left, and their mask."""
    width = max(lengths)
    ids = torch.randint(1, 97, (len(lengths), width), generator=torch.Generator().manual_seed(len(lengths)))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(model: Any, given: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """What transformers' loop writes, and what ours does, with the same random numbers."""
    found = []
    for write in (type(model).generate, sparsetrain.generate):
        torch.manual_seed(5)
        cache = sparsetrain.SparseCache(model, max_length=80)
        found.append(write(model, **given, past_key_values=cache, max_new_tokens=NEW, **settings))
    return found[0], found[1]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[CapturedStep]:
    """The steps that were captured."""
    made: list[CapturedStep] = []
    original = CapturedStep.capture
    monkeypatch.setattr(CapturedStep, "capture", lambda step: made.append(step) or original(step))
    return made


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """For tests whose steps are not captured."""
    return caplog


@pytest.fixture(autouse=True)
def _no_warnings(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture):
    yield
    if "warned" not in request.fixturenames:
        assert not [record for record in caplog.records if record.name.startswith("sparsetrain")]


@pytest.mark.parametrize(
    ("method", "lengths", "way"),
    [
        *((method, THREE, "greedy") for method in METHODS),
        *(("power", lengths, way) for lengths, way in ((ONE, "sampling"), (THREE, "sampling"), (ONE, "chunks"))),
        *((method, THREE, "chunks") for method in ("full", "power", "sliding")),
        # A chunk of SparseK joins the slots in another order.
        *(("sparsek", lengths, way) for lengths, way in ((ONE, "sampling"), (THREE, "penalties"))),
    ],
)
def test_the_tokens_are_those_of_transformers(method, lengths, way, captures):
    want, got = both(small_llama(METHODS[method]), texts(lengths), **WAYS[way])
    assert got.tolist() == want.tolist()
    assert len(captures) == 1


@pytest.mark.parametrize("choose", ["codes", "full"])
def test_layers_that_choose_their_keys(choose, captures):
    decode = {**DECODE, "refresh": {**DECODE["refresh"], "choose": choose}}
    want, got = both(small_llama(METHODS["full"], decode), texts(THREE), do_sample=False)
    assert got.tolist() == want.tolist()
    assert len(captures) == 1


CHOOSING: dict[str, Any] = {
    "top-p": ({"method": "full"}, DECODE),
    "recycled": ({"method": "recycled", "every": 4, "keep": 3, "sinks": 1, "recent": 2}, None),
}


@pytest.mark.parametrize(("chunk", "lengths"), [(8, THREE), (20, ONE), (32, THREE)], ids=str)
@pytest.mark.parametrize("case", CHOOSING)
def test_parts_of_a_prompt_are_read_as_the_prompt_however_short(case, chunk, lengths):
    attention, decode = CHOOSING[case]
    model, given = small_llama(attention, decode), texts(lengths)
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}

    def write(**more: Any) -> Any:
        # With room for guesses, up to 16 tokens at once may be such.
        cache = sparsetrain.SparseCache(model, max_length=80, rollback=20)
        return sparsetrain.generate(model, **given, past_key_values=cache, **settings, **more)

    want, got = write(), write(prefill_chunk_size=chunk)
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CHOOSING)
def test_a_short_turn_is_read_in_steps_in_parts_too(case):
    attention, decode = CHOOSING[case]
    model, given = small_llama(attention, decode), texts(ONE)
    more = torch.cat([given["input_ids"], torch.arange(5, 17)[None]], dim=1)

    def write(ids: torch.Tensor, cache: Any, **settings: Any) -> Any:
        return sparsetrain.generate(model, ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **settings)

    found = []
    for chunk in (None, 5):
        cache = sparsetrain.SparseCache(model, max_length=80, rollback=20)
        with torch.no_grad():
            model(**given, past_key_values=cache)
        found.append(write(more, cache, prefill_chunk_size=chunk).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_end_alone_and_are_filled_up(do_sample):
    model, given = small_llama(METHODS["power"]), texts(THREE)
    free, _ = both(model, given, do_sample=do_sample)
    # Ends each row somewhere, and all of them before the most tokens.
    ends = sorted({int(row[33 + place]) for row, place in zip(free, (2, 6, 9), strict=True)})
    want, got = both(model, given, do_sample=do_sample, eos_token_id=ends)
    assert got.tolist() == want.tolist()
    assert 33 < got.shape[1] < 33 + NEW
    assert (got[:, 33:] == 0).any()


def test_what_is_asked_for_beside_the_tokens():
    model, given = small_llama(METHODS["power"]), texts(ONE)
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    want, got = both(model, given, do_sample=True, **settings)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len(got.scores) == len(got.logits) == NEW
    for ours, theirs in ((got.scores, want.scores), (got.logits, want.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))
    assert isinstance(got.past_key_values, sparsetrain.SparseCache)
    assert int(got.past_key_values.get_seq_length()) == int(want.past_key_values.get_seq_length()) == 33 + NEW - 1


def test_a_second_turn_goes_on_with_the_cache():
    model, ids = small_llama(METHODS["power"]), texts(ONE)["input_ids"]
    turns = []
    for write in (type(model).generate, sparsetrain.generate):
        cache = sparsetrain.SparseCache(model, max_length=80)
        settings = {"past_key_values": cache, "max_new_tokens": 9, "do_sample": False}
        first = write(model, ids, attention_mask=torch.ones_like(ids), **settings)
        more = torch.cat([first, ids[:, :20]], dim=1)
        turns.append(write(model, more, attention_mask=torch.ones_like(more), **settings).tolist())
    assert turns[0] == turns[1]


def test_a_cache_serves_the_next_batch_with_the_same_step(captures):
    model = small_llama(METHODS["sliding"])
    cache = sparsetrain.SparseCache(model, max_length=80)
    for lengths in (THREE, (12, 33, 30), (33, 33, 33), ONE, (20, 5)):
        given = texts(lengths)
        cache.reset()
        got = sparsetrain.generate(model, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        fresh = sparsetrain.SparseCache(model, max_length=80)
        want = model.generate(**given, past_key_values=fresh, max_new_tokens=NEW, do_sample=False)
        assert got.tolist() == want.tolist()
    # Another number of rows has other tensors.
    assert len(captures) == 3


@pytest.mark.parametrize("grows", [False, True], ids=["SparseCache", "DynamicCache"])
@pytest.mark.parametrize(
    ("method", "decode"), [("power", None), ("sparsek", None), ("full", DECODE)], ids=["power", "sparsek", "decode"]
)
@torch.no_grad()
def test_several_texts_go_on_from_copies_of_one_prompt(method, decode, grows, warned):
    model, prompt = small_llama(METHODS[method], decode), texts(ONE)["input_ids"]

    def read() -> Any:
        cache = None if grows else sparsetrain.SparseCache(model, max_length=80)
        return model(prompt, past_key_values=cache, use_cache=True).past_key_values

    def write(cache: Any, end: list[int]) -> list[list[int]]:
        ids = torch.cat([prompt, torch.tensor([end])], dim=1)
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        return sparsetrain.generate(model, ids, past_key_values=cache, **settings).tolist()

    held, ends = read(), ([5, 6], [50, 7, 8])
    first = copy.deepcopy(held)
    assert [write(first, ends[0]), write(copy.deepcopy(held), ends[1])] == [write(read(), end) for end in ends]
    assert held.layers[0].memory.nbytes() == read().layers[0].memory.nbytes()
    # Of a captured step nothing is copied, and the model is no part of a cache.
    assert getattr(copy.deepcopy(first), "captured", None) is None
    both = copy.deepcopy({"model": model, "cache": held})
    assert both["cache"].layers[1].plan is both["model"].model.layers[1].self_attn.sparsetrain_plan is not None


def test_another_adapter_is_another_step(captures):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, given = peft.get_peft_model(small_llama(METHODS["power"]), lora).eval(), texts(ONE)
    cache = sparsetrain.SparseCache(model, max_length=80)

    def write() -> list[list[int]]:
        cache.reset()
        settings = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False}
        return sparsetrain.generate(model, **given, **settings).tolist()

    found = [write(), write()]
    assert len(captures) == 1
    with model.disable_adapter():
        found.append(write())
    assert len(captures) == 2
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("section", "graphs"),
    [
        ({"refresh": {"every": 3, "keep": 8}}, 1),
        ({"refresh": {"every": 3, "keep": 0.25}}, 2),
        ({"select": "quest", "candidates": 16}, 1),
        ({"select": "quest", "candidates": 0.75}, 2),
    ],
    ids=str,
)
def test_prompts_of_other_lengths_use_one_graph_unless_keys_are_a_share_of_them(section, graphs, captures):
    model = small_llama(METHODS["full"], {**section, "sinks": 1, "recent": 2, "dense_layers": [0]})
    cache = sparsetrain.SparseCache(model, max_length=80)
    for length in (33, 57):
        given = {**texts((length,)), "max_new_tokens": NEW, "do_sample": False}
        cache.reset()
        got = sparsetrain.generate(model, **given, past_key_values=cache)
        own = sparsetrain.SparseCache(model, max_length=80)
        assert got.tolist() == model.generate(**given, past_key_values=own).tolist()
    assert len(captures) == graphs


def test_a_hook_that_is_added_or_taken_away_makes_another_step(captures):
    model, given = small_llama(METHODS["power"]), texts(ONE)
    cache = sparsetrain.SparseCache(model, max_length=80)

    def write() -> list[list[int]]:
        cache.reset()
        settings = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False}
        return sparsetrain.generate(model, **given, **settings).tolist()

    found = [write(), write()]
    assert len(captures) == 1
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, inputs, output: -output)
    found.append(write())
    assert len(captures) == 2
    handle.remove()
    mlp.forward = lambda hidden: torch.zeros_like(hidden)
    found.append(write())
    assert len(captures) == 3
    del mlp.forward
    mlp.act_fn = torch.nn.Tanh()
    found.append(write())
    assert len(captures) == 4
    assert found[0] == found[1]
    assert len({str(each) for each in found}) == 4


def test_a_cache_that_is_handed_over_is_used():
    model, given = small_llama(METHODS["power"]), texts(ONE)
    want, got = both(model, given, do_sample=False)
    # As models are saved that were trained with checkpointing.
    model.generation_config.use_cache = False
    cache = sparsetrain.SparseCache(model, max_length=80)
    settings = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False, "custom_generate": None}
    assert sparsetrain.generate(model, **given, **settings).tolist() == want.tolist() == got.tolist()
    cache.reset()
    with pytest.raises(ModelError, match="use_cache=False, and past_key_values is a cache"):
        sparsetrain.generate(model, **given, **settings, use_cache=False)


class Noted(BaseStreamer):
    """Notes what it is handed."""

    def __init__(self) -> None:
        self.put_there: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_there.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_each_token_once():
    model, given = small_llama(METHODS["power"]), texts(ONE)
    heard = []
    for write in (type(model).generate, sparsetrain.generate):
        streamer = Noted()
        cache = sparsetrain.SparseCache(model, max_length=80)
        out = write(model, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False, streamer=streamer)
        assert streamer.ended == 1
        heard.append(streamer.put_there)
    assert heard[0] == heard[1] == [given["input_ids"][0].tolist(), *([token] for token in out[0, 33:].tolist())]


def test_processors_and_criteria_of_ones_own_see_every_token():
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores.scatter(1, input_ids[:, -4:], float("-inf"))

    model, given = small_llama(METHODS["power"]), texts(THREE)
    lengths: list[int] = []

    def enough(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 41, dtype=torch.bool)

    criteria = StoppingCriteriaList([MaxTimeCriteria(1e6), enough])
    want, got = both(model, given, do_sample=False, logits_processor=[Forbid()], stopping_criteria=criteria)
    assert got.tolist() == want.tolist()
    assert got.shape[1] == 41
    assert lengths == [*range(34, 42)] * 2


def test_keys_that_are_read_are_counted():
    decode = {**DECODE, "refresh": None}
    model, given, kept = small_llama(METHODS["full"], decode), texts(THREE), []
    for write in (type(model).generate, sparsetrain.generate):
        cache = sparsetrain.SparseCache(model, max_length=80)
        with observing():
            write(model, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        kept.append([layer.memory.observations() for layer in cache.layers])
    assert kept[0] == kept[1]
    assert 0 < kept[0][1]["kept"] < 1


@pytest.mark.parametrize("tokens", [0, -1, 2.5, "x", True])
def test_parts_of_a_prompt_without_tokens_are_refused(tokens):
    model = small_llama(METHODS["power"])
    cache = sparsetrain.SparseCache(model, max_length=40)
    with pytest.raises(ModelError, match=rf"prefill_chunk_size={tokens!r}: expected the tokens of a part"):
        sparsetrain.generate(model, **texts(ONE), past_key_values=cache, max_new_tokens=2, prefill_chunk_size=tokens)


def test_a_text_longer_than_its_cache_is_refused():
    model = small_llama(METHODS["power"])
    cache = sparsetrain.SparseCache(model, max_length=40)
    with pytest.raises(ModelError, match="grows to 41 tokens, and this cache was made for max_length=40"):
        sparsetrain.generate(model, **texts(ONE), past_key_values=cache, max_new_tokens=30, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2, "do_sample": False}, "beam search"),
        ({"prompt_lookup_num_tokens": 2, "do_sample": False}, "assisted generation"),
        ({"output_hidden_states": True, "return_dict_in_generate": True, "do_sample": False}, "output_hidden_states"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_other_ways_to_generate_run_in_transformers_loops(settings, reason, warned):
    model, given = small_llama(METHODS["power"]), texts(ONE)
    found = []
    for write in (type(model).generate, sparsetrain.generate):
        cache = sparsetrain.SparseCache(model, max_length=90, rollback=4)
        out = write(model, **given, past_key_values=cache, max_new_tokens=NEW, **settings)
        found.append((out if isinstance(out, torch.Tensor) else out.sequences).tolist())
    assert found[0] == found[1]
    assert f"transformers' own loop: {reason}" in warned.text


def test_other_caches_run_in_transformers_loop(warned):
    model, given = small_llama(METHODS["power"]), texts(ONE)
    got = sparsetrain.generate(model, **given, max_new_tokens=NEW, do_sample=False)
    assert got.tolist() == model.generate(**given, max_new_tokens=NEW, do_sample=False).tolist()
    assert "no SparseCache" in warned.text


def test_a_model_on_several_devices_has_no_graph():
    model = small_llama(METHODS["power"])
    arguments = {"past_key_values": sparsetrain.SparseCache(model, max_length=80)}
    assert why_not(model, arguments) is None
    model.lm_head.to("meta")
    assert why_not(model, arguments) == "the model's weights are on several devices"


def test_keys_in_host_memory(captures):
    model, given, found = small_llama(METHODS["power"]), texts(THREE), []
    for write in (type(model).generate, sparsetrain.generate):
        cache = sparsetrain.SparseCache(model, max_length=80, offload=True)
        found.append(write(model, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False).tolist())
    assert found[0] == found[1]
    assert len(captures) == 1


@pytest.mark.parametrize("how", ["capture", "inputs"])
def test_a_step_that_cannot_be_captured_runs_as_it_is(how, monkeypatch, warned):
    def fails(step: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    if how == "capture":
        monkeypatch.setattr(CapturedStep, "capture", fails)
    else:
        monkeypatch.setattr(CapturedStep, "goes_on", lambda step, inputs: False)
    for do_sample in (False, True):
        want, got = both(small_llama(METHODS["power"]), texts(THREE), do_sample=do_sample)
        assert got.tolist() == want.tolist()
    assert "steps run one by one: " in warned.text
    assert "more" not in warned.text
