"""The experiment on top-p attention: its method equals its definition, p falls, and all models read as many keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attention_oracle import make_inputs
from sparsetrain.recipes.evidence.top_p import SHARES_OF_KEYS, TRAINED, Outcome, main, perplexities, table
from sparsetrain.recipes.evidence.top_p_method import TopPConfig, keys_read, register
from sparsetrain_kernels import top_p_attention

from sparsetrain.errors import ModelError
from sparsetrain.methods.installed import INSTALLED
from sparsetrain.methods.registry import find_config, method_names
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

OPTIONS = {"cu_seqlens": None, "q_start": None, "scale": 0.25, "softcap": None, "sink_logits": None}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(INSTALLED, "entries", dict(INSTALLED.entries))
    monkeypatch.setattr(INSTALLED, "_usable", dict(INSTALLED._usable))
    register()


def test_the_method_is_known_where_it_is_registered_alone(registered):
    assert find_config("top-p") is TopPConfig


def test_no_recipe_knows_it_otherwise():
    assert "top-p" not in method_names()


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
def test_a_layer_equals_the_sorted_definition(p):
    method = TopPConfig(p=p).build()
    query, key, value = (tensor.detach() for tensor in make_inputs(4, 2, 70, dtype=torch.float64))
    expected = method.expected(None, query, key, value, document=slice(0, 70), **OPTIONS)
    out = method.attend(None, query, key, value, **OPTIONS)
    torch.testing.assert_close(out[:, :, expected.rows], expected.output, rtol=0, atol=1e-12)


def test_p_falls_from_one_and_stays():
    method = TopPConfig(p=0.9, falling=0.5).build()
    shares = []
    for step in range(0, 100, 25):
        method.begin_step(step, 100)
        shares.append(method.p)
    assert shares == pytest.approx([1.0, 0.95, 0.9, 0.9])


def test_what_the_operation_lacks_is_refused():
    method = TopPConfig().build()
    with pytest.raises(ModelError, match=r"attention\.method=top-p knows no softcap"):
        method.attend(None, *make_inputs(2, 1, 8), **{**OPTIONS, "softcap": 30.0})


@pytest.mark.parametrize("bounds", [None, [0, 1, 30, 70]])
def test_the_keys_that_are_read_are_counted(bounds):
    """The count is by weights in fp16, so it is that of a share that differs by a few thousandths."""
    query, key = (tensor.detach() for tensor in make_inputs(2, 1, 70, dtype=torch.float64)[:2])
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    # With unit vectors as values, the output is the weight of each key.
    wide = [torch.nn.functional.pad(tensor, (0, 70 - 16)) for tensor in (query, key)]
    unit = torch.eye(70, dtype=torch.float64)[None, None]

    def exact(p):
        weights = top_p_attention(*wide, unit, p, window=1, union=True, cu_seqlens=cu_seqlens, scale=0.25)
        return float((weights[:, 0] > 0).sum(-1).double().mean())

    found = keys_read(query, key, 0.8, **{**OPTIONS, "cu_seqlens": cu_seqlens})
    assert exact(0.797) <= found <= exact(0.803)
    assert exact(0.803) - exact(0.797) < 0.03 * exact(0.8)


def test_the_table_has_a_row_for_each_share_and_training():
    outcomes = [
        Outcome("p = 0.95", "before", 2, 0.95, 30.0, "answers found", 1.0, 0.125),
        Outcome("1/2 of the keys", "before", 2, 0.8, 15.0, "answers found", 0.5, 0.25),
        Outcome("p = 0.95", "full", 2, 0.95, 31.0, "answers found", 1.0, 0.125),
    ]
    assert table(outcomes).splitlines() == [
        "| reads | trained with | seed | p | keys | answers found | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| p = 0.95 | before | 2 | 0.950 | 30.0 | 100.0% | 0.125 |",
        "| p = 0.95 | full | 2 | 0.950 | 31.0 | 100.0% | 0.125 |",
        "| 1/2 of the keys | before | 2 | 0.800 | 15.0 | 50.0% | 0.250 |",
    ]


def test_the_command_trains_and_each_model_reads_half_the_keys(registered, forked, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsetrain.recipes.evidence.top_p.TRAINED", {"top-p": TRAINED["top-p"]})
    monkeypatch.setattr("sparsetrain.recipes.evidence.top_p.SHARES_OF_KEYS", SHARES_OF_KEYS[:1])
    monkeypatch.setattr("sparsetrain.evaluation.decode_settings.SHARES", [0.2, 0.4, 0.6])
    settings = [
        "model.path=sparsetrain:tiny",
        *("train.steps=2", "train.warmup=0", "train.micro_batch=1", "sequence.length=64"),
        "data.sources=[{synthetic: recall, keys: 4, lengths: [64]}]",
        "eval.tasks.recall={source: {synthetic: recall, keys: 4, lengths: [64]}, documents: 2}",
    ]
    main("recall-finetune", settings, seed=[3], out=tmp_path)
    outcomes = [Outcome(**each) for each in json.loads((tmp_path / "table.json").read_text())["measured"]]
    expected = [(reads, trained) for reads in ("p = 0.95", "1/2 of the keys") for trained in ("before", "top-p")]
    assert [(each.reads, each.trained) for each in outcomes] == expected
    whole = outcomes[0].keys
    assert all(each.keys < 0.6 * whole for each in outcomes[2:])
    assert (tmp_path / "top-p-3/final").exists()
    assert '"top-p/keys' in (tmp_path / "top-p-3/metrics.jsonl").read_text()


def test_text_is_read_with_the_same_shares_by_every_model(registered, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    task = json.dumps({"lengths": [128], "tokens": 256, "source": {"path": str(text), "split": "train"}})
    recipe = load_recipe(recipes_folder() / "evidence/recycled-text.yaml", [f"eval.tasks.perplexity={task}"]).recipe
    monkeypatch.setattr("sparsetrain.recipes.evidence.top_p.TEXT_P", (1.0, 0.5))
    whole, half = perplexities({"before": "sparsetrain:tiny"}, recipe, 0)
    assert (whole.reads, half.reads) == ("p = 1.0", "p = 0.5")
    assert whole.keys == pytest.approx(129 / 2)
    assert half.keys < 0.5 * whole.keys
    assert whole.value != half.value
