"""The receptive field: exact by gradients and by the pattern, and what a linear probe finds in hidden states."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from sparsetrain.cli import main
from sparsetrain.errors import DataError
from sparsetrain.evaluation.receptive_field.probe import WIDTH, accuracy, exact_field, last_states, unpack_states
from sparsetrain.evaluation.receptive_field.prompts import Prompts
from sparsetrain.evaluation.receptive_field.result import ReceptiveFieldResult
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.receptive_field import ReceptiveFieldSection
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.world import World

HERE = World(0, 1, torch.device("cpu"))


def random_model(attention, layers=4, hidden=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return sparsify(LlamaForCausalLM(config).eval(), attention)


@pytest.mark.parametrize(
    "attention",
    [
        {"method": "power", "block": 8, "window": 2, "sinks": 0},
        {"method": "power", "block": 8, "window": 2, "sinks": 0, "dense_layers": [2]},
        {"method": "sliding", "block": 8, "window": 3, "sinks": 1},
        {"method": "dilated", "block": 8, "window": 3},
        {"method": "longnet", "block": 8, "segments": [[2, 1], [8, 4]], "head_shift": True},
        {"method": "power", "block": 8, "window": 1, "sinks": 0, "split": "layers", "farthest": 8, "dense_layers": [3]},
        {"method": "power", "block": 8, "window": 1, "sinks": 0, "split": "heads", "farthest": 8, "base": 3},
        {"method": "ruler", "block": 8, "window": 1, "sinks": 0, "keep": 1},
        {"method": "full"},
    ],
    ids=lambda attention: attention["method"],
)
def test_gradients_of_a_random_stack_reach_exactly_what_the_pattern_connects(attention):
    length = 125  # the last block is not whole
    model = random_model(attention)
    pattern, reach = exact_field(model, length)
    embedded = torch.randn(1, length, 32, requires_grad=True)
    with last_states(model, torch.tensor([length - 1])) as states:
        model.model(inputs_embeds=embedded, position_ids=torch.arange(length)[None], use_cache=False)
    assert len(states) == 4
    for layer, state in enumerate(states):
        (gradient,) = torch.autograd.grad((state * torch.randn_like(state)).sum(), embedded, retain_graph=True)
        touched = gradient[0].abs().amax(-1) > 0
        expected = np.repeat(reach[layer], pattern.block)[:length]
        assert touched.tolist() == expected.tolist(), layer
    assert reach[0].sum() < reach.shape[1] or attention["method"] == "full"


def test_methods_that_choose_keys_by_the_text_have_no_exact_field():
    assert exact_field(random_model({"method": "sparsek", "topk": 8, "window": 8}), 64) is None
    assert exact_field(random_model({"method": "recycled", "keep": 8}), 64) is None


def test_a_probe_finds_what_is_there_and_nothing_where_there_is_nothing():
    labels = torch.arange(200) % 10
    told = torch.randn(200, 64) + torch.nn.functional.one_hot(labels, 64) * 6
    nothing = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    found = accuracy(torch.stack([told, nothing]), labels, 10, seed=0)
    assert found[0] > 0.9
    assert 0.03 < found[1] < 0.2
    # A constant names each digit equally often, neither better nor worse than chance.
    assert accuracy(torch.ones(1, 200, 8), labels, 10, seed=0)[0] == pytest.approx(0.1)


def test_wide_states_are_projected_and_keep_their_distances():
    model = random_model({"method": "full"}, layers=1, hidden=1024)
    with last_states(model, torch.tensor([3, 9])) as states, torch.no_grad():
        model.model(input_ids=torch.arange(10)[None], use_cache=False)
    assert states[0].shape == (2, WIDTH)
    assert states[0].norm(dim=-1).tolist() == pytest.approx([1024**0.5] * 2, rel=0.15)


def test_prompts_tell_their_digit_where_they_say(byte_tokenizer):
    prompts = Prompts(byte_tokenizer, 500)
    rng = np.random.default_rng(0)
    texts = set()
    for digit, depth in ((3, 0.0), (7, 0.5), (9, 0.999)):
        prompt = prompts.make(digit, depth, rng)
        text = byte_tokenizer.decode(prompt.tokens)
        assert len(prompt.tokens) == 500
        assert text.endswith("The pass key is ")
        assert [byte_tokenizer.decode(prompt.tokens[[place]]) for place in prompt.places] == [str(digit)] * 2
        texts.add(text)
    assert len(texts) == 3
    with pytest.raises(DataError, match="a prompt of 100 tokens has no room"):
        Prompts(byte_tokenizer, 100)


@pytest.fixture(scope="module")
def section():
    return ReceptiveFieldSection(lengths=[400], blocks=3, samples=40)


def test_the_map_says_what_is_known_by_layer_and_block(section, byte_tokenizer):
    model = random_model({"method": "sliding", "block": 16, "window": 3, "sinks": 0}, layers=3)
    result = evaluate(model, byte_tokenizer, EvalSection(tasks=[section]), HERE).tasks["receptive_field"]
    found = result.maps[400]
    assert np.array(found.accuracy).shape == np.array(found.control).shape == np.array(found.reached).shape == (3, 3)
    assert [row[0] for row in found.reached] == [0.0, 0.0, 0.0]
    assert found.field == sorted(found.field)
    assert found.where(False) < 0.25
    assert result.metrics().keys() >= {"", "/400", "/400/control", "/400/unreached"}
    report = ReceptiveFieldResult.report({"a": result, "b": result})
    assert report.rows[1][-1] == "above 3"
    drawing = ReceptiveFieldResult.drawing("receptive_field", {"a": result, "b": result}, None)
    figure = Figure(figsize=(drawing.width, drawing.height))
    drawing.draw(figure)
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert len(hatched) == sum(known < 0.5 for row in found.reached for known in row)
    assert ReceptiveFieldResult.model_validate_json(result.model_dump_json()) == result


@torch.no_grad()
def test_a_method_that_reads_prompts_fully_reads_these_as_text(section, byte_tokenizer):
    task = section.build(byte_tokenizer, 0)
    batch = next(iter(task.batches().values()))[0]
    known = {}
    for attention in ({"method": "full"}, {"method": "recycled", "every": 16, "keep": 4, "recent": 4}):
        states = task.measure_batch(random_model(attention), batch, HERE)["states"]
        known[attention["method"]] = unpack_states(states[0], 4)
    assert not np.allclose(known["recycled"], known["full"], atol=0.05)


def test_the_command_measures_it_and_goes_on_from_its_samples(tmp_path):
    out = tmp_path / "rows.json"
    task = "eval.tasks.receptive_field={lengths: [128], blocks: 1, samples: 40}"
    arguments = ["eval", "sparsetrain:tiny", task, "--attention", "dense", "--output", str(out)]
    assert main(arguments) == 0
    first = json.loads(out.read_text())["rows"]["dense"]["tasks"]["receptive_field"]
    last, control = first["maps"]["128"]["accuracy"][-1], first["maps"]["128"]["control"]
    assert min(last) > 0.3
    assert np.mean(control) < 0.2
    out.unlink()
    assert main(arguments) == 0
    assert json.loads(out.read_text())["rows"]["dense"]["tasks"]["receptive_field"] == first
