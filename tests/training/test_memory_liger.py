"""Liger's kernels, in Triton's interpreter: the losses and gradients of the model's own modules."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from gradients import assert_close, loss_and_gradients
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain.cli import main
from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.modeling import fused_layers, sparsify
from sparsetrain.training import run as training
from sparsetrain.training.distributed import build as building
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory import liger

pytest.importorskip("liger_kernel", reason="needs liger-kernel")

TOKENS = 24
CPU = torch.device("cpu")
FAMILIES = {
    "llama": "rope, rms_norm, swiglu",
    "qwen3": "rope, rms_norm, swiglu",
    "gemma2": "rope, rms_norm, geglu",
}


@triton.jit
def _rsqrt(x):
    return 1 / tl.sqrt(x)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """What the interpreter lacks: arguments that are floats, and CUDA's library of functions."""
    if torch.cuda.is_available():
        return
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import numpy as np
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", _rsqrt)
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", _tanh)
    monkeypatch.setattr(fused_layers, "PROBE_TOKENS", 8)


def build(family="llama", **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            **fields,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention = {"method": "power", "block": 8, "window": 1, "sinks": 1, "replace_sliding_layers": True}
    return sparsify(model, attention).train()


@pytest.fixture
def batch():
    """Three of four rows are targets; ``few`` has every third."""
    ids = torch.randint(96, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def inputs(few=False):
        positions = torch.arange(0, TOKENS - 1, 3) if few else torch.arange(TOKENS // 4, TOKENS - 1)
        return {
            "input_ids": ids,
            "position_ids": torch.arange(TOKENS)[None],
            "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
            "positions": positions,
            "targets": ids[0, positions + 1],
            "num_chunks": 3,
        }

    return inputs


def step(model, inputs, *, fused):
    """The loss, and the gradients once it is scaled as a run scales it."""
    model.zero_grad()
    loss = CausalLMLoss(model, 8, fused=fused)(**inputs)
    (loss / 17).backward()
    return loss_and_gradients(model, loss)


@pytest.mark.parametrize(("family", "kernels"), FAMILIES.items(), ids=FAMILIES)
def test_fused_layers_give_the_same_loss_and_gradients(family, kernels, batch):
    model = build(family)
    wanted = step(model, batch(), fused=False)
    said = liger.fuse_layers(model, "on", CPU)
    assert f"in the decoder layers: {kernels}; largest difference" in said
    assert_close(step(model, batch(), fused=False), wanted)


def test_the_layers_really_use_the_kernels_and_other_models_do_not(batch, monkeypatch):
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    model, other = build(), build()
    liger.fuse_layers(model, "on", CPU)
    assert dict(vars(modeling_llama)) == before
    calls = []
    for name in ("LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerRopeFunction"):
        for module in liger_ops(name):
            real = getattr(module, name)
            spy = type(name, (), {"apply": lambda *a, real=real, name=name: calls.append(name) or real.apply(*a)})
            monkeypatch.setattr(module, name, spy)
    step(other, batch(), fused=False)
    assert not calls
    step(model, batch(), fused=False)
    assert {name: calls.count(name) for name in calls} == {
        "LigerRMSNormFunction": 3,
        "LigerSiLUMulFunction": 1,
        "LigerRopeFunction": 1,
    }


def liger_ops(name):
    """Every module of Liger that knows the function by this name."""
    loaded = [module for key, module in sys.modules.items() if key.startswith("liger_kernel.")]
    return [module for module in loaded if name in vars(module)]


@pytest.mark.parametrize("few", [False, True], ids=["most-rows", "few-rows"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_fused_loss_is_the_chunked_loss(batch, few, tied):
    wanted = step(build(tie_word_embeddings=tied), batch(few), fused=False)
    assert_close(step(build(tie_word_embeddings=tied), batch(few), fused=True), wanted)


def test_a_frozen_head_gets_no_gradient(batch):
    def frozen():
        model = build()
        model.get_output_embeddings().weight.requires_grad_(False)
        return model

    found = step(frozen(), batch(), fused=True)
    assert "lm_head.weight" not in found
    assert_close(found, step(frozen(), batch(), fused=False))


def test_a_batch_without_targets_has_no_loss(batch):
    empty = torch.empty(0, dtype=torch.int64)
    found = step(build(), batch() | {"positions": empty, "targets": empty}, fused=True)
    assert not any(tensor.any() for tensor in found.values())


def test_a_fused_head_still_gives_logits():
    model = build()
    head, hidden = model.get_output_embeddings(), torch.randn(3, 32)
    wanted = head(hidden)
    liger.fuse_loss(head)
    assert torch.equal(head(hidden), wanted)


@pytest.mark.parametrize(
    ("family", "fields", "dtype", "fused"),
    [
        ("llama", {}, torch.bfloat16, True),
        ("llama", {}, torch.float16, False),
        ("gemma2", {"final_logit_softcapping": 5.0}, torch.bfloat16, False),
    ],
    ids=["bf16", "fp16", "soft-capped"],
)
def test_a_loss_that_the_kernel_does_not_compute_is_not_fused(family, fields, dtype, fused):
    model = build(family, **fields).to(dtype)
    assert CausalLMLoss(model, 8, fused=True).fused is fused
    assert not CausalLMLoss(model, None, fused=True).fused


def test_an_activation_that_the_kernel_does_not_compute_is_not_fused():
    assert "layers: rope, rms_norm; largest" in liger.fuse_layers(build(hidden_act="gelu"), "auto", CPU)


def test_kernels_that_compute_something_else_are_not_used(batch, monkeypatch):
    monkeypatch.setitem(fused_layers.ACTIVATIONS, "swiglu", ("gelu",))
    model = build(hidden_act="gelu")
    before = {name: set(vars(module)) & {"forward"} for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=r"train.liger=on: .* the output of LlamaMLP differs by .*; set it to auto"):
        liger.fuse_layers(model, "on", CPU)
    # And they are gone.
    assert {name: set(vars(module)) & {"forward"} for name, module in model.named_modules()} == before
    wanted = step(model, batch(), fused=False)
    said = liger.fuse_layers(model, "auto", CPU)
    assert re.search(r"these keep their own code: LlamaMLP differs by [\d.]+ \(relative RMS\) with the kernel", said)
    assert_close(step(model, batch(), fused=False), wanted)


def test_a_model_that_liger_does_not_know(batch):
    model = build("gpt_neox")
    assert "does not know models of type gpt_neox; nothing is fused" in liger.fuse_layers(model, "auto", CPU)
    with pytest.raises(
        ModelError, match=r"train.liger=on: Liger .* does not know models of type gpt_neox; set it to auto"
    ):
        liger.fuse_layers(model, "on", CPU)


def test_a_version_that_does_not_fit_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ModelError, match=r"train.liger: Liger [\d.]+ cannot be imported beside transformers .* to off"):
        liger.fuse_layers(build(), "auto", CPU)


def test_it_is_used_where_there_is_a_gpu_and_the_package(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [liger.wants_liger(choice, cuda) for choice in ("auto", "on", "off")] == [True, True, False]
    assert [liger.wants_liger(choice, cpu) for choice in ("auto", "off")] == [False, False]
    monkeypatch.setattr(fused_layers.util, "find_spec", lambda name: None)
    assert not liger.wants_liger("auto", cuda)
    with pytest.raises(RecipeError, match=r"train.liger=on needs liger-kernel; `pip install liger-kernel`, or set"):
        liger.wants_liger("on", cuda)


def test_a_run_with_the_kernels_trains_what_a_run_without_them_trains(tiny, tmp_path, run_folder, monkeypatch, capfd):
    """At stage 3 the head's weight is there only while the head is called."""
    small = ["sequence.length=20", "train.steps=2", "train.global_batch_sequences=1", "deepspeed.stage=3"]
    small += [f"data={{sources: [{{path: {tiny.parent / 'corpus.jsonl'}}}]}}", "checkpoint.export=false"]
    runs = {}
    for name in ("plain", "fused"):
        fused = name == "fused"
        for module in (training, building):
            monkeypatch.setattr(module, "wants_liger", lambda choice, device, fused=fused: fused)
        saving = ["train.activation_checkpointing=selective", "train.mlp_chunk=15"] if fused else []
        assert main(["run", str(tiny), *small, *saving, "--output", str(tmp_path / name)]) == 0
        runs[name] = run_folder(tmp_path / name)
        assert ("loss: fused by Liger" in capfd.readouterr().err) == fused
    for metric in ("loss", "grad_norm"):
        assert runs["fused"].values(metric) == pytest.approx(runs["plain"].values(metric), rel=1e-4)


def test_deepspeeds_tiled_loss_is_the_chunked_loss(batch):
    """The third way to a loss without all logits, on a loss that nothing scales behind it."""
    inputs = batch(few=True)
    model = build()
    model.zero_grad()
    CausalLMLoss(model, 8)(**inputs).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    keys = ("input_ids", "position_ids", "cu_seqlens")
    hidden = model.get_decoder()(**{key: inputs[key] for key in keys}, use_cache=False).last_hidden_state

    def nll(head, hidden, targets):
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    head: nn.Module = model.get_output_embeddings()
    rows, targets = hidden[:, inputs["positions"]], inputs["targets"][None]
    TiledFusedLogitsLoss.apply(nll, head, rows, targets, None, 4, [head.weight], "sum").backward()
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, wanted)
