"""The model that relays start from: deeper than the one that recalls, and equal to it."""

from __future__ import annotations

import pytest
import torch
import typer
from sparsetrain.recipes.evidence.relay_base import grow
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsetrain.modeling.places import resolve
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder


@pytest.fixture
def shallow(tmp_path):
    """A folder of a run of recall.yaml, untrained."""
    config = load_recipe(recipes_folder() / "evidence/recall.yaml").recipe.model.architecture
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.config.sparsetrain = {"attention": {"method": "full"}}
    model.save_pretrained(tmp_path / "run/final")
    AutoTokenizer.from_pretrained(resolve("sparsetrain:tiny", "path")).save_pretrained(tmp_path / "run/final")
    return model.eval()


def test_a_deeper_model_gives_what_the_shallow_one_gave(shallow, tmp_path):
    grow(tmp_path / "run", tmp_path / "deep", 5, 1024)
    deep = AutoModelForCausalLM.from_pretrained(tmp_path / "deep").eval()
    assert deep.config.layer_types == ["sliding_attention"] + 4 * ["full_attention"]
    assert deep.config.max_position_embeddings == 1024
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(deep(ids).logits, shallow(ids).logits, rtol=0, atol=0)
    assert deep.model.layers[2].self_attn.q_proj.weight.std() > 0.05
    assert len(AutoTokenizer.from_pretrained(tmp_path / "deep")) == 2048


def test_a_deeper_model_has_no_fewer_layers(shallow, tmp_path):
    with pytest.raises(typer.BadParameter, match=r"--layers 1: .* has 2; give no fewer"):
        grow(tmp_path / "run", tmp_path / "deep", 1, 256)
