"""``sparsetrain doctor``: find problems of this machine or recipe before a run starts, with fixes."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from sparsetrain.counted import counted
from sparsetrain.data.check import check_data
from sparsetrain.durable import existing_part, folder_fault
from sparsetrain.errors import SparsetrainError
from sparsetrain.plan.disk import room_of, saved_a_parameter
from sparsetrain.plan.public import check_public
from sparsetrain.recipe.batch import batch_shape
from sparsetrain.recipe.local_model import is_own, model_folder
from sparsetrain.recipe.schema import Recipe

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
BUILD_SECONDS = 15 * 60
"""An extension builds in minutes; a lock older than this has been left behind."""


SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """The finding of a check."""

    status: Literal["ok", "warn", "fail"]
    check: str
    found: str
    fix: str = ""


def diagnose(
    recipe: Recipe | None = None,
    naming_places: Callable[[], AbstractContextManager[None]] = nullcontext,
    gpus: int | None = None,
) -> int:
    """Run every check, print the findings, and return the exit code: 2 if one of them would stop a run.

    Args:
        naming_places: adds to an error where the settings are written that it names.
        gpus: GPUs of the run, one process each; by default ``sequence.parallel``.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    findings = list(run_checks(recipe, naming_places, gpus))
    console = Console(highlight=False)
    width = max((len(each.check) for each in findings), default=0)
    table = Table.grid("", "", "", padding=(0, 2, 0, 0))
    for each in findings:
        table.add_row(f"[{colours[each.status]}]{each.status}[/]", each.check, escape(each.found))
        if not console.is_terminal:
            console.print(f"{each.status:4}  {each.check:{width}}  {each.found}", soft_wrap=True, markup=False)
    if console.is_terminal:
        console.print(table)
    for each in findings:
        if each.fix:
            # Not in the table, where it would be broken into lines and could not be copied.
            console.print(f"\n{each.status} {each.check}: {each.fix}", soft_wrap=True, markup=False)
    return 2 if any(each.status == "fail" for each in findings) else 0


def run_checks(
    recipe: Recipe | None = None,
    naming_places: Callable[[], AbstractContextManager[None]] = nullcontext,
    gpus: int | None = None,
) -> Iterator[Finding]:
    """Run all checks in order. A check that raises is a finding, too."""
    checks: list[tuple[str, Callable[[], Finding | Iterable[Finding]]]] = [
        ("versions", check_versions),
        ("kernels package", check_kernels_package),
        ("extension locks", check_extension_locks),
        ("port", check_port),
        ("device", check_device),
        ("caches", check_caches),
        ("shared memory", check_shared_memory),
        ("attention", check_attention),
        ("packages", check_packages),
        ("serving", check_serving),
        ("compiler", lambda: check_compiler(recipe)),
        ("W&B", lambda: check_wandb(recipe)),
    ]
    if recipe is not None:
        checks += [
            ("machine", lambda: check_machine(recipe, gpus)),
            ("model", lambda: check_model(recipe)),
            ("disk", lambda: check_disk(recipe)),
            ("data", lambda: check_recipe_data(recipe)),
        ]
    for name, check in checks:
        try:
            with naming_places():
                result = check()
                found = [result] if isinstance(result, Finding) else list(result)
            yield from found
        except SparsetrainError as error:
            yield Finding("fail", name, str(error))
        except Exception as error:
            yield Finding("fail", name, f"the check itself failed: {type(error).__name__}: {error}")


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


