"""Attention error on sampled rows: that of full attention, of oracles and of a window, by definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from sparsetrain.cli import main
from sparsetrain.errors import ModelError
from sparsetrain.evaluation.attention_error.result import AttentionErrorResult
from sparsetrain.evaluation.attention_error.rows import compare_rows
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.attention_error import AttentionErrorSection
from sparsetrain.methods.base import Method
from sparsetrain.methods.full import FullMethod
from sparsetrain.modeling import sparse_layers, sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World

HERE = World(0, 1, torch.device("cpu"))
METHODS = {
    "power": {"method": "power", "block": 16, "window": 2},
    "sparsek": {"method": "sparsek", "topk": 24, "window": 16, "sinks": 2},
    "recycled": {"method": "recycled", "every": 8, "keep": 24, "sinks": 2, "recent": 8},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text("".join(f"It was {number} years ago, and {number * 7} days. " for number in range(40)))
    return path


def task(path: Path, **settings) -> AttentionErrorSection:
    given = {"lengths": [128, 256], "windows": 2, "rows": 16} | settings
    return AttentionErrorSection(source=DataSource(path=str(path)), **given)


def measured(model, tokenizer, section) -> AttentionErrorResult:
    return evaluate(model, tokenizer, EvalSection(tasks=[section]), HERE).tasks["attention_error"]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("together", [2**24, 500])
def test_rows_are_compared_as_the_definition_says(monkeypatch, sinks, together):
    monkeypatch.setattr("sparsetrain.evaluation.attention_error.rows.TOGETHER", together)
    torch.manual_seed(0)
    key, value, asked = torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.randn(4, 3, 8) * 2
    rows = torch.tensor([7, 21, 39])
    read = (torch.rand(2, 3, 40) < 0.4) & (torch.arange(40) <= rows[:, None])
    read[:, range(3), rows] = True
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None
    out = torch.randn(4, 3, 8)
    found = compare_rows(asked, key, value, read, out, rows, scale=0.3, softcap=5.0, sink_logits=sink)

    expected: dict[str, list[float]] = {name: [] for name in found}
    for head in range(4):
        for index, row in enumerate(rows.tolist()):
            k, v = key[head // 2, : row + 1].double(), value[head // 2, : row + 1].double()
            logits = 5.0 * torch.tanh(k @ asked[head, index].double() * 0.3 / 5.0)
            weights = logits.softmax(0)
            added = 0.0 if sink is None else float(sink[head].double().exp())

            def attended(chosen, logits=logits, v=v, added=added):
                held = logits[chosen].exp()
                return held @ v[chosen] / (held.sum() + added)

            whole = attended(torch.arange(row + 1))
            own = read[head // 2, index].nonzero()[:, 0]
            largest = weights.argsort(descending=True)
            nearest = torch.arange(row + 1 - len(own), row + 1)
            mass = weights[own].sum()
            needed = int((weights[largest].cumsum(0) < mass * (1 - 1e-6)).sum()) + 1
            values = {"mass": mass, "keys": len(own), "top_p_keys": needed}
            values["error"] = (out[head, index] - whole).norm() / whole.norm()
            for name, chosen in {"top_k": largest[: len(own)], "window": nearest}.items():
                values[f"{name}_mass"] = weights[chosen].sum()
                values[f"{name}_error"] = (attended(chosen) - whole).norm() / whole.norm()
            for name, one in values.items():
                expected[name].append(float(one))
    assert found == pytest.approx({name: sum(each) / 12 for name, each in expected.items()}, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_loses_what_it_leaves_out_and_no_more_than_oracles_allow(tiny_model, byte_tokenizer, text, method):
    full = measured(tiny_model, byte_tokenizer, task(text))
    for layer in full.layers[256]:
        assert (layer.mass, layer.keys) == pytest.approx((1.0, full.before[256]))
        assert layer.error < 1e-5
    sparsify(tiny_model, METHODS[method])
    result = measured(tiny_model, byte_tokenizer, task(text))
    assert [layer.layer for layer in result.layers[256]] == [0, 1]
    for length, layers in result.layers.items():
        for layer in layers:
            assert layer.mass <= layer.top_k_mass < 1
            assert layer.window_mass <= layer.top_k_mass
            assert layer.top_p_keys <= layer.keys < result.before[length]
            assert layer.error > 1e-3
    assert result.metrics()["/256/keys"] == pytest.approx(sum(layer.keys for layer in result.layers[256]) / 2)
    assert result.metrics()["/error"] == result.metrics()["/256/error"] != result.metrics()["/128/error"]
    assert result.metrics()["/256/error/layer_01"] == result.layers[256][1].error
    assert result.score() == -result.metrics()["/256/error"]
    assert AttentionErrorResult.model_validate_json(result.model_dump_json()) == result
    report = AttentionErrorResult.report({"full": full, method: result})
    assert [row[:2] for row in report.rows[1:]] == [["full", "128"], ["full", "256"], [method, "128"], [method, "256"]]
    drawing = AttentionErrorResult.drawing("attention_error", {"full": full, method: result}, None)
    figure = Figure(figsize=(drawing.width, drawing.height))
    drawing.draw(figure)
    assert [len(axes.lines) for axes in figure.axes] == [6, 6, 4]
    # Nothing stays behind in the model.
    assert all("attend" not in vars(found) for _, _, found in sparse_layers(tiny_model))


def test_a_sliding_window_is_the_window_of_equal_size(tiny_model, byte_tokenizer, text):
    sparsify(tiny_model, {"method": "sliding", "block": 1, "window": 20, "sinks": 0})
    for layer in measured(tiny_model, byte_tokenizer, task(text)).layers[256]:
        assert layer.keys == 20
        assert layer.mass == pytest.approx(layer.window_mass, rel=1e-5)
        assert layer.error == pytest.approx(layer.window_error, rel=1e-4)


def test_dense_layers_are_not_compared(tiny_model, byte_tokenizer, text):
    sparsify(tiny_model, {**METHODS["power"], "dense_layers": [0]})
    assert [layer.layer for layer in measured(tiny_model, byte_tokenizer, task(text)).layers[256]] == [1]


def test_a_method_that_does_not_say_what_it_reads_is_refused(tiny_model, byte_tokenizer, text, monkeypatch):
    monkeypatch.setattr(FullMethod, "keys_read", Method.keys_read)
    with pytest.raises(ModelError, match=r"attention_error\.task: FullMethod does not say which keys a token reads"):
        measured(tiny_model, byte_tokenizer, task(text))


def test_settings_that_contradict_one_another_are_refused(text):
    faults = dict(task(text, rows=65).faults())
    assert faults == {"rows": "the second half of a window of 128 tokens has no 65; give at most 64"}
    source = {"synthetic": "passkey"}
    section = AttentionErrorSection(source=DataSource(**source), lengths=[128], rows=8)
    assert "source.synthetic" in dict(section.faults())


def test_the_command_measures_methods_in_rows(tiny_folder, text, tmp_path):
    out = tmp_path / "rows.json"
    settings = f"eval.tasks.attention_error={{source: {{path: {text}}}, lengths: [128], windows: 1, rows: 8}}"
    arguments = ["eval", str(tiny_folder), settings, "--attention", "trained", "--attention", "sliding"]
    assert main([*arguments, "--output", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    tasks = [row["tasks"]["attention_error"] for row in rows.values()]
    assert [len(each["layers"]["128"]) for each in tasks] == [1, 1]
    assert tasks[0]["digest"] == tasks[1]["digest"]
