from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from sparsetrain.bench import generating
from sparsetrain.bench.case import fill
from sparsetrain.bench.cases import generate
from sparsetrain.bench.contenders.writers import WAYS, without_attention
from sparsetrain.bench.generating import GenerateRow
from sparsetrain.bench.table import Report
from sparsetrain.cli import main

SMALL: dict[str, Any] = {"device": "cpu", "lengths": "280", "new_tokens": 2}
NAMED = {way.name: way for way in WAYS}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def measured(**options: Any) -> dict[str, GenerateRow]:
    case = generate.case(generate.Options(**{**SMALL, **options}))
    report = Report("generate", case.facts(), command="sparsetrain bench generate")
    list(fill(report, case, lambda line: None))
    return {row.name: row for row in report.rows}


def made(name: str) -> tuple[Any, Any, torch.Tensor]:
    """A model, its empty cache, and prompts."""
    case = generate.case(generate.Options(**SMALL))
    way = NAMED[name]
    model = way.model(case.config, torch.float32, torch.device("cpu"))
    return model, way.cache(model, 300), case.inputs(280, Report("generate", {}), print)


@pytest.mark.parametrize("how", ["prefill", "random"])
def test_every_way_generates(how):
    rows = measured(fill=how)
    assert list(rows) == list(NAMED)
    assert {name: row.remark for name, row in rows.items() if row.remark} == {}
    assert all(row.rate > 0 and row.graph_rate is None and row.peak_gb is None for row in rows.values())
    assert all((row.prompt_seconds is None) == (how == "random") for row in rows.values())
    twilight = {"twilight", "twilight-quest", "twilight-own", "refresh", "hybrid-refresh"}
    # These have room for more keys than there are.
    choosing = {*twilight, "quest", "channels", "recycled"}
    assert {name for name, row in rows.items() if row.kept is not None} == choosing
    assert all(rows[name].kept < 1 for name in twilight)
    # Pages of 256 tokens, and 3 layers, 2 rows, 2 KV heads of 16 in fp32.
    assert 1e9 * rows["dynamic"].cache_gb == 2 * 3 * 2 * 2 * 16 * 4 * (280 + 4 + 2 + 1)
    assert rows["full"].cache_gb > rows["dynamic"].cache_gb
    assert rows["twilight-quest"].cache_gb > rows["twilight"].cache_gb > rows["full"].cache_gb


@torch.no_grad()
def test_the_caches_of_full_attention_go_on_alike():
    logits = []
    for name in ("dynamic", "static", "full"):
        model, cache, ids = made(name)
        token = NAMED[name].read_prompt(model, cache, ids)
        logits.append(model(token, past_key_values=cache, use_cache=True).logits)
        assert int(cache.get_seq_length()) == 281
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMED)
def test_random_keys_fill_a_cache_as_long_as_the_prompt(name):
    model, cache, ids = made(name)
    memories = [getattr(layer, "memory", None) for layer in cache.layers]
    attends = [getattr(each, "_attend", None) for each in memories]
    token = NAMED[name].fill(model, cache, ids)
    assert int(cache.get_seq_length()) == 280
    assert [getattr(each, "_attend", None) for each in memories] == attends
    assert model.config._attn_implementation == ("sdpa" if NAMED[name].method is None else "sparsetrain")
    out = model(token, past_key_values=cache, use_cache=True).logits
    assert out.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "power", "sparsek", "hybrid-refresh"])
def test_steps_without_attention_leave_memories_as_they_are(name):
    model, cache, ids = made(name)
    token = NAMED[name].read_prompt(model, cache, ids)
    before = copy.deepcopy([vars(layer.memory) for layer in cache.layers])
    with without_attention(cache):
        without = model(token, past_key_values=cache, use_cache=True).logits
    after = [vars(layer.memory) for layer in cache.layers]
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(one[name], other[name]) for name in tensors)
    assert not torch.allclose(without, model(token, past_key_values=cache, use_cache=True).logits)


def test_recycled_attention_generates_by_its_own_settings():
    case = generate.case(generate.Options(**SMALL))
    model = NAMED["recycled"].model(case.config, torch.float32, torch.device("cpu"))
    record = model.config.sparsetrain
    assert record["attention"]["method"] == "recycled"
    assert record["decode"]["dense_layers"] == []
    assert record["decode"]["refresh"] == {
        "every": 32,
        "keep": 2048,
        "similarity": None,
        "staggered": False,
        "choose": "full",
    }
    # All keys stay, and the choice beside them.
    rows = measured(ways="full,recycled")
    assert rows["recycled"].cache_gb > rows["full"].cache_gb


def test_what_does_not_fit_is_refused_in_bytes(monkeypatch):
    monkeypatch.setattr(generating, "memory", lambda device: 1_400_000)
    rows = measured(ways="dynamic,twilight,power")
    passing = 2 * 280 * 4 * (4 * 64 + 3 * 128)
    for name in ("dynamic", "twilight"):
        assert rows[name].rate is None
        assert f"{passing:,} for the prompt), and the device has 1,400,000; lower --layers" in rows[name].reason
    keys = [
        int(rows[name].reason.split(" of keys")[0].split()[-1].replace(",", "")) for name in ("dynamic", "twilight")
    ]
    assert keys[0] == 3 * 2 * 2 * 2 * 16 * 4 * (280 + 5 * 2 + 32)
    assert keys[1] == keys[0] * (2 * 16 * 4 + 16 // 2 + 4) // (2 * 16 * 4)


@pytest.mark.usefixtures("on_cpu")
def test_it_is_a_command(capsys, tmp_path):
    arguments = ["--lengths", "40", "--new-tokens", "1", "--layers", "1", "--ways", "dynamic,power"]
    assert main(["bench", "generate", *arguments, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "CPU timings of a tiny model" in shown
    assert "Keys of a pass of random prompts; 1 greedy token after them. 1 layer with" in shown
    record = json.loads((tmp_path / "generate.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["dynamic", "power"]
    assert main(["bench", "generate", "--ways", "fast"]) == 2
    assert "--ways fast: there is no such way; choose from dynamic, static, full" in capsys.readouterr().err
