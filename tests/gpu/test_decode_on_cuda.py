"""Steps that read a choice of keys, and steps in room that is made once, on a GPU: the same as on the CPU's path, in a
CUDA graph, and without waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sparsetrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FULL = {"method": "full"}
POWER = {"method": "power", "block": 128, "window": 3, "sinks": 1}
SPARSEK = {"method": "sparsek", "topk": 256, "window": 128, "sinks": 4}
EVERYTHING: list[dict[str, Any]] = [
    {"prune": {"p": 1.0}},
    {"select": "quest", "candidates": 16384},
    {"select": "channels", "candidates": 16384},
    {"refresh": {"every": 4, "keep": 16384}},
]
FEW: list[dict[str, Any]] = [
    {"prune": {"p": 0.8}},
    {"select": "quest", "candidates": 1024},
    {"select": "quest", "candidates": 2048, "prune": {"p": 0.8}},
    {"select": "channels", "candidates": 1024},
    {"select": "channels", "candidates": 2048, "prune": {"p": 0.8}},
    {"prune": {"p": 0.8}, "refresh": {"every": 3}},
    {"refresh": {"every": 3, "keep": 512}},
    {"select": "quest", "candidates": 1024, "refresh": {"every": 3, "similarity": 1.0}},
]
OWN: dict[str, Any] = {"select": "own", "prune": {"p": 0.8}, "dense_layers": []}


def make_model(attention: dict[str, Any] = FULL, decode: dict[str, Any] | None = None) -> PreTrainedModel:
    """Three layers of a Qwen3 in bf16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2**18,
        initializer_range=0.1,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().eval()
    sparsetrain.sparsify(model, attention)
    return model if decode is None else sparsetrain.set_decode(model, {"dense_layers": [0], **decode})


def make_ids(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left."""
    torch.manual_seed(1)
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long().cuda()
    return {"input_ids": torch.randint(1, 512, (len(lengths), width)).cuda() * mask, "attention_mask": mask}


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **arguments: Any) -> torch.Tensor:
    """Of eight steps, ``[B, 8, vocabulary]``, by the same tokens in every model."""
    forced = torch.randint(1, 512, (8,), generator=torch.Generator().manual_seed(2)).tolist()
    width = inputs["input_ids"].shape[1]
    out = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _, ids: [forced[len(ids) - width]],
        **arguments,
    )
    return torch.stack(out.logits, dim=1).float()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("decode", EVERYTHING, ids=str)
def test_a_choice_of_everything_is_full_attention(decode: dict[str, Any]) -> None:
    inputs = make_ids(6000, 900)
    assert far(logits(make_model(decode=decode), inputs), logits(make_model(), inputs)) < 0.02


@pytest.mark.parametrize("attention", [POWER, SPARSEK], ids=str)
def test_all_weight_of_a_methods_own_keys_is_the_method(attention: dict[str, Any]) -> None:
    inputs = make_ids(6000, 900)
    decode = {**OWN, "prune": {"p": 1.0}}
    assert far(logits(make_model(attention, decode), inputs), logits(make_model(attention), inputs)) < 0.02


@pytest.mark.parametrize(
    ("attention", "decode"), [(POWER, OWN), (SPARSEK, OWN), *((FULL, decode) for decode in FEW)], ids=str
)
def test_room_that_is_made_once_is_captured_and_gives_the_same(
    attention: dict[str, Any], decode: dict[str, Any]
) -> None:
    inputs = make_ids(6000, 900)
    model = make_model(attention, decode)
    expected = logits(model, inputs)
    cache = sparsetrain.SparseCache(model, max_length=6144)
    assert cache.is_compileable
    assert far(logits(model, inputs, past_key_values=cache), expected) < 0.02  # generate captures CUDA graphs


@pytest.mark.parametrize(
    ("attention", "decode"),
    [(POWER, None), (SPARSEK, None), (FULL, None), (POWER, OWN), (SPARSEK, OWN), *((FULL, decode) for decode in FEW)],
    ids=str,
)
def test_a_step_does_not_wait_for_the_device(attention: dict[str, Any], decode: dict[str, Any] | None) -> None:
    model = make_model(attention, decode)
    inputs = make_ids(3000, 900)
    cache = sparsetrain.SparseCache(model, max_length=3100)
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            token = out.logits[:, -1:].argmax(-1)
            position = mask.sum(1, keepdim=True) - 1
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # kernels are compiled before
            try:
                out = model(token, attention_mask=mask, position_ids=position, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
