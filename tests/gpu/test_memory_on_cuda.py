"""Memory options and Liger's kernels on a CUDA device: the same gradients, and less memory at the peak."""

from __future__ import annotations

import gc
from importlib import util

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.recipe import load_recipe, plan_batch
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config
from sparsetrain.training.distributed.engine import init_world, initialize
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.liger import fuse_layers
from sparsetrain.training.memory.tiled_mlp import tile_mlps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_liger = pytest.mark.skipif(util.find_spec("liger_kernel") is None, reason="needs liger-kernel")

WIDTH, LAYERS, TOKENS = 512, 12, 8192
HIDDEN_STATE = TOKENS * WIDTH * 2
SPARSEK = {"method": "sparsek", "topk": 256, "window": 256, "sinks": 4}
POWER = {"method": "power", "block": 128, "window": 2, "sinks": 1}


def build(attention=POWER, family="llama", dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 4096,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": TOKENS,
        "tie_word_embeddings": False,
        **fields,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
    return sparsetrain.sparsify(model.to("cuda", dtype), attention).train()


@pytest.fixture
def batch():
    ids = torch.randint(4096, (1, TOKENS), generator=torch.Generator().manual_seed(1)).cuda()
    lengths = (3000, 1, TOKENS - 3001)
    bounds = torch.tensor([0, 3000, 3001, TOKENS], dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    targets = torch.arange(TOKENS - 1, device="cuda")
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seqlens": bounds,
        "positions": targets,
        "targets": ids[0, targets + 1],
        "num_chunks": 4,
    }


def step(loss, batch):
    """Summed NLL, gradients by name, and the peak above what was allocated before."""
    # The first pass allocates gradients and compiles.
    loss(**batch).backward()
    loss.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = loss(**batch)
    (value / TOKENS).backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = {name.removeprefix("model."): p.grad.float() for name, p in loss.model.named_parameters()}
    return value.item(), gradients, peak


def error(found, exact):
    """The largest relative error of a gradient."""
    return max(((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact)


@pytest.mark.parametrize("attention", [POWER, SPARSEK], ids=["power", "sparsek"])
@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_checkpointed_layers_give_the_same_gradients_from_less_memory(batch, attention, mode):
    plain, wanted, most = step(CausalLMLoss(build(attention), 2048), batch)
    model = build(attention)
    enable_activation_checkpointing(model, mode)
    loss, gradients, peak = step(CausalLMLoss(model, 2048), batch)
    assert loss == plain
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    assert peak < most / 2


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_offloaded_inputs_give_the_same_gradients_from_less_memory(batch, mode):
    model = build()
    enable_activation_checkpointing(model, mode)
    plain, wanted, most = step(CausalLMLoss(model, 2048), batch)
    model = build()
    enable_activation_checkpointing(model, mode, ActivationOffload(torch.device("cuda", 0)))
    for _ in range(3):
        loss, gradients, peak = step(CausalLMLoss(model, 2048), batch)
        assert loss == plain
        assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    # All inputs but the two or three that are on the device at a time.
    assert peak < most - (LAYERS - 5) * HIDDEN_STATE


def test_tiles_give_the_same_gradients_from_less_memory(batch):
    fields = {"intermediate_size": 16 * WIDTH, "num_hidden_layers": 2}
    _, exact, _ = step(CausalLMLoss(build(dtype=torch.float32, **fields), 2048), batch)
    peaks, errors = [], []
    for tiles in (1, 8):
        model = build(**fields)
        enable_activation_checkpointing(model, "layer")
        tile_mlps(model, tiles)
        _, gradients, peak = step(CausalLMLoss(model, 2048), batch)
        peaks.append(peak)
        errors.append(error(gradients, exact))
    assert errors[1] <= 1.5 * errors[0]
    assert peaks[1] < peaks[0] / 2


@needs_liger
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_fused_kernels_are_as_exact_as_the_models_own(batch, family):
    attention = {**POWER, "replace_sliding_layers": True}
    fields = {"num_hidden_layers": 4}
    exact_loss, exact, _ = step(CausalLMLoss(build(attention, family, torch.float32, **fields), 2048), batch)
    loss, yardstick, _ = step(CausalLMLoss(build(attention, family, **fields), 2048), batch)
    model = build(attention, family, **fields)
    assert "rope, rms_norm" in fuse_layers(model, "on", model.device)
    fused_loss, fused, _ = step(CausalLMLoss(model, 2048, fused=True), batch)
    assert abs(fused_loss - exact_loss) <= 2 * abs(loss - exact_loss) + 1e-4 * exact_loss
    assert error(fused, exact) <= 1.5 * error(yardstick, exact)


@needs_liger
def test_layers_of_a_model_on_the_host_are_compared_on_the_device_and_stay_where_they_are():
    model = build(num_hidden_layers=2).cpu()
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    fuse_layers(build(num_hidden_layers=1), "on", torch.device("cuda", 0))  # cuBLAS takes its workspace
    gc.collect()
    before = torch.cuda.memory_allocated()
    assert "rope, rms_norm" in fuse_layers(model, "on", torch.device("cuda", 0))
    assert torch.cuda.memory_allocated() == before
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()} == places


@needs_liger
def test_a_run_that_loads_into_shards_fuses_its_layers(tiny, tmp_path, capfd):
    overrides = ["deepspeed.stage=3", "eval.at_start=false", "train.liger=on", "train.steps=2"]
    assert main(["run", str(tiny), *overrides, "--output", str(tmp_path / "run")]) == 0
    assert "in the decoder layers: rope, rms_norm" in capfd.readouterr().err


@needs_liger
def test_the_fused_loss_takes_less_memory(batch):
    fields = {"num_hidden_layers": 1, "vocab_size": 65536}
    _, _, chunked = step(CausalLMLoss(build(**fields), 2048), batch)
    head = build(**fields)
    _, _, fused = step(CausalLMLoss(head, 2048, fused=True), batch)
    assert fused < chunked


def test_zero_3_shards_weights_of_the_host_without_holding_them_all():
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(16)))
    model.requires_grad_(False)[-1].requires_grad_(True)
    size = sum(weight.nbytes for weight in model.parameters())
    sections = ["deepspeed.stage=3", "deepspeed.offload_parameters=cpu", "eval.at_start=false", "model.dtype=bfloat16"]
    # Gradients are reduced in a buffer of so many elements, by default half a billion.
    sections += ["deepspeed.config={zero_optimization: {reduce_bucket_size: 10000000}}"]
    recipe = load_recipe("quickstart", sections).recipe
    world = init_world()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = initialize(model, recipe, deepspeed_config(recipe, plan_batch(recipe, 1)), world)
    held = torch.cuda.max_memory_allocated() - before
    engine.destroy()
    assert held < 0.5 * size, f"{held:,} of {size:,} bytes"
