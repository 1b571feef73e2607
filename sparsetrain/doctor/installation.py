"""Checks of what is installed: versions, packages, kernels that compute rightly, engines that serve a model."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sparsetrain.doctor.finding import Finding
from sparsetrain.errors import SparsetrainError

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "2.13"),
    "triton": ("3.2", "3.9"),
    "transformers": ("5.12.1", "5.23"),
    "deepspeed": ("0.18.2", "0.19"),
    "peft": ("0.18", "0.21"),
    "datasets": ("4.0", "5.2"),
    "wandb": ("0.19", "0.31"),
}
"""Oldest version that works and newest one tried, by package."""

PYTHON = ("3.11", "3.13")
ENGINES = {"vLLM": ("vllm",), "SGLang": ("sglang",), "transformers serve": ("fastapi", "uvicorn")}
"""Serving engines, and the packages without which there is none."""


def check_versions() -> Iterator[Finding]:
    """Check the versions of Python and the packages against their tested range."""
    yield check_version("python", platform.python_version(), *PYTHON)
    for package, (oldest, newest) in TESTED.items():
        if package == "triton" and platform.system() != "Linux":
            continue
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("fail", package, "not installed", f"pip install '{package}>={oldest}'")
        else:
            yield check_version(package, found, oldest, newest)


def check_version(package: str, found: str, oldest: str, newest: str) -> Finding:
    """One version against its tested range; patch releases of the newest count as tried."""
    from packaging.version import Version

    tried = Version(newest).release
    if Version(found) < Version(oldest):
        fix = f"pip install --upgrade '{package}>={oldest}'" if package in TESTED else f"use Python {oldest} or newer"
        return Finding("fail", package, f"{found} is older than {oldest}", fix)
    if Version(found).release[: len(tried)] > tried:
        fix = "it may well work; if something breaks, constraints.txt has the versions that were tried"
        return Finding("warn", package, f"{found} is newer than {newest}, the newest tried", fix)
    return Finding("ok", package, found)


def check_kernels_package() -> Finding:
    """Hugging Face's ``kernels``, which transformers imports if anything of that name can be imported."""
    name = "kernels package"
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        return Finding("ok", name, "not installed; not needed")
    try:
        distribution = metadata.distribution("kernels")
        genuine = Path(str(distribution.locate_file("kernels/__init__.py"))).resolve() == Path(spec.origin).resolve()
    except metadata.PackageNotFoundError:
        genuine = False
    if genuine:
        return Finding("ok", name, f"Hugging Face's, {distribution.version}")
    folder = Path(spec.origin).parent
    return Finding(
        "fail",
        name,
        f"`import kernels` gives {folder}, which is not Hugging Face's package; transformers cannot load any model",
        f"rename {folder}, or take {folder.parent} off PYTHONPATH",
    )


def check_attention() -> Finding:
    """Check sparse attention, forward and backward, against dense attention with the same mask in fp64."""
    import torch
    from sparsetrain_kernels import block_pattern_attention, block_pattern_attention_dense

    from sparsetrain.patterns import PowerPattern

    cuda = torch.cuda.is_available()
    # On a GPU the kernels that training takes there, in half precision and large blocks.
    device, dtype, block, head_dim = ("cuda", torch.bfloat16, 128, 64) if cuda else ("cpu", torch.float32, 16, 32)
    rows = 12 * block + 8
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, rows, head_dim) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    pattern = PowerPattern(block=block, window=2, sinks=1)
    output = block_pattern_attention(inputs[0], inputs[1], inputs[2], pattern)
    oracle, _ = block_pattern_attention_dense(exact[0], exact[1], exact[2], pattern)
    upstream = torch.randn(output.shape, generator=generator).to(device, dtype)
    got = [output, *torch.autograd.grad(output, inputs, upstream)]
    want = [oracle, *torch.autograd.grad(oracle, exact, upstream.double())]
    error = max(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(got, want))
    found = f"relative error {error:.1e} against dense attention, forward and backward, on {device}"
    # bf16 rounds at 4e-3 and fp32 at 6e-8.
    if error < (1.5e-2 if cuda else 1e-5):
        return Finding("ok", "attention", found)
    return Finding("fail", "attention", found, "do not train on this machine; report the versions listed here")


def check_packages() -> list[Finding]:
    """Methods and tasks of other installed packages."""
    from sparsetrain.evaluation.registry import INSTALLED as TASKS
    from sparsetrain.evaluation.registry import PLACES
    from sparsetrain.methods.installed import INSTALLED as METHODS
    from sparsetrain.methods.registry import METHODS as OWN

    found = []
    for check, installed, own in (("methods", METHODS, tuple(OWN)), ("tasks", TASKS, tuple(PLACES))):
        for name in installed.entries:
            try:
                installed.load(name, own)
                text = f"{installed.setting}={name} comes from {installed.package_of(name)}"
                found.append(Finding("ok", check, text))
            except SparsetrainError as error:
                found.append(Finding("warn", check, str(error)))
    return found


def check_serving() -> Finding:
    """Serving engines, none of which reads the record of a method: they run the dense model."""
    there = [name for name, needed in ENGINES.items() if all(importlib.util.find_spec(each) for each in needed)]
    what = (
        f"{', '.join(list(ENGINES)[:-1])} and `{list(ENGINES)[-1]}` load an exported folder, but attend to every key, "
        f"without a word: they read no attention method. Installed: {', '.join(there) or 'none'}"
    )
    if not there:
        return Finding("ok", "serving", what)
    fix = "generate with sparsetrain generate FOLDER, or sparsetrain.load(folder).generate(...), which run the method"
    return Finding("warn", "serving", what, fix)
