"""Compiles a kernel for Hopper on a machine without a GPU and prints what it takes of it, as one line of JSON.

For a process without Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime.cache import get_cache_manager

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
triton.knobs.nvidia.dump_ptxas_log = True


def compiled(code: Any, options: dict[str, Any], always: bool = False) -> tuple[Any, str]:
    """The kernel and what ptxas said of it, both from Triton's cache if nothing of it has changed."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        mock.patch.object(triton.knobs.compilation, "always_compile", always),
    ):
        kernel = triton.compile(code, target=TARGET, options=options)
    cache = get_cache_manager(kernel.hash)
    if "Used" in said.getvalue():
        cache.put(said.getvalue(), "ptxas.log", binary=False)
    kept = cache.get_file("ptxas.log")
    # Compiled by something that did not keep what ptxas said.
    return compiled(code, options, always=True) if kept is None else (kernel, Path(kept).read_text())


def report(name: str, code: Any, options: dict[str, Any]) -> None:
    kernel, log = compiled(code, options)
    assert "Used" in log, log
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    facts = {
        "copies": "cp.async" in kernel.asm["ptx"],
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "kernel": name,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        # ptxas says so, and no more, where it puts a wait behind every product.
        "serialised": "wgmma" in log and "serializ" in log,
    }
    print(json.dumps(facts), flush=True)


class SharedMemory(Exception):
    """Ends a compilation with the bytes of shared memory of its kernel."""


def report_shared(name: str, code: Any, options: dict[str, Any]) -> None:
    """Compile it until its shared memory is known: what follows takes a minute for kernels that spill."""
    make = compiler.CUDABackend.make_llir
    modules: list[Any] = []

    def remember(backend: Any, module: Any, *others: Any) -> Any:
        modules.append(module)
        return make(backend, module, *others)

    def stop(passes: Any, *_: Any) -> None:
        passes.run(modules[0], "shared")
        raise SharedMemory(modules[0].get_int_attr("ttg.shared"))

    with (
        mock.patch.object(triton.knobs.compilation, "always_compile", True),
        mock.patch.object(compiler.CUDABackend, "make_llir", remember),
        mock.patch.object(compiler.nvidia.passes.ttgpuir, "add_to_llvmir", stop),
        pytest.raises(SharedMemory) as known,
    ):
        triton.compile(code, target=TARGET, options=options)
    print(json.dumps({"kernel": name, "shared": known.value.args[0]}), flush=True)
