"""Every kernel compiles for Hopper without a GPU, keeps to registers and shared memory, and uses the tensor cores."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper."""

# Bytes of local memory a thread, with the ptxas of Triton 3.9; others differ. What is listed lies mostly outside the
# loops, or is what was fastest on the card all the same: a wide tile that spills a little beat a narrow one that does
# not. Head dim 256 needs more than there are registers.
STACK = {
    "plain bf16": {
        "dq bf16 64": 48,
        "dkv bf16 64": 16,
        "fwd bf16 128": 56,
        "dq bf16 128": 8,
        "dkv bf16 128": 240,
        "dq bf16 256": 144,
        "dkv bf16 256": 1272,
    },
    "selected bf16": {
        "stretch bf16 64": 72,
        "dq bf16 128": 16,
        "stretch bf16 128": 48,
        "dkv bf16 128": 544,
        "dq bf16 256": 16,
        "stretch bf16 256": 464,
        "dkv bf16 256": 480,
    },
    "hopper bf16": {"dq bf16 128": 32, "dkv bf16 128": 152, "rows dkv bf16 128": 112, "fused bf16 128": 72},
    # Two programs a multiprocessor instead of one; what spills is the search that few rows need.
    "lists fp16": {
        "threshold_kernel": 224,
        "short_threshold_kernel": 48,
        "threshold_kernel pages": 232,
        "list_kernel newest pages": 16,
        "short_threshold_kernel pages": 48,
    },
    "listed bf16": {"listed_decode_kernel bf16 128 1": 8},
    "segments": {
        "rows 128 64 bf16": 40,
        "keys 128 bf16": 264,
        "rows 256 64 bf16": 272,
        "dq 64 bf16": 40,
        "dkv 128 bf16": 80,
        "fwd bf16 128": 24,
        "dq bf16 128": 80,
        "dkv of selected keys bf16 128": 320,
        "dkv of neighbours bf16 128": 104,
    },
}
SERIALISED = {
    "plain bf16": {
        *("fwd bf16 64", "dq bf16 64", "fwd bf16 128", "dq bf16 128"),
        *("fwd bf16 256", "dq bf16 256", "dkv bf16 256"),
    }
}
"""Kernels in which this ptxas puts a wait behind every product (its message C7512)."""


KNOWN_PTXAS = importlib.metadata.version("triton").startswith("3.9.")


class Compiler:
    """A process that compiles families of kernels, one after another: to start it takes as long as several kernels."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, Path(__file__).with_name("cross_compile_families.py")]
        with self.errors.open("w") as errors:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            return subprocess.Popen(command, text=True, env=environment, **pipes)

    def __call__(self, family: str) -> list[dict]:
        self.process = self.process or self.start()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(family + "\n")
        self.process.stdin.flush()
        kernels = []
        for line in self.process.stdout:
            if line.startswith("{"):
                kernels.append(json.loads(line))
            elif line.startswith("compiled "):
                return kernels
        self.process = None
        raise AssertionError(self.errors.read_text()[-2000:])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    compiler = Compiler(tmp_path_factory.mktemp("compiler") / "errors.txt")
    yield compiler
    if compiler.process:
        compiler.process.communicate()


KERNELS = {"plain bf16": 9, "selected bf16": 12, "hopper bf16": 9}


@pytest.mark.parametrize("family", KERNELS)
def test_half_precision_kernels_fit_and_use_the_tensor_cores(family: str, compiled: Compiler) -> None:
    kernels = compiled(family)
    assert len(kernels) == KERNELS[family]
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["wgmma"] > 0, kernel
        if KNOWN_PTXAS:
            assert kernel["stack"] <= STACK[family].get(kernel["kernel"], 0), kernel
        if KNOWN_PTXAS or family not in SERIALISED:
            assert not kernel["serialised"] or kernel["kernel"] in SERIALISED.get(family, ()), kernel


def test_single_precision_kernels_fit(compiled: Compiler) -> None:
    # Exact fp32 products run on the ordinary cores and spill whatever the tile; only the shared memory is in question.
    kernels = compiled("plain fp32")
    assert len(kernels) == 9
    assert all(kernel["shared"] <= SHARED for kernel in kernels)


def test_estimates_keep_to_registers_and_load_ahead(compiled: Compiler) -> None:
    kernels = compiled("mirror bf16")
    assert len(kernels) == 31
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["stack"] == 0, kernel
        if kernel["kernel"].startswith("estimate"):
            # Codes go from memory to the tensor cores by way of shared memory, as integers.
            assert kernel["copies"], kernel
            assert kernel["mma"] > 0, kernel


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("sparsek fp32", 21),
        ("sum bf16", 3),
        ("lists fp16", 20),
        ("listed bf16", 12),
        ("decode bf16", 6),
        ("projection bf16", 6),
    ],
)
def test_the_kernels_around_attention_keep_to_registers(family: str, count: int, compiled: Compiler) -> None:
    kernels = compiled(family)
    assert len(kernels) == count
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["stack"] <= STACK.get(family, {}).get(kernel["kernel"], 0), kernel


@pytest.mark.parametrize(("family", "count"), [("listed", 12), ("rows", 6), ("choice", 5), ("selected", 4)])
def test_attention_of_segments_rows_and_selections_uses_the_tensor_cores(
    family: str, count: int, compiled: Compiler
) -> None:
    kernels = compiled(f"segments {family} bf16")
    assert len(kernels) == count
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["wgmma"] > 0 or kernel["kernel"].split()[0] in ("places", "order", "lists"), kernel
        assert not kernel["serialised"], kernel
        if KNOWN_PTXAS:
            assert kernel["stack"] <= STACK["segments"].get(kernel["kernel"], 0), kernel


def test_what_comes_before_them_keeps_to_registers(compiled: Compiler) -> None:
    kernels = compiled("segments work bf16")
    assert len(kernels) == 4
    assert all(kernel["stack"] == 0 for kernel in kernels)
