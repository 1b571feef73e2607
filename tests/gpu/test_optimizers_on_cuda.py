"""Optimizers whose kernels exist only on CUDA: their states have the promised size, and resume bit for bit."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from sparsetrain.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
# The states of a matrix, and their bytes an element.
CASES = {
    "8 bits": (["train.optimizer={name: adamw_8bit, eps: 1e-3}", "deepspeed.stage=2"], "state1", 1),
    "bf16 states": (["train.optimizer={states: bfloat16, eps: 1e-3}", "deepspeed.stage=2"], "exp_avg", 2),
    "bf16 states, ZeRO 3": (["train.optimizer={states: bfloat16, eps: 1e-3}", "deepspeed.stage=3"], "exp_avg", 2),
    "muon": (["train.optimizer={name: muon, adam_lr: 0.01}", "deepspeed.stage=1"], "momentum_buffer", 4),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=needs_bitsandbytes if c == "8 bits" else []) for c in CASES])
def test_states_have_their_size_and_resume_bit_for_bit(tmp_path, tiny, run_folder, case):
    overrides, kind, width = CASES[case]
    command = ["run", str(tiny), *overrides, "train.steps=4", "checkpoint.every=2", "checkpoint.export=false"]
    whole, resumed = run_folder(tmp_path / "whole"), run_folder(tmp_path / "resumed")
    assert main([*command, "--output", str(whole.path)]) == 0
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.path / "checkpoints/step-000004")
    assert main([*command, "--output", str(resumed.path), "--resume"]) == 0
    found, wanted = (load_file(run.path / "checkpoints/step-000004/rank-00000.safetensors") for run in (resumed, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    states = [tensor for name, tensor in wanted.items() if name.startswith(f"{kind}/") and "q_proj" in name]
    assert states
    assert all(tensor.element_size() == width for tensor in states)
    assert whole.values("loss")[-1] < whole.values("loss")[0]
