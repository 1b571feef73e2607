"""Twilight, Quest and RefreshKV through ``generate``: a choice of everything is full attention, and a smaller choice is
the same one by one, in a batch, with guesses and after a reload."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from decode_steps import SHAPE, logits, prompts, small_llama
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaConfig, Qwen3Config

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.generation import listed
from sparsetrain.generation.composition import FULL, LEARNED, PARTS, PATTERN, REASONS, RECYCLED, WINDOW, parts_of
from sparsetrain.generation.listed import ListedMemory
from sparsetrain.generation.observed import observing
from sparsetrain.generation.settings import PUBLISHED, parse_decode

SMALL = {"sinks": 1, "recent": 2, "dense_layers": [0]}
EVERYTHING = {
    "all weight": {"prune": {"p": 1.0}},
    "all pages": {"select": "quest", "candidates": 4096},
    "all weight of all pages": {"select": "quest", "prune": {"p": 1.0}},
    "all tokens by channels": {"select": "channels", "channels": 4, "candidates": 4096},
    "all weight of all tokens by channels": {"select": "channels", "channels": 4, "prune": {"p": 1.0}},
    "all keys, chosen at every token": {"refresh": {"every": 1, "keep": 4096}},
    "all keys, used again": {"refresh": {"every": 5, "keep": 4096}},
    "all keys by exact weights, used again": {"refresh": {"every": 5, "keep": 4096, "choose": "full"}},
    "exact weights at every token": {"refresh": {"every": 1, "keep": 1, "choose": "full"}},
}
FEW = {
    "top-p": {"prune": {"p": 0.6, "min_keys": 1}},
    "top-p of the largest weight in a group": {"prune": {"p": 0.6, "min_keys": 1, "group": "max"}},
    "Quest": {"select": "quest", "candidates": 16},
    "top-p of Quest": {"select": "quest", "candidates": 32, "prune": {"p": 0.5, "min_keys": 1}},
    "top-p, used again": {"prune": {"p": 0.5, "min_keys": 1}, "refresh": {"every": 4}},
    "top-k": {"refresh": {"every": 3, "keep": 5, "staggered": False}},
    "top-k by similarity": {"refresh": {"every": 2, "keep": 12, "similarity": 0.2}},
    "channels": {"select": "channels", "channels": 4, "candidates": 16},
    "top-p of channels": {"select": "channels", "channels": 4, "candidates": 32, "prune": {"p": 0.5, "min_keys": 1}},
    "top-k of channels, used again": {
        "select": "channels",
        "channels": 4,
        "candidates": 32,
        "refresh": {"every": 3, "keep": 8},
    },
    "top-p of channels by similarity": {
        "select": "channels",
        "channels": 4,
        "candidates": 32,
        "prune": {"p": 0.5, "min_keys": 1},
        "refresh": {"every": 2, "similarity": 0.2},
    },
    "channels, used again": {"select": "channels", "channels": 4, "candidates": 16, "refresh": {"every": 4}},
    "top-k by exact weights": {"refresh": {"every": 3, "keep": 5, "choose": "full"}},
    "top-p by exact weights": {"prune": {"p": 0.5, "min_keys": 1}, "refresh": {"every": 4, "choose": "full"}},
    "top-k by exact weights and similarity": {
        "refresh": {"every": 2, "keep": 5, "similarity": 0.2, "choose": "full", "staggered": False},
    },
    "Quest, used again": {"select": "quest", "candidates": 16, "refresh": {"every": 4}},
}


def make(decode=None, attention=None, **shape):
    return small_llama(attention, None if decode is None else SMALL | decode, **shape)


@cache
def dense(*lengths):
    """Logits and tokens of full attention behind prompts of these lengths."""
    return logits(make(), *prompts(*lengths))[:2]


@pytest.mark.parametrize("decode", EVERYTHING.values(), ids=EVERYTHING)
def test_a_choice_of_everything_is_full_attention(decode):
    ids, mask = prompts(90, 33, 7)
    expected, tokens = dense(90, 33, 7)
    found, same, _ = logits(make(decode), ids, mask)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decode", FEW.values(), ids=FEW)
def test_fewer_keys_change_the_result_and_are_counted(decode):
    ids, mask = prompts(90)
    expected, _ = dense(90)
    with observing():
        found, _, cache = logits(make(decode), ids, mask)
    assert not torch.allclose(found[:, 1:], expected[:, 1:], atol=1e-2)
    torch.testing.assert_close(found[:, 0], expected[:, 0])  # the prompt attends to everything
    memories = [layer.memory for layer in cache.layers]
    assert [isinstance(memory, ListedMemory) for memory in memories] == [False, True, True]
    seen = memories[1].observations()
    assert 0.05 < seen["kept"] < 0.9
    assert 0 < seen["mass_min"] <= seen["mass_mean"] < 1.0001
    if "prune" in decode and "candidates" not in decode and "refresh" not in decode and "group" not in decode["prune"]:
        assert seen["mass_min"] > decode["prune"]["p"] - 0.1


COMPOSED = (
    "top-p of the largest weight in a group",
    "top-p of Quest",
    "Quest, used again",
    "top-k by similarity",
    "top-k of channels, used again",
    "top-p of channels by similarity",
    "top-p by exact weights",
    "top-k by exact weights and similarity",
)
"""Every part, each beside others."""


@pytest.mark.parametrize("name", COMPOSED)
def test_rows_of_a_batch_are_as_alone(name):
    ids, mask = prompts(90, 33)
    model = make(FEW[name])
    together, _, _ = logits(model, ids, mask, 9)
    for row, length in enumerate((90, 33)):
        alone, _, _ = logits(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:], 9)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["top-p", "top-p of Quest", "top-k", "channels", "top-p of channels"])
@pytest.mark.parametrize("lengths", [(96,), (96, 20, 50)], ids=str)
def test_chunks_of_a_prompt_choose_as_the_whole_does(name, lengths, monkeypatch):
    """Among them chunks that are padding, and prompts whose tokens differ from their beginnings'."""
    model, (ids, mask) = make(FEW[name]), prompts(*lengths)
    ids[:, :40] = ids[:, :40] % 3 + (mask[:, :40] > 0).long()
    chosen = []
    original = listed.listed_decode

    def noted(query, keys, values, lists, counts, **options):
        real = torch.arange(lists.shape[-1]) < counts[..., None]
        chosen.append(torch.where(real, lists, -1))
        return original(query, keys, values, lists, counts, **options)

    monkeypatch.setattr(listed, "listed_decode", noted)
    _, whole, _ = logits(model, ids, mask, count=6)
    wanted, chosen = chosen, []
    _, chunked, _ = logits(model, ids, mask, count=6, prefill_chunk_size=32)
    assert torch.equal(whole, chunked)
    assert len(wanted) == len(chosen) == 10
    for want, found in zip(wanted, chosen, strict=True):
        width = max(int((each >= 0).sum(-1).max()) for each in (want, found))
        assert torch.equal(want[..., :width], found[..., :width])


