"""A small model for generation, prompts of several lengths, and what ``generate`` computes in each step behind them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def small_llama(attention: Any = None, decode: Any = None, **shape: Any) -> LlamaForCausalLM:
    """Random layers in evaluation mode: full attention unless a method is given, and a decode section where one is."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | shape)).eval()
    sparsetrain.sparsify(model, attention or {"method": "full"})
    return model if decode is None else sparsetrain.set_decode(model, decode)


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded on the left."""
    torch.manual_seed(1)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(1, 97, (length,))
        mask[row, width - length :] = 1
    return ids, mask


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int = 12, **arguments: Any) -> Any:
    """Of every step, ``[B, count, vocabulary]``, the tokens, and the cache."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    return torch.stack(out.logits, dim=1), out.sequences[:, ids.shape[1] :], out.past_key_values