def check_extension_locks() -> Finding | list[Finding]:
    """Check for lock files of interrupted builds of torch extensions, on which every later run would silently wait."""
    name = "extension locks"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    found = []
    for lock in sorted(root.glob("**/lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes * 60 > BUILD_SECONDS:
            text = (
                f"{lock} is {minutes:.0f} minutes old: an interrupted build left it, and runs would wait for it forever"
            )
            found.append(Finding("fail", name, text, f"rm '{lock}'"))
        else:
            text = f"{lock} is {minutes:.0f} minutes old: a build is running, or was interrupted"
            found.append(Finding("warn", name, text, f"if nothing is being built: rm '{lock}'"))
    return found or Finding("ok", name, f"none in {root}")


def check_port() -> Finding:
    """Check the port for connecting ranks: ``MASTER_PORT``, or the deepspeed launcher's default."""
    port = int(os.environ.get("MASTER_PORT", "29500"))
    with socket.socket() as probe:
        # As torch's own store does; otherwise a port that closed a moment ago counts as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            fix = f"deepspeed --master_port {port + 1} launch/train.py ...; another run may hold it"
            return Finding("warn", "port", f"{port} is taken: {error.strerror}", fix)
    return Finding("ok", "port", f"{port} is free")


def check_device() -> Finding:
    """Check the GPU, and whether this build of torch supports it."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            fix = "install a CUDA build of torch that suits the driver: https://pytorch.org/get-started/locally"
            return Finding(
                "warn", "device", f"this machine has a GPU, but torch {torch.__version__} cannot use it", fix
            )
        return Finding("ok", "device", f"CPU, {os.cpu_count()} cores: enough for the quickstart")
    major, minor = torch.cuda.get_device_capability()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    found = f"{len(names)} x {names[0]}, sm_{major}{minor}, {memory:.0f} GiB"
    if major < 8:
        fix = "set model.dtype: float16 or float32; bfloat16 needs sm_80 (A100) or newer"
        return Finding("warn", "device", found, fix)
    built = [int(arch.split("_")[1].rstrip("af")) // 10 for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"]
    if built and major not in built:
        fix = "install a build of torch that has this architecture: https://pytorch.org/get-started/locally"
        return Finding("fail", "device", f"{found}; torch {torch.__version__} has no code for it", fix)
    return Finding("ok", "device", found)


def check_caches() -> Finding:
    """Whether downloads, tokenised data and compiled kernels have a place to go; in containers the home often is none.

    The command has settled in already, so that a home that cannot be written to is no finding here.
    """
    home = os.environ.get("HOME") or "/"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    folders = {
        "HF_HOME": os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"),
        "TRITON_HOME": os.environ.get("TRITON_HOME") or home,
        "TMPDIR": tempfile.gettempdir(),
    }
    for variable, folder in folders.items():
        if (fault := folder_fault(Path(folder).expanduser().absolute())) is not None:
            fix = f"export {variable}=/a/folder/that/can/be/written/to"
            return Finding("fail", "caches", f"{fault}, and {variable} is {folder}", fix)
    return Finding("ok", "caches", f"models and data in {folders['HF_HOME']}, temporary files in {folders['TMPDIR']}")


def check_shared_memory() -> Finding:
    """Check the size of ``/dev/shm``, which NCCL uses between GPUs of a host: containers often have 64 MiB."""
    import torch

    folder = Path(SHARED_MEMORY)
    if not folder.exists() or torch.cuda.device_count() < 2:
        return Finding("ok", "shared memory", "needed only by several GPUs")
    size = shutil.disk_usage(folder).total
    if size < SHARED_MEMORY_BYTES:
        fix = "docker run --shm-size=16g (or --ipc=host); on Kubernetes an emptyDir with medium: Memory at /dev/shm"
        return Finding("warn", "shared memory", f"{SHARED_MEMORY} holds {_gib(size)}; NCCL may want more", fix)
    return Finding("ok", "shared memory", f"{SHARED_MEMORY} holds {_gib(size)}")


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


ENGINES = {"vLLM": ("vllm",), "SGLang": ("sglang",), "transformers serve": ("fastapi", "uvicorn")}
"""Serving engines, and the packages without which there is none."""


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


def check_compiler(recipe: Recipe | None = None) -> Finding:
    """Compilers. Only DeepSpeed's optimizer for offloaded state needs one."""
    compilers = [tool for tool in ("c++", "g++", "clang++", "nvcc") if shutil.which(tool)]
    found = f"found {', '.join(compilers)}" if compilers else "none"
    offloaded = recipe is not None and recipe.deepspeed.offload_optimizer == "cpu"
    if offloaded and not {"c++", "g++", "clang++"} & set(compilers):
        fix = "install a C++ compiler (apt install g++), or set deepspeed.offload_optimizer: none"
        return Finding("fail", "compiler", f"{found}, and deepspeed.offload_optimizer: cpu compiles its optimizer", fix)
    return Finding("ok", "compiler", f"{found}; needed only by deepspeed.offload_optimizer: cpu")


def check_wandb(recipe: Recipe | None = None) -> Finding:
    """Check for a W&B login, without network access."""
    mode = "auto" if recipe is None else recipe.wandb.mode
    if mode in ("offline", "disabled"):
        return Finding("ok", "W&B", f"{mode} in the recipe; no login needed")
    from sparsetrain.training.output.wandb_run import find_wandb_login

    login = find_wandb_login()
    if login is not None:
        return Finding("ok", "W&B", f"login found in {login}")
    if mode == "online":
        return Finding("fail", "W&B", "wandb.mode: online, and no login was found", "wandb login, or wandb.mode=auto")
    return Finding("ok", "W&B", "no login found: runs are recorded offline (`wandb login` puts them online)")


def check_machine(recipe: Recipe, gpus: int | None = None) -> Finding:
    """Whether this machine has what the recipe's dtype, quantised base and offloading need, and the batch can be made
    on so many GPUs."""
    import torch

    from sparsetrain.training import preflight

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = gpus or recipe.sequence.parallel
    preflight.check_machine(recipe, device, ranks)
    kind = "GPU" if device.type == "cuda" else "CPU"
    found = f"a {kind} can do what the recipe asks of it: {batch_shape(recipe, ranks).describe()}"
    here = torch.cuda.device_count()
    if gpus is not None and here == 0:
        fix = "run doctor where the GPUs are; processes of a CPU are for small models, such as the quickstart's"
        return Finding("warn", "machine", f"{found}; this machine has no GPU that torch can use, of {gpus}", fix)
    if gpus is not None and 0 < here < gpus:
        fix = "start it on several machines (docs/launching.md), or with fewer GPUs"
        return Finding("warn", "machine", f"{found}; this machine has {counted(here, 'GPU')} of {gpus}", fix)
    return Finding("ok", "machine", found)


def check_model(recipe: Recipe) -> Finding:
    """Whether a model that is on this machine can be built as the recipe says, and its files can be read."""
    from sparsetrain.training import preflight

    check_public(recipe.model)
    if not is_own(recipe) and model_folder(recipe.model) is None:
        return Finding(
            "ok", "model", f"{recipe.model.path} is not on this machine: the run downloads it, and checks it then"
        )
    preflight.check_model(recipe)
    return Finding("ok", "model", "it can be built as the recipe says, and its files can be read")


def check_disk(recipe: Recipe) -> Finding:
    """Room for what a run writes: its checkpoints, one more than is kept, and the trained model."""
    output = Path(recipe.output or "runs").absolute()
    if (fault := folder_fault(output)) is not None:
        return Finding("fail", "disk", f"{fault}, and the run folder is {output}", "choose another with output=...")
    folder = existing_part(output)
    free = shutil.disk_usage(folder).free
    room = room_of(recipe)
    if room is None:
        found = f"{_gib(free)} free; {recipe.model.path} is not on this machine yet, so its size is unknown"
        held = saved_a_parameter(recipe)
        return Finding(
            "warn", "disk", found, f"a checkpoint takes {held:.3g} bytes a trained parameter, none a frozen one"
        )
    found = f"{_gib(room.needed)} for {room.describe()}; {_gib(free)} free"
    if room.needed > free and not room.certain:
        return Finding("warn", "disk", found, "a checkpoint holds what is trained, and nothing of a frozen parameter")
    if room.needed > free:
        fix = (
            f"free {_gib(room.needed - free)} on {folder}, set output= to a larger disk, or lower checkpoint.keep_last"
        )
        return Finding("fail", "disk", found, fix)
    if room.needed > 0.8 * free:
        return Finding("warn", "disk", found, "little is left over; other writers on this disk may stop the run")
    return Finding("ok", "disk", found)


def check_recipe_data(recipe: Recipe) -> list[Finding]:
    """The files, columns and first rows of a recipe's data, and what its chat template writes."""
    data = check_data(recipe)
    unchecked = f"; not checked: {', '.join(data.unchecked)}" if data.unchecked else ""
    warned = [Finding("warn", "chat template", remark) for remark in data.remarks]
    return [Finding("ok", "data", f"what is on this machine can be read{unchecked}"), *warned]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
