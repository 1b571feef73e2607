"""What waits in host memory, or in few bits: runs on a CUDA device take the steps of one that keeps everything."""

from __future__ import annotations

import json
import math
import shutil
from importlib import util

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from sparsetrain.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# DeepSpeed compiles its Adam for the CPU when it is first used.
needs_compiler = pytest.mark.skipif(
    CUDA_HOME is None or shutil.which("c++") is None or util.find_spec("ninja") is None,
    reason="needs nvcc, a C++ compiler and ninja",
)
needs_bitsandbytes = pytest.mark.skipif(util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

LONG = "sequence.length=4096"
"""So that the input of a layer is 2 MiB; activations below 1 MiB are not worth a copy, and stay."""
OPTIMIZER, PARAMETERS = "deepspeed.offload_optimizer=cpu", "deepspeed.offload_parameters=cpu"
SPARSEK = "attention={method: sparsek, topk: 64, window: 64, sinks: 4}"
OFFLOADED = [
    pytest.param(["deepspeed.stage=1", OPTIMIZER], id="optimizer-1", marks=needs_compiler),
    pytest.param(["deepspeed.stage=2", OPTIMIZER], id="optimizer-2", marks=needs_compiler),
    pytest.param(["deepspeed.stage=3", OPTIMIZER], id="optimizer-3", marks=needs_compiler),
    pytest.param(["deepspeed.stage=3", PARAMETERS], id="parameters"),
    pytest.param(["deepspeed.stage=3", PARAMETERS, OPTIMIZER], id="both", marks=needs_compiler),
]
MODES = ["layer", "selective"]


@pytest.fixture(scope="module")
def plain(tiny, shared, run_folder):
    """``plain("power")``, ``plain("sparsek")``: runs that keep everything on the device."""

    def find(method):
        def make(folder):
            attention = [SPARSEK] if method == "sparsek" else []
            assert main(["run", str(tiny), LONG, *attention, "--output", str(folder / "run")]) == 0

        return run_folder(shared(f"plain-{method}", make) / "run")

    return find


@pytest.fixture
def train(tiny, tmp_path, run_folder):
    """``train(*overrides, name="run")``: a run with them, in a folder of that name."""

    def run(*overrides, name="run"):
        assert main(["run", str(tiny), LONG, *overrides, "--output", str(tmp_path / name)]) == 0
        return run_folder(tmp_path / name)

    return run


def assert_same_steps(found, wanted, loss, norm):
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=loss)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=norm)
    assert wanted.values("loss")[-1] < 0.95 * wanted.values("loss")[0]


@pytest.mark.parametrize("overrides", OFFLOADED)
def test_states_in_host_memory_take_the_same_steps(train, plain, overrides):
    # Another Adam: its rounding in fp32 is another, and now and then a weight in bf16 too.
    assert_same_steps(train(*overrides), plain("power"), loss=2e-3, norm=2e-2)


def test_adapters_beside_offloaded_parameters_take_the_same_steps(train, pretrained):
    model = json.dumps({"path": str(pretrained / "untied"), "dtype": "bfloat16"})
    lora = [f"model={model}", "lora={rank: 4, targets: linear}", "train.lr=0.05", "deepspeed.stage=3"]
    found, wanted = train(*lora, PARAMETERS), train(*lora, name="kept")
    assert_same_steps(found, wanted, loss=2e-3, norm=2e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["power", "sparsek"])
@pytest.mark.parametrize("offloaded", [False, True], ids=["kept", "offloaded"])
def test_checkpointed_layers_take_the_same_steps(train, plain, method, mode, offloaded):
    overrides = [SPARSEK] if method == "sparsek" else []
    overrides += [f"train.activation_checkpointing={mode}", f"train.offload_activations={str(offloaded).lower()}"]
    # The same operations on the same numbers, a second time.
    assert_same_steps(train(*overrides), plain(method), loss=1e-5, norm=1e-4)


@needs_compiler
def test_everything_at_once_takes_the_same_steps(train, plain):
    activations = ["train.activation_checkpointing=selective", "train.offload_activations=true", "train.mlp_chunk=1024"]
    found = train("deepspeed.stage=3", PARAMETERS, OPTIMIZER, *activations)
    assert_same_steps(found, plain("power"), loss=2e-3, norm=2e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_learn_beside_a_quantized_base(train, pretrained, bits, stage):
    model = json.dumps({"path": str(pretrained / "untied"), "dtype": "bfloat16"})
    lora = f"lora={{rank: 4, targets: linear, quantize_base: {bits}}}"
    losses = train(f"model={model}", lora, "train.lr=0.05", f"deepspeed.stage={stage}").values("loss")
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.98 * losses[0]
