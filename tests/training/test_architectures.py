"""A tiny model of each family, trained by two ranks under ZeRO-3 and by one rank without ZeRO."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.cli import main

COMMON = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
HYBRID = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 48}
FAMILIES = {
    "qwen3": {"head_dim": 32, "num_key_value_heads": 1},
    "phi3": {"pad_token_id": 0, "sliding_window": None},
    "gemma2": {**HYBRID, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**HYBRID, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
        **{"output_router_logits": True, "router_aux_loss_coef": 0.5},
    },
}


@pytest.fixture(scope="module")
def arguments(tiny):
    """``arguments(family, folder, stage)``: the command that trains a family for two steps."""

    def run(family, folder, stage):
        architecture = json.dumps({"model_type": family, **COMMON, **FAMILIES[family]})
        overrides = [f"model.architecture={architecture}", f"deepspeed.stage={stage}", "train.steps=2"]
        return ["run", str(tiny), *overrides, "--output", str(folder / family)]

    return run


@pytest.fixture(scope="module")
def sharded(arguments, shared, ranks_of):
    """The runs of all families by two ranks under ZeRO-3."""

    def make(folder):
        commands = [arguments(family, folder, 3) for family in FAMILIES]
        ranks_of(commands, folder / "log", 2).wait()

    return shared("families-sharded", make)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_under_zero_3_train_as_one_rank_without(tmp_path, family, arguments, sharded, run_folder):
    assert main(arguments(family, tmp_path, 0)) == 0
    alone, together = run_folder(tmp_path / family), run_folder(sharded / family)
    assert together.values("loss") == pytest.approx(alone.values("loss"), rel=2e-6)
    assert together.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-4)
    if "router_aux_loss_coef" in FAMILIES[family]:
        assert min(alone.values("balance_loss")) > 0.99  # the factor times the experts of a token: perfect balance
        assert together.values("balance_loss") == pytest.approx(alone.values("balance_loss"), rel=2e-6)
    assert together.weights.keys() == alone.weights.keys()
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(together.weights[name], tensor, rtol=0, atol=1e-5)


def test_a_run_that_goes_on_with_other_micro_batches_tells_where_routers_balance_over_them(
    tmp_path, arguments, ranks_of
):
    families = ("mixtral", "qwen3")
    begun = [arguments(family, tmp_path, 0) for family in families]
    # In a process of its own, whose log is shown where one fails: on a GPU it shares no context with other tests.
    ranks_of([*begun, *([*each, "train.micro_batch=2", "--resume"] for each in begun)], tmp_path / "log").wait()
    told = json.loads((tmp_path / "mixtral/history.json").read_text())
    assert told == [{"step": 2, "key": "train.micro_batch", "before": 1, "after": 2}]
    assert not (tmp_path / "qwen3/history.json").exists()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])  # has other names on disk
def test_what_zero_3_exports_loads_whole(family, sharded):
    folder = sharded / family / "final"
    dense, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(dense.state_dict()[name], tensor)
    # Three blocks are all within reach of the window and the sink, so there sparse attention is dense attention.
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(sparsetrain.load(folder)(tokens).logits, dense(tokens).logits, rtol=0, atol=1e-4)
