"""Checks of this machine: locks, port, device, folders, shared memory, compiler, W&B login."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from sparsetrain.doctor.finding import Finding, gib
from sparsetrain.durable import folder_fault
from sparsetrain.recipe.schema import Recipe

BUILD_SECONDS = 15 * 60
"""An extension builds in minutes; a lock older than this has been left behind."""

SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_BYTES = 2**30


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
        return Finding("warn", "shared memory", f"{SHARED_MEMORY} holds {gib(size)}; NCCL may want more", fix)
    return Finding("ok", "shared memory", f"{SHARED_MEMORY} holds {gib(size)}")


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
