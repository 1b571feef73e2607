"""The DeepSpeed engine: process group, optimizer, ``deepspeed.initialize``, and differences between devices."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from sparsetrain.errors import RecipeError, SparsetrainError, first_line
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.distributed.deepspeed_config import loads_into_shards
from sparsetrain.training.distributed.half_step import wait_once
from sparsetrain.training.distributed.launcher import adopt_slurm, check_ranks, join, meeting, share_cores
from sparsetrain.training.distributed.optimizers import FiniteStep, build_optimizer
from sparsetrain.world import World


def init_world(timeout: float = 30.0) -> World:
    """Join the process group of the launcher, or start one with a single process.

    It uses gloo on CPU and NCCL on CUDA. DeepSpeed's shared-memory op for CPU is switched off: it compiles for minutes,
    and an interrupted compile leaves a lock that blocks every later run.

    Args:
        timeout: Minutes to wait for the other ranks.

    Raises:
        TrainingError: The ranks cannot connect, or the environment variables about them are wrong.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    adopt_slurm(os.environ)
    check_ranks(os.environ)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed = _import_deepspeed()
    if not dist.is_initialized():
        with meeting(timeout):
            join(device, collective_timeout(timeout))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    share_cores(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def collective_timeout(timeout: float) -> timedelta:
    """The timeout of collectives for a ``deepspeed.timeout`` in minutes.

    It is much longer, because :mod:`sparsetrain.training.supervision.watch` detects a hanging rank: it distinguishes
    progress from a hang, and names the rank.
    """
    return timedelta(minutes=20 * timeout)


def check_config(config: dict[str, Any]) -> None:
    """Validate the config with DeepSpeed itself, before models and data are loaded.

    Raises:
        RecipeError: DeepSpeed refuses it.
    """
    _import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig

    device = get_accelerator().device_name()
    # DeepSpeed would train in fp16 on some CPUs, but a recipe must not depend on the CPU.
    if config["fp16"]["enabled"] and (device == "cpu" or not get_accelerator().is_fp16_supported()):
        raise RecipeError(f"model.dtype=float16 cannot be trained on a {device}; set it to bfloat16 or float32")
    # Without it DeepSpeed multiplies the other two by the ranks that there are: those of the run, or none yet.
    checked = {name: value for name, value in config.items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(deepcopy(checked))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"deepspeed.config is refused by DeepSpeed ({error.title}): {faults}") from error
    except Exception as error:  # assertions, ValueError and DeepSpeed's own
        raise RecipeError(f"deepspeed.config is refused by DeepSpeed: {error}") from error


def check_offload(recipe: Recipe, device: torch.device) -> None:
    """Refuse offloading from a GPU on a machine without one.

    Raises:
        RecipeError: The recipe asks for it; names the setting.
    """
    if recipe.deepspeed.offload_optimizer == "cpu" and device.type != "cuda":
        raise RecipeError(
            "deepspeed.offload_optimizer: cpu moves optimizer state off a GPU, and this machine has none; "
            "set it to none"
        )


def initialize(module: nn.Module, recipe: Recipe, config: dict[str, Any], world: World) -> Any:
    """Wrap ``module`` in a DeepSpeed engine with the recipe's optimizer.

    Raises:
        RecipeError: No parameter is trained, or DeepSpeed refuses the user's JSON.
    """
    deepspeed = _import_deepspeed()
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError("the recipe trains no parameters")
    # Before weights are sharded, as it groups them by shape.
    check_offload(recipe, world.device)
    optimizer = build_optimizer(module, recipe, world.device)
    if recipe.deepspeed.stage == 3:
        _announce_dora(deepspeed, module)
    if loads_into_shards(recipe):
        _shard(deepspeed, module, config, world.device)
    try:
        engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        if recipe.deepspeed.config is None:
            raise
        raise RecipeError(f"deepspeed.config is refused by DeepSpeed: {first_line(error)}") from error
    if isinstance(optimizer, FiniteStep):
        optimizer.overflow = False
    wait_once(engine)
    return engine


def destroy(engine: Any) -> None:
    """Free an engine: references that DeepSpeed keeps would hold its model and states until the process ends."""
    stage = engine.zero_optimization_stage()
    engine.destroy()
    if stage == 3:
        _forget_modules_of_zero_3()


@contextmanager
def own_linear() -> Iterator[None]:
    """Puts torch's linear layer back at the end: ZeRO-3 without recomputed layers replaces it for the whole process,
    and what is computed later would keep the input of every frozen layer for backward."""
    linear = F.linear
    try:
        yield
    finally:
        F.linear = linear


def _forget_modules_of_zero_3() -> None:
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # The stack of modules in forward; a recomputation that stops early leaves its modules on it.
    parameter_offload.FWD_MODULE_STACK.clear()
    # A method with a cache by engine and module, inside a wrapper.
    method = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(method, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _announce_dora(deepspeed: Any, module: Any) -> None:
    """Register external parameters: DoRA's magnitudes read weights of neighbouring modules, which ZeRO-3 would not
    gather for them."""
    for layer in module.modules():
        magnitudes: Any = getattr(layer, "lora_magnitude_vector", {})
        for name, magnitude in magnitudes.items():
            for parameter in (*layer.get_base_layer().parameters(recurse=False), layer.lora_A[name].weight):
                deepspeed.zero.register_external_parameter(magnitude, parameter)


def _shard(deepspeed: Any, module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Shard a module parameter by parameter from the host; by default DeepSpeed moves all of it to the device first."""
    zero = config["zero_optimization"]
    quantized = {
        name: zero.get(name, False) for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
    }
    deepspeed.zero.Init(module=module, config_dict_or_path=config, **quantized)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def _import_deepspeed() -> Any:
    # DeepSpeed logs a page at import and a line per setting; warnings still come through.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by deprecated names, and torch warns at each call; users cannot change this.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # NCCL warns in a run of one process, where there is only one possible device.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise SparsetrainError(f"DeepSpeed cannot be imported ({error}); `pip install deepspeed`") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
