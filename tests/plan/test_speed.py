"""The time of a step: what costs it, and what saves it."""

from __future__ import annotations

import pytest

from sparsetrain.plan.command import make_plan
from sparsetrain.plan.devices import DEVICES, find_device
from sparsetrain.plan.speed import estimate_time
from sparsetrain.recipe import load_recipe


def test_sparse_attention_gains_with_length_and_dense_layers_cost():
    def gain(length, *overrides):
        given = [f"sequence.length={length}", f"train.global_batch_tokens={length}", *overrides]
        plan = make_plan("llama-3.2-1b-power-32k", given)
        return plan.dense_time.seconds / plan.time.seconds

    assert 1 < gain(8192) < gain(32768) < gain(131072)
    assert gain(131072) < gain(131072, "attention.dense_layers=[]")


def test_what_is_computed_again_takes_time():
    def seconds(*overrides, gpus=8):
        return make_plan("qwen3-8b-power-lora-64k", overrides, gpus=gpus).time

    layer, selective = seconds(), seconds("train.activation_checkpointing=selective")
    none = seconds("train.activation_checkpointing=none")
    assert none.seconds < selective.seconds < layer.seconds
    assert selective.attention == none.attention < layer.attention
    assert seconds("train.mlp_chunk=4096").matrices > layer.matrices
    assert seconds("lora=null").matrices > layer.matrices
    assert seconds("sequence.parallel=8").communication > layer.communication
    assert seconds("deepspeed.offload_optimizer=cpu").optimizer > layer.optimizer
    # What was exchanged is not kept: both exchange it once more.
    shared = [f"train.activation_checkpointing={mode}" for mode in ("none", "layer", "selective")]
    none, layer, selective = (seconds("sequence.parallel=8", each).communication for each in shared)
    assert none < layer == selective


def test_the_exchange_of_a_shared_row_takes_what_two_gpus_took():
    """A layer's all-to-alls at 1,048,576 tokens took 15.8 ms a pass, their copies 5.9 forward and 9.4 backward."""
    given = ["sequence.length=1048576", "sequence.parallel=2", "deepspeed.stage=0"]
    given += ["train.global_batch_tokens=null", "train.global_batch_sequences=1"]
    seconds = make_plan("qwen3-8b-power-lora-1m", given, gpus=2, device="h200").time.communication
    reduced = make_plan("qwen3-8b-power-lora-1m", [*given, "sequence.length=4096"], gpus=2, device="h200")
    passes = 2 * (15.8 + 5.9) + 15.8 + 9.4
    assert seconds - reduced.time.communication == pytest.approx(36 * passes / 1000, rel=0.05)


def test_the_pairs_of_sparsek_are_those_that_it_reads():
    attention = load_recipe("qwen3-8b-sparsek-full-32k").recipe.attention
    keys = attention.sinks + attention.topk + attention.window
    for length in (1000, 2052, 32768):
        read = sum(min(row + 1, keys) for row in range(length)) / (length * (length + 1) / 2)
        assert attention.build(8).density(length) == pytest.approx(read)


def test_a_device_is_slower_by_its_data_sheet(setting):
    times = {}
    for name in DEVICES:
        planned = setting()
        object.__setattr__(planned, "device", find_device(name))
        times[name] = estimate_time(planned).seconds
    assert times["4090"] > times["a100"] > times["h100"] > times["h200"] > times["b200"]
