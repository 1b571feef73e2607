"""Two CUDA devices share long rows with everything that saves memory: the steps of one, in the memory of half a row."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sparsetrain.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
LENGTH = 8192
"""So that the input of a layer is 2 MiB on each of two ranks: smaller ones are not offloaded."""
METHODS = {
    "power": "attention={method: power, block: 128, window: 2, sinks: 1, dense_layers: [0]}",
    "sparsek": "attention={method: sparsek, topk: 256, window: 256, sinks: 4}",
}
SAVING = [
    *("train.activation_checkpointing=selective", "train.offload_activations=true", "train.mlp_chunk=2048"),
    *("deepspeed.stage=3", "lora={rank: 4, targets: linear}", "train.lr=0.02", "train.loss_chunk=2048"),
    "train.steps=3",
]
TWICE = f"sequence.length={2 * LENGTH}"
COMMANDS = """
import json, sys
from sparsetrain.cli import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def runs(tiny, pretrained, shared, ranks_of, run_folder):
    """Runs of one rank by method, of two as ``shared-METHOD``, and ``twice``, of two over rows of twice the length."""

    def make(folder):
        overrides = {"max_position_embeddings": 2 * LENGTH}
        model = {"path": str(pretrained / "untied"), "dtype": "bfloat16", "config_overrides": overrides}

        def command(name, method, *more):
            given = [f"model={json.dumps(model)}", METHODS[method], f"sequence.length={LENGTH}", *SAVING, *more]
            return ["run", str(tiny), *given, "--output", str(folder / name)]

        # The peak is one of the whole process.
        together = [command("twice", "power", "sequence.parallel=2", TWICE)]
        together += [command(f"shared-{method}", method, "sequence.parallel=2") for method in METHODS]
        ranks = ranks_of([sys.executable, "-c", COMMANDS, json.dumps(together)], folder / "log", 2)
        torch.cuda.reset_peak_memory_stats()
        try:
            for method in METHODS:
                assert main(command(method, method)) == 0
        finally:
            ranks.wait()

    folder = shared("shared-rows", make)
    return {name: run_folder(folder / name) for name in (*METHODS, *(f"shared-{m}" for m in METHODS), "twice")}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_that_save_memory_take_the_steps_of_one(runs, method):
    found, wanted = runs[f"shared-{method}"], runs[method]
    assert found.values("step") == [1, 2, 3]
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=3e-3)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=2e-2)
    assert found.values("tokens") == wanted.values("tokens")


def test_a_rank_needs_as_much_for_half_of_a_row_as_one_for_a_row_of_half_the_length(runs):
    twice, half = (max(runs[name].values("peak_memory_gb")) for name in ("twice", "power"))
    assert twice < 1.1 * half
