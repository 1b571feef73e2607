"""The ``sparsek`` section: contradictions are refused at load time, and its numbers mean what they say."""

from __future__ import annotations

import pytest

from sparsetrain.errors import ModelError
from sparsetrain.methods.registry import parse_attention


def config(**fields):
    return parse_attention({"method": "sparsek", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk": 0}, "topk=0: .*greater than 0"),
        ({"window": 0}, "window=0: .*greater than 0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"slope": -1e-3}, "slope=-0.001"),
        ({"gate": "valu"}, "gate='valu'"),
        ({"scorer": "random", "init": "normal"}, r"init=normal .*scorer=random has none"),
        ({"scorer": "random", "normalize": False}, r"normalize=false .*scorer=random has none"),
        ({"init": "zeros", "slope": 0}, "every token would have the same score"),
        ({"init": "zeros", "scorer": "frozen"}, "every token would have the same score"),
        ({"topk_start": 2048}, "topk_start and topk_steps belong together"),
        ({"topk_steps": 0.1}, "topk_start and topk_steps belong together"),
        ({"topk": 64, "topk_start": 64, "topk_steps": 0.1}, "topk_start=64 must be above topk=64"),
        ({"topk_start": 2048, "topk_steps": 1.5}, "topk_steps=1.5: .*whole"),
        ({"topk": 64, "score_buffer": 64}, "score_buffer=64 must be above topk=64"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        config(**fields)


def test_a_message_about_the_whole_section_shows_no_dump_of_it():
    with pytest.raises(ModelError) as error:
        config(topk_start=2048)
    assert str(error.value) == (
        "attention (method sparsek): topk_start and topk_steps belong together; give both or neither"
    )


@pytest.mark.parametrize("fields", [{"scorer": "random"}, {"init": "zeros"}, {"topk_start": 4096, "topk_steps": 0.2}])
def test_a_recorded_section_can_be_read_again(fields):
    recorded = config(**fields).model_dump(mode="json")
    assert parse_attention(recorded) == config(**fields)


@pytest.mark.parametrize("length", [1, 5, 9, 10, 100])
def test_density_counts_the_pairs_that_are_read(length):
    method = config(topk=3, window=4, sinks=2).build(2)
    read = sum(
        len({j for j in range(i + 1) if j < 2 or j > i - 4}) + min(3, max(0, i - 4 - 2 + 1)) for i in range(length)
    )
    assert method.density(length) == pytest.approx(read / (length * (length + 1) / 2), rel=1e-12)


def test_density_at_full_budget_is_one():
    assert config(topk=50, window=50).build(2).density(100) == 1.0


@pytest.mark.parametrize("steps", [4, 0.4])
def test_the_selection_shrinks_over_the_warm_up(steps):
    method = config(topk=100, topk_start=500, topk_steps=steps).build(2)
    sizes = []
    for step in range(10):
        method.begin_step(step, 10)
        sizes.append(method.training_topk)
    assert sizes == [500, 400, 300, 200] + [100] * 6


def test_without_a_warm_up_the_selection_stays():
    method = config(topk=100).build(2)
    method.begin_step(0, 10)
    assert method.training_topk == 100


def test_there_is_no_static_pattern():
    assert config().pattern() is None
    assert type(config()).new_modules == ("sparsek_scorer",)
