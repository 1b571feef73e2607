"""The package works where Triton cannot be installed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib.abc, importlib.util, sys

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else real(name, *rest)
sys.meta_path.insert(0, NoTriton())

import torch
from sparsetrain.patterns import PowerPattern
from sparsetrain_kernels import block_pattern_attention

query = torch.randn(1, 2, 40, 16, requires_grad=True)
block_pattern_attention(query, query, query, PowerPattern(16, 2, 1)).sum().backward()
print("gradient:", bool(query.grad.isfinite().all()))
try:
    block_pattern_attention(query, query, query, PowerPattern(16, 2, 1), backend="triton")
except ValueError as error:
    print(error)
"""


def test_the_reference_path_runs_and_triton_is_refused() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "gradient: True" in run.stdout
    assert "triton is not installed; use backend='auto' or 'reference'" in run.stdout
