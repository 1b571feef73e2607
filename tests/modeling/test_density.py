from __future__ import annotations

import pytest

from sparsetrain import sparsify
from sparsetrain.modeling import attention_density
from sparsetrain.patterns import PowerPattern


def test_each_layer_counts_what_it_attends_to(tiny):
    length = 100
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    attention = {"method": "power", "block": 4, "window": 2, "sinks": 1, "dense_layers": [3]}
    model = sparsify(tiny("gemma3_text", **layers), attention)
    window = sum(min(position + 1, 7) for position in range(length)) / (length * (length + 1) / 2)
    power = PowerPattern(block=4, window=2, sinks=1).density(length)
    assert attention_density(model, length) == pytest.approx([window, power, window, 1.0])
    assert 0 < power < 1
    assert attention_density(sparsify(tiny("gemma3_text"), {"method": "full"}), 7) == [1.0] * 2
