"""Regular expressions in the config of somebody else's adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from sparsetrain.errors import ModelError
from sparsetrain.modeling.adapter_expressions import bound_expressions

NAMES = [f"model.layers.{index}.self_attn.{name}_proj" for index in range(2) for name in "qv"]


def test_peft_is_given_the_names_that_an_expression_matches():
    config = LoraConfig(target_modules=r".*layers\.1.*", rank_pattern={r"layers\.1\..*q_proj": 4, ".*": 2})
    bound_expressions(config, NAMES, Path("adapters"))
    assert config.target_modules == {NAMES[2], NAMES[3]}
    assert config.rank_pattern == {NAMES[0]: 2, NAMES[1]: 2, NAMES[2]: 4, NAMES[3]: 2}


def test_names_and_pefts_own_words_stay_as_they_are():
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        config = LoraConfig(target_modules=targets, alpha_pattern={"q_proj": 4})
        bound_expressions(config, NAMES, Path("adapters"))
        assert config.target_modules == (targets if isinstance(targets, str) else set(targets))
        assert config.alpha_pattern == {"q_proj": 4}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(.*)*#"),
        ("target_modules", "["),
        ("exclude_modules", "(.|.)*#"),
        ("rank_pattern", {"(.+)+#": 3}),
        ("layers_pattern", ["(.*)*#"]),
    ],
)
def test_an_expression_without_end_is_refused_with_its_field(field, value):
    layers = [0] if field == "layers_pattern" else None
    config = LoraConfig(**({"target_modules": ["q_proj"]} | {field: value}), layers_to_transform=layers)
    with pytest.raises(ModelError, match=f"the adapters in adapters: {field} of adapter_config.json"):
        bound_expressions(config, NAMES, Path("adapters"))
