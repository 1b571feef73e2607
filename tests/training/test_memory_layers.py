"""Activation checkpointing, offloaded inputs and tiled MLPs: the same gradients from less memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from gradients import assert_close, loss_and_gradients
from training.counted_operations import Count
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.chunks import chunks_of, split_evenly
from sparsetrain.training.memory.host_buffers import HostBuffers
from sparsetrain.training.memory.tiled_mlp import tile_mlps

POWER = {"method": "power", "block": 16, "window": 1, "sinks": 1}
SPARSEK = {"method": "sparsek", "topk": 12, "window": 8, "sinks": 2, "init": "normal"}
LAYERS, TOKENS = 3, 96
CPU = torch.device("cpu")


def build(attention=POWER, family="llama", **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            **fields,
        },
    )
    return sparsify(AutoModelForCausalLM.from_config(config, dtype=torch.float32), attention).train()


@pytest.fixture
def inputs():
    """Two packed documents."""
    ids = torch.randint(96, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(60), torch.arange(TOKENS - 60)])[None]
    bounds = torch.tensor([0, 60, TOKENS], dtype=torch.int32)
    return {"input_ids": ids, "position_ids": positions, "cu_seqlens": bounds, "use_cache": False}


def loss_of(model, inputs):
    hidden = model.get_decoder()(**inputs).last_hidden_state
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum()


def backward(model, inputs):
    """The loss of one pass, and the gradients."""
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    return loss_and_gradients(model, loss)


def peak(model, inputs):
    """The most bytes of fresh tensors alive at a time in one forward and backward pass."""
    loss_of(model, inputs).backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_of(model, inputs).backward()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def executed(model, inputs):
    with Count() as count:
        backward(model, inputs)
    return count.seen


@pytest.mark.parametrize("attention", [POWER, SPARSEK, {"method": "full"}], ids=["power", "sparsek", "full"])
@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_checkpointed_layers_give_the_same_gradients(attention, mode, inputs):
    model = build(attention)
    wanted = backward(model, inputs)
    enable_activation_checkpointing(model, mode)
    found = backward(model, inputs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("attention", "operation"),
    [
        (POWER, "sparsetrain::block_pattern_fwd"),
        (SPARSEK, "sparsetrain::selected_fwd"),
        ({"method": "full"}, "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
    ids=["power", "sparsek", "full"],
)
def test_selective_keeps_what_attention_returned(attention, operation, inputs):
    calls = {}
    if attention["method"] == "full":
        inputs |= {"position_ids": torch.arange(TOKENS)[None], "cu_seqlens": None}
    for mode in ("none", "layer", "selective"):
        model = build(attention)
        if mode != "none":
            enable_activation_checkpointing(model, mode)
        calls[mode] = executed(model, inputs)
    assert [calls[mode][operation] for mode in calls] == [LAYERS, 2 * LAYERS, LAYERS]
    # Everything else in the layer is computed again.
    assert calls["selective"]["aten::silu"] == 2 * calls["none"]["aten::silu"]


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_a_selection_is_never_made_twice(mode, inputs):
    model = build(SPARSEK)
    enable_activation_checkpointing(model, mode)
    assert executed(model, inputs)["sparsetrain::causal_sparsek"] == LAYERS


def test_a_recompute_may_run_other_operations_than_the_forward_pass(inputs):
    """As under ZeRO-3, where weights that are still there are not gathered again."""
    model = build(SPARSEK)
    wanted = backward(model, inputs)
    enable_activation_checkpointing(model, "selective")
    passes = []

    def gather(module, args):
        passes.append(len(passes))
        for _ in range(passes[-1]):
            torch.ones(2).cumsum(0)

    model.get_decoder().layers[1].input_layernorm.register_forward_pre_hook(gather)
    assert_close(backward(model, inputs), wanted)
    assert passes == [0, 1]


def test_each_mode_takes_less_memory_than_the_one_before(inputs):
    found = {}
    for mode in ("none", "selective", "layer"):
        model = build(num_hidden_layers=8)
        if mode != "none":
            enable_activation_checkpointing(model, mode)
        found[mode] = peak(model, inputs)
    hidden_states = TOKENS * 32 * 4
    assert found["none"] > 1.5 * found["selective"]
    assert found["selective"] > found["layer"] + 4 * hidden_states


def first_input(model, inputs):
    """A weak reference to the input of the second layer in a forward pass, and the loss that keeps its graph."""
    seen = []
    layers = model.get_decoder().layers
    hook = layers[1].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    loss = model.get_decoder()(**inputs).last_hidden_state.sum()
    hook.remove()
    return seen[0], loss


def offloaded(inputs, mode="layer", **options):
    model = build(SPARSEK)
    offload = ActivationOffload(CPU, smallest=0, **options)
    enable_activation_checkpointing(model, mode, offload)
    return model, offload


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_offloaded_inputs_give_the_same_gradients(mode, inputs):
    wanted = backward(build(SPARSEK), inputs)
    model, _ = offloaded(inputs, mode)
    # The second pass follows one whose graph is gone.
    for _ in range(2):
        found = backward(model, inputs)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_offloaded_inputs_share_as_many_buffers_as_there_are_layers(mode, inputs):
    model, offload = offloaded(inputs, mode)
    seen = []
    offload.buffers.reserve(LAYERS, TOKENS * 32 * 4, seen.append)
    reserved = offload.buffers.nbytes
    assert seen == [reserved // LAYERS * made for made in range(1, LAYERS + 1)]
    for _ in range(3):
        backward(model, inputs)
        # A pass without a backward pass gives its buffers back too.
        model.get_decoder()(**inputs)
        assert len(offload.buffers._free) == LAYERS
    assert offload.buffers.nbytes == reserved


def test_a_buffer_is_used_by_whatever_fits_and_by_one_tensor_at_a_time():
    buffers = HostBuffers(CPU)
    buffers.reserve(2, 4096, lambda nbytes: None)
    transposed = torch.arange(12.0).view(3, 4).t()
    (first, held), (second, _) = (buffers.take(transposed) for _ in range(2))
    assert (first.stride(), first.dtype) == (transposed.stride(), transposed.dtype)
    first.copy_(transposed)
    second.fill_(-1)
    assert torch.equal(first, transposed)
    assert buffers.nbytes == 8192
    third, _ = buffers.take(torch.ones(2000))
    assert third.shape == (2000,)
    assert buffers.nbytes == 16384
    buffers.give_back(held)
    assert buffers.take(transposed)[0].data_ptr() == first.data_ptr()


def test_an_offloaded_input_leaves_the_device_in_the_forward_pass(inputs):
    model, offload = offloaded(inputs)
    gone, loss = first_input(model, inputs)
    assert gone() is None
    # The last layer's input waits for its copy.
    assert len(offload.in_flight) == 1
    kept, _ = first_input(build(SPARSEK), inputs)
    assert kept() is not None
    loss.backward()
    assert not offload.in_flight


def test_inputs_are_fetched_one_layer_ahead(inputs, monkeypatch):
    model, offload = offloaded(inputs)
    events = []
    bring, fetch = offload._bring, offload._fetch
    saved = []
    monkeypatch.setattr(offload, "_bring", lambda one: events.append(("bring", saved.index(one))) or bring(one))
    offload.unpack_hook = lambda one: events.append(("use", saved.index(one))) or fetch(one)
    save = offload._save
    offload.pack_hook = lambda tensor: saved.append(save(tensor)) or saved[-1]
    loss = model.get_decoder()(**inputs).last_hidden_state.sum()
    loss.backward()
    assert events == [("use", 2), ("bring", 2), ("bring", 1), ("use", 1), ("bring", 0), ("use", 0)]


def test_a_forward_pass_without_a_backward_pass_leaves_nothing_behind(inputs):
    model, offload = offloaded(inputs)
    _, loss = first_input(model, inputs)
    last = offload.last
    assert last() is not None
    del loss
    assert last() is None
    wanted = backward(build(SPARSEK), inputs)
    assert torch.equal(backward(model, inputs)["loss"], wanted["loss"])


def test_what_is_fetched_ahead_is_held_until_it_is_copied_even_if_nobody_asks_for_it():
    offload = ActivationOffload(CPU, smallest=0)
    saved = [offload._save(torch.full((4,), value)) for value in (1.0, 2.0)]
    offload._fetch(saved[1])
    ahead = weakref.ref(saved[0].coming[0])
    saved.clear()
    assert ahead() is not None
    offload._save(torch.zeros(4))
    assert ahead() is None


def test_small_tensors_stay_where_they_are():
    offload, small, large = ActivationOffload(CPU, smallest=400), torch.zeros(99), torch.zeros(100)
    assert offload._save(small) is small
    assert offload._save(large) is not large


def test_splitting_evenly_is_tensor_split():
    tensor = torch.arange(23.0, requires_grad=True)
    for chunks in (1, 4, 23, 30):
        parts = split_evenly(tensor, chunks)
        assert [part.tolist() for part in parts] == [part.tolist() for part in tensor.tensor_split(chunks)]
        torch.cat(parts).square().sum().backward()
    assert torch.equal(tensor.grad, 4 * 2 * tensor.detach())
    assert [chunks_of(23, chunk) for chunk in (None, 4, 23, 100)] == [1, 6, 1, 1]


FAMILIES = [("llama", {}), ("phi3", {}), ("gemma2", {"head_dim": 8}), ("gpt_neox", {"hidden_act": "gelu"})]


@pytest.mark.parametrize(("family", "fields"), FAMILIES, ids=[family for family, _ in FAMILIES])
@pytest.mark.parametrize("chunks", [5, TOKENS + 4], ids=["uneven", "empty"])
def test_tiles_give_the_same_gradients(family, fields, chunks, inputs):
    attention = {**POWER, "replace_sliding_layers": True}
    wanted = backward(build(attention, family, **fields), inputs)
    model = build(attention, family, **fields)
    assert tile_mlps(model, chunks) == LAYERS
    found = backward(model, inputs)
    assert_close(found, wanted)


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_tiles_inside_checkpointed_layers_with_offloaded_inputs(mode, inputs):
    wanted = backward(build(SPARSEK), inputs)
    model, _ = offloaded(inputs, mode)
    tile_mlps(model, 4)
    found = backward(model, inputs)
    assert_close(found, wanted)


def test_tiles_replay_the_dropout_of_adapters_and_reach_them_below_frozen_layers(inputs):
    """No input of the first MLP needs a gradient here, only the adapters in it."""

    def adapted():
        model = build()
        add_adapters(model, LoraSection(rank=4, dropout=0.5, targets=["gate_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return model

    model = adapted()
    torch.manual_seed(3)
    wanted = backward(model, inputs)
    tiled = adapted()
    tiled.load_state_dict(model.state_dict())
    # One tile draws the same masks as none.
    tile_mlps(tiled, 1)
    torch.manual_seed(3)
    found = backward(tiled, inputs)
    assert any("layers.0.mlp" in name for name in wanted)
    assert_close(found, wanted)


def test_tiles_take_less_memory(inputs):
    whole, tiled = build(intermediate_size=1024), build(intermediate_size=1024)
    for model in (whole, tiled):
        enable_activation_checkpointing(model, "layer")
        # Gradients of the MLP's weights are as large as their inputs here.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." not in name)
    tile_mlps(tiled, 8)
    assert peak(tiled, inputs) < peak(whole, inputs) / 3


def test_a_model_without_an_mlp_is_refused():
    model = build()
    for layer in model.get_decoder().layers:
        layer.other = layer._modules.pop("mlp")
    with pytest.raises(ModelError, match=r"train.mlp_chunk: .* no module named mlp or feed_forward; set it to null"):
        tile_mlps(model, 4)


def test_an_mlp_that_returns_more_than_its_output_is_refused(inputs):
    model = build(family="gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    tile_mlps(model, 4)
    with pytest.raises(ModelError, match=r"train.mlp_chunk: GptOssMLP returns more .* set it to null"):
        backward(model, inputs)
