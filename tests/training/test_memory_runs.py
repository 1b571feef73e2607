"""The memory options in whole runs: real engines, every ZeRO stage that behaves differently, rows of unequal length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain.cli import main
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.batch import BatchPlan
from sparsetrain.recipe.consistency import without_effect
from sparsetrain.training.memory import activations, host
from sparsetrain.training.memory.activation_offload import ActivationOffload

SAVING = ["train.activation_checkpointing=selective", "train.mlp_chunk=60"]
UNPACKED = ["deepspeed.stage=3", "sequence.packing=false", "train.steps=3"]
RUNS = {
    "stage-2": ["deepspeed.stage=2", "train.activation_checkpointing=layer", "train.mlp_chunk=60"],
    "stage-3": ["deepspeed.stage=3", *SAVING],
    # The ranks' rows differ in length, and under ZeRO-3 each tile gathers weights, which both must do equally often.
    "unpacked": [*UNPACKED, *SAVING],
    "unpacked-plain": UNPACKED,
}


@pytest.fixture(scope="module")
def runs(tiny, shared, ranks_of, run_folder):
    """Runs by two ranks, by name."""

    def make(folder):
        commands = [["run", str(tiny), *RUNS[name], "--output", str(folder / name)] for name in RUNS]
        ranks_of(commands, folder / "log", 2).wait()

    folder = shared("memory-runs", make)
    return {name: run_folder(folder / name) for name in RUNS} | {"log": (folder / "log").read_text()}


@pytest.mark.parametrize("stage", [2, 3])
def test_they_train_what_a_run_without_them_trains(runs, stages, stage):
    plain, saving = stages(2)[stage], runs[f"stage-{stage}"]
    assert saving.values("loss") == pytest.approx(plain.values("loss"), rel=1e-5)
    assert saving.values("grad_norm") == pytest.approx(plain.values("grad_norm"), rel=1e-3)


def test_ranks_with_rows_of_different_lengths_stay_together(runs):
    assert runs["unpacked"].values("loss") == pytest.approx(runs["unpacked-plain"].values("loss"), rel=1e-5)


def test_a_run_says_what_it_did_about_memory(runs):
    said = [line.partition("memory: ")[2] for line in runs["log"].splitlines() if "memory: " in line]
    assert said == [
        "2 MLPs in 5 tiles each; every layer checkpointed, fully recomputed",
        *["2 MLPs in 5 tiles each; every layer checkpointed, attention outputs kept"] * 2,
        "every activation is kept",
    ]
    assert runs["log"].count("loss: logits of 100 tokens at a time") == len(RUNS)


@pytest.fixture
def reserve(world, monkeypatch):
    """``reserve(room)``: make host memory for rows of 4,096 tokens over two ranks on a host with ``room`` bytes and no
    limit of a container, or the ``limit``; the buffers, and what was said."""

    def make(room, limit=None):
        memory = SimpleNamespace(available=room)
        monkeypatch.setattr(host, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
        monkeypatch.setattr(host, "CONTROL_GROUPS", (SimpleNamespace(available=lambda: limit),))
        config = AutoConfig.for_model("llama", hidden_size=128, num_hidden_layers=3, vocab_size=32)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        offload, said = ActivationOffload(world.device), []
        plan = BatchPlan(1, 1, 1, 8192, parallel=2, steps=1, warmup_steps=0)
        activations.reserve_host_memory(offload, model, plan, world, 2, said.append)
        return offload.buffers, said

    return make


def test_host_memory_is_there_before_the_first_step(reserve, monkeypatch):
    monkeypatch.setattr(activations, "SHOWN_EVERY", 0.0)
    buffers, said = reserve(12 << 20)
    assert buffers.nbytes == 3 * 4096 * 128 * 4
    assert said[0] == "memory: pinning 0.0 GiB of host memory for the inputs of 3 layers, before the first step"
    assert said[1:4] == ["memory: 0.0 GiB of 0.0 GiB are pinned"] * 3
    assert said[4].startswith("memory: 0.0 GiB pinned in ")


@pytest.mark.parametrize("memory", [((12 << 20) - 1,), (1 << 40, (12 << 20) - 1)], ids=["bare host", "container"])
def test_too_little_host_memory_is_refused_with_figures(reserve, monkeypatch, memory):
    monkeypatch.setattr(activations, "_gib", lambda nbytes: f"{nbytes >> 20} MiB")
    with pytest.raises(RecipeError) as error:
        reserve(*memory)
    assert str(error.value).startswith(
        "train.offload_activations: the inputs of 3 layers with 4,096 tokens take 6 MiB of host memory, 12 MiB for "
        "2 ranks on a host, and 11 MiB are left there or in its container; set it to false"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.activation_checkpointing=layer", "train.offload_activations=true"],
            "train.offload_activations moves activations off a GPU, and this machine has none; set it to false",
        ),
        (
            ["train.offload_activations=true"],
            "offloads the inputs of checkpointed layers, and train.activation_checkpointing is none; set that to layer "
            "or selective",
        ),
        (["train.liger=on"], "Liger's kernels run on CUDA devices, and this machine has none; set it to auto"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(refused, tiny, tmp_path, overrides, said):
    error = refused("run", str(tiny), *overrides, "--output", str(tmp_path / "run"))
    assert said in " ".join(error.split())


def test_tiles_as_long_as_the_row_are_noted(tiny_recipe):
    assert without_effect(tiny_recipe("train.mlp_chunk=255")) == []
    assert without_effect(tiny_recipe("train.mlp_chunk=256")) == [
        "train.mlp_chunk=256 has no effect: a pass of a rank has 256 tokens"
    ]


class Products(TorchDispatchMode):
    """Counts matrix products that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten.mm.default
        return operation(*args, **(kwargs or {}))


def test_zero_3_recomputes_no_more_than_other_stages(tmp_path, tiny):
    """A recompute stops before the last product of a layer, which nothing in backward needs."""
    counts = {}
    for stage in (2, 3):
        arguments = [f"deepspeed.stage={stage}", "train.activation_checkpointing=layer", "train.steps=2"]
        with Products() as products:
            assert main(["run", str(tiny), *arguments, "--output", str(tmp_path / str(stage))]) == 0
        counts[stage] = products.count
    assert counts[3] == counts[2] > 0
