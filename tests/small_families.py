"""A tiny config of almost any decoder family of transformers, made from the fields that its config class has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTHS = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "intermediate_size", "intermediate_size_mlp"), 32)
WIDTHS |= dict.fromkeys(("ffn_dim", "n_inner", "ffn_hidden_size", "word_embed_proj_dim", "decoder_ffn_dim"), 32)
WIDTHS |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head"), 16)
WIDTHS |= dict.fromkeys(("head_dim", "rotary_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8)
WIDTHS |= dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
COUNTS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4)
COUNTS |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
COUNTS |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads"), 4)
COUNTS |= dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads", "mamba_expand"), 2)
COUNTS |= dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "max_window_layers"), 2)
COUNTS |= dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1)
WINDOWS = {"sliding_window": 7, "global_window_size": 7, "local_attention": 7, "attention_chunk_size": 8}
DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout")
SMALL: dict[str, Any] = {
    **WIDTHS,
    **COUNTS,
    **WINDOWS,
    **dict.fromkeys(DROPOUTS, 0.0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 128),
    **{"vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"use_sliding_window": True, "query_pre_attn_scalar": 8, "layer_types": None},
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"] * 2}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"vision_config": {**TOWER, "image_size": 16, "patch_size": 8}, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        **HYBRID,
        **{
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
}
"""Fields that some families need besides."""


def small_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A random model of a family in evaluation mode, fp32, whose attention is far from uniform.

    Args:
        overrides: fields of its config, or of its text part.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    text = default.get_text_config()
    known = text.to_dict()
    fields = {name: value for name, value in SMALL.items() if name in known and name not in text.attribute_map}
    if known.get("num_key_value_heads") == known.get("num_attention_heads"):
        fields.pop("num_key_value_heads", None)
        if known.get("num_key_value_heads") is not None:
            fields["num_key_value_heads"] = SMALL["num_attention_heads"]
    special = SPECIAL.get(model_type, {})
    if text is default:
        config = config_class(**{**fields, **special, **overrides})
    else:
        config = config_class(text_config={**fields, **HYBRID, **overrides}, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("sinks"):
                parameter.normal_(std=0.2)
    return model
