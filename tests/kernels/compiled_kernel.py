"""Compiles a kernel for Hopper on a machine without a GPU and prints what it takes of it, as one line of JSON.

``compiled_kernels.json`` holds what this printed before, beside a hash of all that it follows from: the kernel's source
and that of what it calls, types, constants, options, and the versions of Triton and ptxas. A kernel whose hash is there
is not compiled again, except for the first of each family, which must give what is recorded.

For a process without Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_manager

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
RECORD = Path(__file__).with_name("compiled_kernels.json")
triton.knobs.nvidia.dump_ptxas_log = True


class Family:
    """The kernels that are compiled one after another, and what is recorded of them."""

    def __init__(self, name: str, record: dict[str, dict[str, Any]]) -> None:
        self.name, self.record, self.begun = name, record, False
        self.told: dict[str, dict[str, Any]] = {}

    def tell(self, kernel: str, code: Any, options: dict[str, Any], compile: Callable[..., dict[str, Any]]) -> None:
        """Print the facts of a kernel, compiled unless they are recorded."""
        name, follows_from = f"{self.name}: {kernel}", hash_of(code, options)
        assert name not in self.told, f"two kernels are called {name}"
        known = self.record.get(name)
        known = known if known and known["hash"] == follows_from else None
        facts = known if known and self.begun else {"hash": follows_from, **compile(code, options)}
        assert known in (None, facts), f"{name} is {facts}, and {known} is recorded"
        self.begun, self.told[name] = True, facts
        print(json.dumps({"kernel": kernel, **facts}), flush=True)


family = Family("", {})


def begin(name: str, record: dict[str, dict[str, Any]]) -> Family:
    """What is compiled from now on is of this family."""
    global family
    family = Family(name, record)
    return family


def hash_of(code: Any, options: dict[str, Any]) -> str:
    """As Triton's key of its own cache, but for the build of Triton, which differs from Python to Python."""
    backend = make_backend(TARGET)
    given = backend.parse_options({**options, **code.parse_options()})
    parts = f"{triton.__version__} {code.hash()} {backend.hash()} {given.hash()}"
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


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
    """Tell what a kernel takes."""
    family.tell(name, code, options, facts_of)


def facts_of(code: Any, options: dict[str, Any]) -> dict[str, Any]:
    kernel, log = compiled(code, options)
    assert "Used" in log, log
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "copies": "cp.async" in kernel.asm["ptx"],
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        # ptxas says so, and no more, where it puts a wait behind every product.
        "serialised": "wgmma" in log and "serializ" in log,
    }


class SharedMemory(Exception):
    """Ends a compilation with the bytes of shared memory of its kernel."""


def report_shared(name: str, code: Any, options: dict[str, Any]) -> None:
    """Tell what shared memory a kernel takes."""
    family.tell(name, code, options, shared_of)


def shared_of(code: Any, options: dict[str, Any]) -> dict[str, Any]:
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
    return {"shared": known.value.args[0]}