def look_up(model, ids, **settings):
    """Greedy tokens; prompt lookup guesses several at a time and takes the wrong ones back, choices too."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **settings)


def repeating():
    """A prompt whose tokens come again, so that guesses are made."""
    return torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(1, 5)


@pytest.mark.parametrize("name", ["top-p", "channels", *COMPOSED])
def test_guesses_change_nothing(name):
    """More of them at a time than a kernel takes, as assistants guess by default."""
    model, ids = make(FEW[name], initializer_range=0.1), repeating()
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    new, wrong = ids[:, 20:36], ids[:, :20]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        want = torch.cat([model(token, past_key_values=caches[0]).logits for token in new.split(1, dim=1)], dim=1)
        caches[1].activate_past_recording()
        got = model(torch.cat([new[:, :4], wrong], 1), past_key_values=caches[1]).logits[:, :4]
        caches[1].crop(-20)
        got = torch.cat([got, model(new[:, 4:], past_key_values=caches[1]).logits], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["top-p of Quest", "channels"])
def test_looked_up_guesses_change_nothing(name):
    """As those of what is used again do below."""
    model, ids = make(FEW[name], initializer_range=0.1), repeating()
    assert torch.equal(look_up(model, ids), look_up(model, ids, prompt_lookup_num_tokens=5))


@pytest.mark.parametrize("decode", [FEW["top-p of Quest"], FEW["top-p, used again"]], ids=["Quest", "used again"])
def test_beams_turns_and_other_heads(decode):
    ids, mask = prompts(60, 21)
    model = make(decode, num_key_value_heads=4)
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, 68)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat(
        [first.sequences, torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(5))], dim=1
    )
    longer = torch.cat([mask, torch.ones(2, turn.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    again = model.generate(
        turn, attention_mask=longer, max_new_tokens=4, do_sample=False, past_key_values=first.past_key_values
    )
    assert again.shape == (2, turn.shape[1] + 4)


@pytest.mark.parametrize("order", [[1, 0], [1, 1, 0]])
@pytest.mark.parametrize("name", ["top-k", "top-p, used again", "Quest, used again"])
@torch.inference_mode()
def test_rows_that_change_places_take_along_what_is_used_again(name, order):
    """As beams do, here between a step that chooses and one that uses the choice again."""
    model, (ids, _) = make(FEW[name]), prompts(60, 60)
    tokens = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(6))
    places = torch.tensor(order)

    def steps(moved):
        cache, rows = sparsetrain.SparseCache(model, max_length=80), torch.arange(2)
        model(ids, past_key_values=cache)
        for step in range(6):
            if step == 2 and moved:
                cache.batch_select_indices(places) if len(places) > 2 else cache.reorder_cache(places)
                rows = places
            last = model(tokens[rows, step : step + 1], past_key_values=cache).logits
            if step >= 2:
                yield last

    for found, expected in zip(steps(True), steps(False), strict=True):
        torch.testing.assert_close(found, expected[places])


COMPILED = ("top-p", "Quest, used again", "top-p of channels by similarity", "top-k by exact weights and similarity")


@pytest.mark.parametrize("name", COMPILED)
def test_steps_compile_to_one_graph(name):
    """In room that is made once, where all keys are candidates as in room that grows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    ids, mask = prompts(90, 33)
    model = make(FEW[name] | {"dense_layers": []}, num_hidden_layers=1)
    expected, _, _ = logits(model, ids, mask, 9)
    cache = sparsetrain.SparseCache(model, max_length=110)
    found, _, _ = logits(model, ids, mask, 9, past_key_values=cache, compile_config=config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Other prompts in the same room.
    cache.reset()
    ids, mask = prompts(21, 70)
    expected, _, _ = logits(model, ids, mask, 6)
    found, _, _ = logits(model, ids, mask, 6, past_key_values=cache, compile_config=config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


USED_AGAIN = [name for name in COMPOSED if "refresh" in FEW[name]]


@pytest.mark.parametrize("name", USED_AGAIN)
def test_looked_up_guesses_are_taken_back_from_choices(name):
    """In room that grows, and in room that is made once, where choices are kept in tensors, as many as guesses may
    reach back."""
    model, ids = make(FEW[name], initializer_range=0.1), repeating()
    greedy = look_up(model, ids)
    assert torch.equal(greedy, look_up(model, ids, prompt_lookup_num_tokens=5))
    cache = sparsetrain.SparseCache(model, max_length=120, rollback=6)
    for _ in range(2):
        assert torch.equal(greedy, look_up(model, ids, past_key_values=cache, prompt_lookup_num_tokens=5))
        held = cache.nbytes()
        cache.reset()
        assert cache.nbytes() == held
    # All that was generated, which is more than is kept for guesses, and then it is generated again.
    passes = []
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(2):
            steps = [model(token, past_key_values=cache).logits for token in greedy[:, 60:76].split(1, dim=1)]
            passes.append(torch.cat(steps))
            cache.crop(-16)
    assert torch.equal(*passes)


@pytest.mark.parametrize("name", USED_AGAIN)
def test_choices_grow_with_their_room(name, monkeypatch):
    monkeypatch.setattr("sparsetrain.generation.memories.PAGE", 16)
    model = make(FEW[name])
    ids, mask = prompts(40, 9)
    expected, _, _ = logits(model, ids, mask, 30, past_key_values=sparsetrain.SparseCache(model, max_length=112))
    found, _, _ = logits(model, ids, mask, 30)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_record_brings_it_back(tmp_path):
    model = make(FEW["top-p, used again"])
    ids, mask = prompts(70)
    sparsetrain.save(model, tmp_path / "saved")
    loaded = sparsetrain.load(tmp_path / "saved").eval()
    assert loaded.config.sparsetrain["decode"] == model.config.sparsetrain["decode"]
    assert torch.equal(logits(loaded, ids, mask)[0], logits(model, ids, mask)[0])
    dense = sparsetrain.set_decode(loaded, None)
    assert "decode" not in dense.config.sparsetrain
    assert torch.equal(logits(dense, ids, mask)[0], logits(make(), ids, mask)[0])


@pytest.mark.parametrize("decode", [None, {"select": "best"}, {"prune": {"p": 0.5}}])
def test_records_that_differ_are_refused(tmp_path, decode):
    sparsetrain.save(make(FEW["top-p"]), tmp_path)
    file = tmp_path / "sparsetrain.json"
    record = {name: value for name, value in json.loads(file.read_text()).items() if name != "decode"}
    file.write_text(json.dumps(record if decode is None else {**record, "decode": decode}))
    with pytest.raises(ModelError, match=r"json (records decode=|is damaged: decode.select)"):
        sparsetrain.load(tmp_path)


def test_layers_have_shares_of_their_own(tmp_path):
    ids, mask = prompts(90)
    few, many = (make({"prune": {"p": p, "min_keys": 1}}) for p in (0.3, 0.9))
    mixed = make({"prune": {"p": {"1": 0.3, "2": 0.9}, "min_keys": 1}})
    sparsetrain.save(mixed, tmp_path / "saved")
    loaded = sparsetrain.load(tmp_path / "saved").eval()
    assert loaded.config.sparsetrain["decode"]["prune"]["p"] == {"1": 0.3, "2": 0.9}
    kept = {}
    for name, model in {"few": few, "many": many, "mixed": loaded}.items():
        with observing():
            _, _, cache = logits(model, ids, mask, count=2)
        kept[name] = [layer.memory.observations()["kept"] for layer in cache.layers[1:]]
    assert kept["mixed"][0] == kept["few"][0]
    assert kept["mixed"][1] == pytest.approx(kept["many"][1], abs=0.1)
    assert kept["few"][1] < kept["mixed"][1]


def test_only_dense_layers_of_a_trained_model_take_it():
    power = {"method": "power", "block": 16, "window": 2, "sinks": 1, "dense_layers": [1]}
    ids, mask = prompts(90)
    _, _, cache = logits(make(FEW["top-p"], power), ids, mask)
    assert [isinstance(layer.memory, ListedMemory) for layer in cache.layers] == [False, True, False]


METHODS = {
    WINDOW: {"method": "sliding", "block": 16, "window": 2},
    PATTERN: {"method": "power", "block": 16, "window": 2, "sinks": 1},
    LEARNED: {"method": "sparsek", "topk": 8, "window": 8},
    FULL: {"method": "full"},
    RECYCLED: {"method": "recycled", "every": 4, "keep": 8},
}
PRUNE, REFRESH = {"prune": {"p": 0.9}}, {"refresh": {"every": 2, "keep": 8}}
SECTIONS = [
    PRUNE,
    REFRESH,
    PRUNE | {"refresh": {"every": 2}},
    *({"select": select, **added} for select in ("quest", "channels") for added in ({}, PRUNE, REFRESH)),
    {"select": "own", **PRUNE},
    {"select": "own", **PRUNE, "refresh": {"every": 2}},
]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_every_cell_of_the_table(kind, section):
    """What no reason stands against is taken by the layers and generates; all else is refused with its reason."""
    model, parts = make(attention=METHODS[kind]), parts_of(parse_decode(section))
    against = [part for part in parts if (kind, part) in REASONS]
    if not against:
        sparsetrain.set_decode(model, SMALL | section)
        assert logits(model, *prompts(40), count=2)[0].isfinite().all()
        return
    with pytest.raises(ModelError, match=f"does not go with {kind}") as error:
        sparsetrain.set_decode(model, SMALL | section)
    assert REASONS[kind, against[0]] in str(error.value)
    named = f"decode.{'' if against[0] in ('prune', 'refresh') else 'select='}{against[0]} "
    assert str(error.value).startswith(named)


def test_the_table_is_that_of_the_design():
    """Windows take nothing, own sets go with what has one, and what costs nothing to know is not used again."""
    composes = {kind: {part for part in PARTS if (kind, part) not in REASONS} for kind in METHODS}
    assert composes == {
        FULL: {"full", "quest", "channels", "prune", "refresh"},
        RECYCLED: {"full", "quest", "channels", "prune", "refresh"},
        WINDOW: set(),
        PATTERN: {"own", "prune"},
        LEARNED: {"own", "prune"},
    }


def test_sliding_layers_of_a_model_are_left(tmp_path):
    shape = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16}
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, **shape)
    model = sparsetrain.sparsify(AutoModelForCausalLM.from_config(config).eval(), {"method": "full"})
    _, _, cache = logits(sparsetrain.set_decode(model, SMALL | FEW["top-p"]), *prompts(60))
    assert [isinstance(layer.memory, ListedMemory) for layer in cache.layers] == [False, True, False]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_have_names(name):
    assert parse_decode(name) == parse_decode(PUBLISHED[name])


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        ({"select": "best"}, "decode.select"),
        ({"prune": {"p": 0}}, r"decode.prune.p: .*greater than 0"),
        ({"prune": {"p": 1.5}}, r"decode.prune.p: .*less than or equal to 1"),
        ({"prune": {"p": "much"}}, r"decode.prune.p: .*valid number"),
        ({"prune": {"p": {2: 1.5}}}, r"decode.prune.p.2: .*less than or equal to 1"),
        ({"prune": {"p": {"last": 0.5}}}, r"decode.prune.p.last: .*valid integer"),
        ({"prune": {"p": {2: 0.5, 7: 0.9}}}, "p=0.9 for layer 7 has no effect.*are 2; drop it"),
        ({"prune": {"p": {1: 0.5, 2: 0.9}}}, "p=0.5 for layer 1 has no effect"),
        ({"prune": {"p": {1: 0.5}}, "dense_layers": [0]}, "says nothing of layer 2"),
        ({"prune": {"q": 0.5}}, "decode.prune.q: there is no such field; choose one of p, group, min_keys"),
        ({"prune": 0.9}, "decode.prune: must be a mapping such as {p: 0.9}, not 0.9"),
        (5, "decode=5 is neither a name such as twilight nor a mapping"),
        ({"refresh": {"every": 4}}, "give refresh.keep or prune.p"),
        ({"refresh": {"every": 0, "keep": 4}}, "decode.refresh.every"),
        ({"refresh": {"every": 4, "keep": True}}, "decode.refresh.keep: true is no value"),
        ({"refresh": {"every": 4, "keep": 1.0}}, "refresh.keep=1.0 would be one token, not the whole prompt"),
        ({"refresh": {"every": 4, "keep": 8}, "prune": {}}, "drop one of them"),
        ({"candidates": 64, "prune": {}}, "candidates=64 is for select=quest or channels"),
        ({}, "give prune, refresh, select=quest or select=channels"),
        ("twilit", "decode=twilit is not known"),
        ({"prune": {}, "dense_layers": [0, 1, 2]}, "leaves no layer"),
        ({"prune": {}, "dense_layers": [0, 99]}, "names layer 99.*is 2; drop it"),
    ],
)
def test_what_cannot_be_done_is_refused(decode, message):
    with pytest.raises(ModelError, match=message):
        sparsetrain.set_decode(make(), decode)


def test_a_model_without_a_method_is_told_how_to_get_one():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(ModelError, match="sparsify"):
        sparsetrain.set_decode(model, "twilight")
