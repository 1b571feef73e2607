"""The checkpoint that ships: small, loadable by name, and able to do what the quickstart builds on."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.modeling import check_positions
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.world import World

FOLDER = Path(str(resources.files("sparsetrain"))) / "assets/tiny"


def test_it_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6


@pytest.fixture(scope="module")
def model():
    return sparsetrain.load("sparsetrain:tiny", dtype=torch.float32)


def test_plain_transformers_loads_it_too(model):
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = torch.arange(2, 200)[None]
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, model(tokens, use_cache=False).logits, atol=1e-4)


def test_it_finds_passkeys_at_its_own_length_and_not_beyond(model):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    section = EvalSection.model_validate(
        {"tasks": [{"task": "passkey", "lengths": [512, 1024], "depths": 3, "trials": 2}]}
    )
    found = evaluate(model, tokenizer, section, World(0, 1, torch.device("cpu"))).tasks["passkey"].by_length()
    assert found[512] >= 5 / 6
    assert found[1024] <= 1 / 6


def test_rows_longer_than_the_model_was_made_for_are_refused_with_the_setting(model):
    check_positions(model, 512)
    with pytest.raises(ModelError, match=r"sequence\.length=513 .* max_position_embeddings=512.*config_overrides="):
        check_positions(model, 513)
