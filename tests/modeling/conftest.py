"""Tiny random decoders of the supported families: grouped heads, head widths 32 to 256, soft caps, sinks, windows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {"vocab_size": 96, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 512}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
FAMILIES = {
    "llama": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "qwen2": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"hidden_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 128},
    "mistral": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 96,
        "sliding_window": None,
    },
    "phi3": {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
    "gemma2": {
        **HYBRID,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 2,
        "attn_logit_softcapping": 0.5,
    },
    "gemma3_text": {
        **HYBRID,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 2,
    },
    "gpt_oss": {
        **HYBRID,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
    },
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 2},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_positions": 512},
}


def build(family: str, **overrides: object) -> PreTrainedModel:
    """A random model of ``family`` in evaluation mode, fp32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that attention is far from uniform, and the sinks of gpt-oss from nothing.
            if parameter.ndim > 1 or name.endswith("sinks"):
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return request.param


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(family, **config)``: a tiny random model."""
    return build


@pytest.fixture
def eager() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """``eager(model)``: a copy that attends by transformers' own dense code."""

    def copy_as_eager(model: PreTrainedModel) -> PreTrainedModel:
        reference = copy.deepcopy(model)
        reference.set_attn_implementation("eager")
        return reference

    return copy_as_eager


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """``tokens(length, seed=0)``: random ids ``[1, length]``, without the special ones."""

    def draw(length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, COMMON["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))

    return draw
