"""Two CUDA devices and NCCL: every way to share the work takes the steps of one rank, and faults are told by name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from training import faulty_ranks

from sparsetrain.cli import main
from sparsetrain.training.checkpoints import read_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
LIGER = util.find_spec("liger_kernel") is not None

# Small blocks: kernels in fp32 compile for long with large ones.
FP32 = ["model.dtype=float32", "attention.block=16"]
SPARSEK = "attention={method: sparsek, topk: 64, window: 64, sinks: 4}"
SHARED = "sequence.parallel=2"
BY_ONE = {"float32": [*FP32, "deepspeed.stage=2"], "bfloat16": [], "sparsek": [SPARSEK]}
BY_TWO = {
    **{f"float32-{stage}": [*FP32, f"deepspeed.stage={stage}", "checkpoint.every=3"] for stage in range(4)},
    **{f"bfloat16-{stage}": [f"deepspeed.stage={stage}"] for stage in range(4)},
    "shared-power": [*FP32, SHARED, "deepspeed.stage=3"],
    "shared-bfloat16": [SHARED, "deepspeed.stage=3"],
    "shared-sparsek": [SPARSEK, SHARED],
    **(
        {"liger": [*FP32, "deepspeed.stage=3", "train.liger=on", "train.activation_checkpointing=layer"]}
        if LIGER
        else {}
    ),
}
COMMANDS = """
import json, sys
from sparsetrain.cli import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def runs(tiny, shared, ranks_of, run_folder):
    """Runs by name: of one rank, of two, and ``resumed``, which two began and one ended."""

    def make(folder):
        def command(name, overrides):
            return ["run", str(tiny), *overrides, "--output", str(folder / name)]

        commands = [command(name, overrides) for name, overrides in BY_TWO.items()]
        ranks = ranks_of([sys.executable, "-c", COMMANDS, json.dumps(commands)], folder / "log", 2)
        try:
            for name, overrides in BY_ONE.items():
                assert main(command(name, overrides)) == 0
        finally:
            ranks.wait()
        shutil.copytree(folder / "float32-3", folder / "resumed")
        shutil.rmtree(folder / "resumed/checkpoints/step-000006")
        assert main([*command("resumed", BY_ONE["float32"]), "--resume"]) == 0

    folder = shared("ranks", make)
    found = {name: run_folder(folder / name) for name in (*BY_ONE, *BY_TWO, "resumed")}
    return found | {"log": (folder / "log").read_text()}


def assert_same_steps(found, wanted, dtype):
    """Equal but for rounding, which in bf16 is that of gradients: the sum over two ranks is rounded once more."""
    loss, norm = (1e-5, 1e-4) if dtype == "float32" else (3e-3, 2e-2)
    assert found.values("step") == [1, 2, 3, 4, 5, 6]
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=loss)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=norm)
    assert found.values("tokens") == wanted.values("tokens")
    assert wanted.values("loss")[-1] < 0.95 * wanted.values("loss")[0]
    weights, expected = (read_weights(run.path / "checkpoints/step-000006") for run in (found, wanted))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=5e-5 if dtype == "float32" else 5e-3)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_takes_the_steps_of_one_rank_with_twice_the_accumulation(runs, dtype, stage):
    found, wanted = runs[f"{dtype}-{stage}"], runs[dtype]
    assert found.values("loss")[0] == pytest.approx(wanted.values("loss")[0], rel=1e-6)
    assert_same_steps(found, wanted, dtype)


@pytest.mark.skipif(not LIGER, reason="needs liger-kernel")
def test_the_fused_loss_of_a_sharded_projection_is_the_plain_one(runs):
    assert "loss: fused by Liger" in runs["log"]
    assert_same_steps(runs["liger"], runs["float32-3"], "float32")


@pytest.mark.parametrize(
    ("name", "alone", "dtype"),
    [
        ("shared-power", "float32", "float32"),
        ("shared-bfloat16", "bfloat16", "bfloat16"),
        ("shared-sparsek", "sparsek", "bfloat16"),
    ],
)
def test_two_ranks_that_share_every_sequence_take_the_steps_of_one(runs, name, alone, dtype):
    assert_same_steps(runs[name], runs[alone], dtype)


def test_every_shared_sequence_was_compared_with_one_rank(runs):
    assert runs["log"].count("self-check: a sequence over 2 ranks equals one rank's on") == 3


def test_one_rank_ends_what_two_began(runs):
    resumed, begun = runs["resumed"], runs["float32-3"]
    assert resumed.values("loss")[:3] == begun.values("loss")[:3]
    assert_same_steps(resumed, begun, "float32")


# Longer than a step that compiles: only the clock of a rank that waits in vain may run out.
TIMEOUT = 20.0
FAULTS = ("killed", "stopped", "hanging-forward", "raising")
TICK = TIMEOUT / 8
"""A rank was last heard of at most so many seconds before it stopped."""
SLACK = 15.0
"""Seconds for the ticks of the watch, and for a process that waits for its device to end."""


@pytest.fixture(scope="module")
def ends(tiny, shared, ranks_of):
    """``ends(fault)``: exit code, seconds from the fault to the end, and words of each rank."""

    def make(folder):
        command = [sys.executable, faulty_ranks.__file__, "--timeout", str(TIMEOUT), str(tiny), str(folder), *FAULTS]
        ranks_of(command, folder / "log").wait()

    folder: Path = shared("faults", make)

    def read(fault):
        found = json.loads((folder / f"{fault}.json").read_text())
        return [(found["codes"][rank], found["seconds"][rank], found["said"][rank]) for rank in "01"]

    return read


def error_of(rank, said):
    """The one message of a rank."""
    (message,) = re.findall(rf"^error \(rank {rank}\): (.*)$", said, flags=re.MULTILINE)
    return message


def test_the_death_of_a_rank_is_told_at_once(ends):
    (code, seconds, said), (victim, _, words) = ends("killed")
    assert victim == -9, words
    assert code == 3, said
    assert seconds < SLACK
    assert re.match(r"rank 1 \(host \S+\) died; it was last seen in ", error_of(0, said))


def test_a_stopped_process_is_noticed_by_its_silence(ends):
    code, seconds, said = ends("stopped")[1]
    assert code == 3, said
    assert TIMEOUT - TICK < seconds < TIMEOUT + SLACK
    assert re.match(r"rank 0 \(host \S+\) has not answered for 0\.333333 minutes", error_of(1, said))


def test_a_rank_that_hangs_is_told_from_the_one_whose_device_waits_for_it(ends):
    """A collective of NCCL returns at once: the rank that waits does so later on, where it first reads a number."""
    for rank, (code, seconds, said) in enumerate(ends("hanging-forward")):
        assert code == 3, said
        assert TIMEOUT < seconds < TIMEOUT + SLACK
        message = error_of(rank, said)
        assert re.match(r"rank 0 \(host \S+\) made no progress for 0\.333333 minutes .*in step 3, forward", message)


def test_an_error_on_one_rank_is_told_by_the_other(ends):
    (code, seconds, said), (failed, _, trace) = ends("raising")
    assert (code, failed) == (3, 1), said + trace
    assert seconds < SLACK
    assert re.match(
        r"rank 1 \(host \S+\) failed \(step 3, waiting for data\): RuntimeError: a broken thing$", error_of(0, said)
    )
    assert "RuntimeError: a broken" in trace
