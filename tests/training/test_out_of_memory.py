"""What an out-of-memory error says: place, peak, sequence, and the settings that the recipe does not use yet."""

from __future__ import annotations

import resource

import pytest
import torch

from sparsetrain.activity import activity
from sparsetrain.recipe import Recipe
from sparsetrain.training.supervision.out_of_memory import explain_out_of_memory, is_out_of_memory, settings_that_help
from sparsetrain.world import World


def recipe(model=None, evaluation=None, lora=None, length=65536, parallel=1, deepspeed=None, **train):
    return Recipe.model_validate(
        {
            "model": {"path": "some/model", **(model or {})},
            "attention": {"method": "power"},
            "data": {"sources": [{"synthetic": "passkey"}]},
            "sequence": {"length": length, "parallel": parallel},
            "train": {"steps": 10, "lr": 1e-3, "micro_batch": 2, **train},
            "deepspeed": deepspeed or {},
            "eval": evaluation or {},
            "lora": lora,
        }
    )


def world(size=8, device="cuda"):
    return World(0, size, torch.device(device))


@pytest.fixture(autouse=True)
def _in_forward():
    activity.at("forward", 7)
    yield
    activity.reset()


def names(recipe, world):
    return [text.partition(": ")[0] for text in settings_that_help(recipe, world)]


def test_in_forward_activations_come_first_and_each_setting_once():
    assert names(recipe(), world()) == [
        "train.micro_batch",
        "train.activation_checkpointing",
        "train.mlp_chunk",
        "sequence.parallel",
        "deepspeed.stage",
        "deepspeed.offload_optimizer",
        "lora",
        "sequence.length",
    ]


def test_what_is_used_already_is_not_advised():
    used = recipe(
        micro_batch=1,
        activation_checkpointing="layer",
        mlp_chunk=4096,
        offload_activations=True,
        parallel=8,
        deepspeed={"stage": 3, "offload_optimizer": "cpu"},
        lora={},
    )
    assert names(used, world()) == ["sequence.length"]


def test_elsewhere_states_come_first():
    activity.at("optimizer step", 7)
    assert names(recipe(), world())[:3] == ["deepspeed.stage", "deepspeed.offload_optimizer", "lora"]


def test_one_rank_on_a_cpu_is_advised_nothing_that_needs_others_or_a_gpu():
    advised = names(recipe(activation_checkpointing="layer", lora={}, deepspeed={"stage": 1}), world(1, "cpu"))
    assert advised == ["train.micro_batch", "train.mlp_chunk", "sequence.length"]


def test_in_an_evaluation_its_own_lengths_come_first():
    activity.at("evaluating: power, before")
    long = {"tasks": [{"task": "passkey", "lengths": [4096, 131072]}]}
    assert next(settings_that_help(recipe(evaluation=long), world())) == (
        "eval.tasks.passkey.lengths: up to 65536 (now up to 131072)"
    )


def test_every_advised_setting_is_one_the_recipe_has():
    for text in settings_that_help(recipe(model={"dtype": "float32"}, loss_chunk=None), world()):
        name, _, value = text.partition(": ")
        section = recipe()
        for part in name.split("."):
            assert hasattr(section, part), name
            section = getattr(section, part)
        assert value


def test_the_message_names_place_peak_sequence_and_three_settings():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of ...")
    said = str(explain_out_of_memory(error, recipe(), world(device="cpu")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert said.startswith("out of memory in step 7, forward (CUDA out of memory. Tried to allocate 2.00 GiB): ")
    assert f"the peak of this process was {peak:,.1f} GiB" in said
    assert "2 rows of 65,536 tokens" in said
    assert said.partition("What would help most: ")[2].count("; ") == 2
    assert "train.micro_batch: 1 with train.global_batch_sequences: 16 (now 2" in said


def test_a_setting_that_a_resumed_run_may_not_change_is_advised_for_a_new_one():
    used = recipe(micro_batch=1, activation_checkpointing="layer", mlp_chunk=4096, deepspeed={"stage": 3})
    error = torch.OutOfMemoryError("CUDA out of memory.")
    said = str(explain_out_of_memory(error, used, world(1, "cpu")))
    advised = said.partition("What would help most: ")[2].split("; ")
    assert advised == [
        "lora: {} (gradients and the optimizer's state shrink to those of the adapters), in a new run (another output)",
        "sequence.length: 32768 (now 65536), in a new run (another output). ".rstrip(),
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_errors_are_known_in_every_form(error):
    assert is_out_of_memory(error)


def test_the_allocator_of_the_host_says_so_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
