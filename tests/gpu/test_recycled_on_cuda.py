"""Recycled attention on a GPU: as on the CPU, without waiting for the device, and in training as in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparsetrain
from sparsetrain.methods.base import PassDocuments
from sparsetrain.methods.recycled.segments import make_segments
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.passes import PLANNED_ARGUMENT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS: list[dict[str, Any]] = [
    {"every": 16, "keep": 64},
    {"every": 16, "keep": 64, "sinks": 0, "recent": 0},
    {"every": 32, "keep": 256, "p": 0.5},
    {"every": 16, "keep": 64, "similarity": 0.9},
]
BOUNDS, PROMPTS, EVERY = [0, 900, 901, 2048], [300, 0, 1], [16, 8, 32]


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 8, 2048, 128), (1, 2, 2048, 128), (1, 2, 2048, 128), (1, 8, 2048, 128))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(settings: dict[str, Any], tensors: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Output and gradients of packed documents, on the CPU."""
    method = parse_attention({"method": "recycled", **settings}).build(2)
    *leaves, upstream = (tensor.to(device) for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in leaves]
    options = {"cu_seqlens": torch.tensor(BOUNDS).int().to(device), "scale": None}
    out = method.attend(torch.nn.Module(), *leaves, segments=make_segments(BOUNDS, PROMPTS, EVERY), **options)
    return [each.cpu().float() for each in (out.detach(), *torch.autograd.grad(out, leaves, upstream))]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_gpu_computes_what_plain_pytorch_does(settings: dict[str, Any]) -> None:
    tensors = inputs(torch.bfloat16)
    want = run(settings, [tensor.float() for tensor in tensors], "cpu")
    found = run(settings, tensors, "cuda")
    for mine, right in zip(found, want, strict=True):
        assert float((mine - right).norm() / right.norm()) < 1e-2
    again = run(settings, tensors, "cuda")
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_the_host_does_not_wait(settings: dict[str, Any]) -> None:
    method = parse_attention({"method": "recycled", **settings}).build(2)
    query, key, value, upstream = (tensor.cuda().requires_grad_() for tensor in inputs(torch.bfloat16))
    segments = make_segments(BOUNDS, PROMPTS, EVERY)
    options = {"cu_seqlens": torch.tensor(BOUNDS).int().cuda(), "scale": None, "segments": segments}
    layer = torch.nn.Module()
    layer.layer_idx = 0
    for watched in (False, True):
        method.observing = True
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            method.attend(layer, query, key, value, **options).backward(upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert 0 < method.observations()["recycled/kept_mass/layer_00"] <= 1.01


@pytest.mark.parametrize("room", ["grows", "made once"])
@torch.no_grad()
def test_rows_of_training_are_steps_of_generation(room: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda().eval()
    sparsetrain.sparsify(model, {"method": "recycled", "every": 8, "keep": 128})
    ids = torch.randint(1, 512, (1, 1500), generator=torch.Generator().manual_seed(1)).cuda()
    cache = None if room == "grows" else sparsetrain.SparseCache(model, max_length=1600)
    out = model.generate(
        ids,
        max_new_tokens=40,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        past_key_values=cache,
        pad_token_id=0,
    )
    steps = torch.stack(out.logits, dim=1)
    count = out.sequences.shape[1]
    planned = sparse_layers(model)[0][2].plan_pass(PassDocuments([0, count], [1500], ["text"]))
    rows = model(
        out.sequences,
        position_ids=torch.arange(count, device="cuda")[None],
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32, device="cuda"),
        use_cache=False,
        **{PLANNED_ARGUMENT: planned},
    ).logits[:, 1499:-1]
    # A key whose weight is that of another, up to rounding, may take its place.
    assert float((rows - steps).norm() / rows.norm()) < 1e-2
    assert float((rows - steps).abs().median()) < 1e-3
