"""Generate the DeepSpeed config from the recipe, and merge and check the user's own DeepSpeed JSON.

DeepSpeed silently accepts a misspelt top-level key, and understands ``auto`` only within Hugging Face's Trainer. Both
are refused here, before anything is loaded.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.nearest import did_you_mean
from sparsetrain.recipe.batch import BatchPlan
from sparsetrain.recipe.schema import Recipe
from sparsetrain.textfile import read_text

# Sections of the DeepSpeed JSON that would override the recipe, and the setting of the recipe to use instead.
OWNED_BY_RECIPE = {
    "optimizer": "train.optimizer and train.lr",
    "scheduler": "train.schedule",
    "activation_checkpointing": "train.activation_checkpointing (Hugging Face models never call DeepSpeed's)",
    "sparse_attention": "attention (DeepSpeed's own sparse attention needs triton 1.0)",
    "seq_parallel_communication_data_type": "communication_data_type (ZeRO takes all ranks for data-parallel ones)",
    "sequence_parallel_size": "sequence.parallel",
    "wandb": "wandb",
}
_NOT_ITS = "DeepSpeed's own checkpoints are never written; see checkpoint in the recipe"
IDLE = {
    "autotuning": "it starts other jobs and ends this one after a few steps",
    "checkpoint": _NOT_ITS,
    "use_node_local_storage": _NOT_ITS,
    "tensor_parallel": "AutoTP leaves each rank a part of every projection, but checkpoints and exports here hold "
    "whole ones; share rows with sequence.parallel and weights with deepspeed.stage=3",
    "managed_gradient_accumulation": "the loop tells DeepSpeed the micro batches of each step, and both count them",
    "compile": "it waits for a call of engine.compile(), which runs do not make",
}
"""Sections of the DeepSpeed JSON that would have no effect, would not train, or do not go with a run."""
_LOST = "checkpoints do not find the optimizer's state"
_UNSEEN = "train.on_nonfinite would miss gradients that are not finite"
# Settings that would break guarantees of a run: the only accepted value, and the reason.
FIXED = {
    "zero_optimization.offload_optimizer.ratio": (1.0, _LOST),
    "zero_optimization.offload_optimizer.super_offload": (False, _LOST),
    "zero_optimization.zenflow": (None, _LOST),
    "zero_optimization.compute_grad_norm": (True, _UNSEEN),
    "bf16.check_grad_overflow": (True, _UNSEEN),
    "zero_optimization.cpu_offload": (None, "deepspeed.offload_optimizer of the recipe is overruled"),
    "zero_optimization.cpu_offload_param": (None, "deepspeed.offload_parameters of the recipe is overruled"),
    "zero_optimization.elastic_checkpoint": (False, f"nothing changes, as {_NOT_ITS}"),
}
PASSED_THROUGH = {
    "aio",
    "amp",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}


ROUNDED_STATES = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""DeepSpeed's switches for optimizer states in bfloat16."""
REDUCE_BUCKET = 500_000_000
"""Number of gradient elements that DeepSpeed reduces at once by default."""


def deepspeed_config(recipe: Recipe, plan: BatchPlan, trained: int | None = None) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    Args:
        trained: Number of trained elements, if known: the buffer for reducing gradients need not be larger. By default
            DeepSpeed would allocate a gigabyte even for a few adapters.

    Raises:
        RecipeError: The user's JSON is unreadable, has an unknown key or ``auto``, contradicts the recipe, or switches
            off a feature that the recipe needs.
    """
    generated = _generated(recipe, plan)
    given = _read(recipe.deepspeed.config)
    _check_keys(given)
    config = _lay_under(given, generated, "")
    _check_fixed(config)
    if recipe.train.optimizer.states != "bfloat16" and (
        rounded := [k for k in ROUNDED_STATES if config["bf16"].get(k)]
    ):
        raise RecipeError(f"deepspeed.config has bf16.{rounded[0]}: use train.optimizer.states: bfloat16 instead")
    # Its meter of samples a second, which nothing shows, waits for the device before each forward pass.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    zero = config["zero_optimization"]
    # Kept until here, so that the user's JSON cannot offload against the recipe.
    for name in ("offload_optimizer", "offload_param"):
        if zero[name]["device"] == "none":
            del zero[name]
        else:
            # Copies from pageable memory wait for one another; DeepSpeed before 0.19 has it pageable.
            zero[name].setdefault("pin_memory", True)
    if trained is not None:
        zero.setdefault("reduce_bucket_size", min(REDUCE_BUCKET, trained))
    if recipe.deepspeed.stage == 3 and recipe.train.activation_checkpointing != "none":
        # DeepSpeed's own linear layer keeps no gathered weight for backward, but computes the last product of every
        # checkpointed layer again, which a recompute would otherwise stop short of. What is recomputed at a time is one
        # layer, whose weights are gathered until its backward is done anyway.
        zero.setdefault("memory_efficient_linear", False)
    if recipe.deepspeed.stage == 1 and sums_in_float32(recipe, plan.accumulation):
        # Otherwise the sum would be rounded to 16 bits before it is added to those of other ranks.
        config.setdefault("communication_data_type", "fp32")
    if recipe.train.optimizer.name == "muon" and recipe.deepspeed.stage == 3:
        # Muon needs whole gradients. DeepSpeed refuses it with scattered ones.
        zero.setdefault("reduce_scatter", False)
    return config


def sums_in_float32(recipe: Recipe, accumulation: int) -> bool:
    """Whether DeepSpeed sums the gradients of micro batches in fp32 beside a 16-bit model."""
    wish, stage = recipe.deepspeed.gradient_dtype, recipe.deepspeed.stage
    if recipe.model.dtype != "bfloat16" or stage == 0 or wish == "model":
        return False
    # At stage 1 DeepSpeed takes another optimizer for it, whose states are always fp32, and which offloads nothing.
    of_stage_one = recipe.train.optimizer.states == "float32" and recipe.deepspeed.offload_optimizer == "none"
    return wish == "float32" or (accumulation > 1 and (stage > 1 or of_stage_one))


def loads_into_shards(recipe: Recipe) -> bool:
    """Whether weights go from the host directly into the shards of ZeRO-3, so that no device holds all of them.

    This needs a run that does not use the model before the engine exists: no evaluation at the start and nothing to
    fit. Then the model may be larger than a device.
    """
    runs_before = recipe.eval.measures_at_start or recipe.attention.waits_for_fit
    return recipe.deepspeed.stage == 3 and not runs_before


def _generated(recipe: Recipe, plan: BatchPlan) -> dict[str, Any]:
    section = recipe.deepspeed
    zero = {
        "stage": section.stage,
        "offload_optimizer": {"device": section.offload_optimizer},
        "offload_param": {"device": section.offload_parameters},
    }
    bfloat16 = {"enabled": recipe.model.dtype == "bfloat16"}
    if recipe.train.optimizer.states == "bfloat16":
        bfloat16 |= dict.fromkeys(ROUNDED_STATES, True)
    generated = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed counts separate rows for every rank, also for ranks that share a row.
        "train_batch_size": plan.global_batch_sequences * plan.parallel,
        "gradient_clipping": recipe.train.max_grad_norm or 0.0,
        "bf16": bfloat16,
        "fp16": {"enabled": recipe.model.dtype == "float16"},
        "zero_optimization": zero,
        # The optimizer is ours: DeepSpeed would compile one of its own.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if sums_in_float32(recipe, plan.accumulation):
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return generated


def _read(config: dict[str, Any] | str | None) -> dict[str, Any]:
    if not isinstance(config, str):
        return config or {}
    called = f"deepspeed.config: {config:.200}"
    try:
        value = json.loads(
            read_text(config, called, RecipeError), object_pairs_hook=_each_key_once, parse_constant=_no_number
        )
    except json.JSONDecodeError as error:
        raise RecipeError(f"{called} line {error.lineno} is not JSON: {error.msg}") from error
    except RecursionError:
        raise RecipeError(f"{called} is nested too deeply") from None
    except ValueError as error:
        raise RecipeError(f"{called}: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"deepspeed.config: {config} must hold a JSON object, not {type(value).__name__}")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if repeated:
        raise ValueError(f"{repeated[0]:.100} is given twice in one object; keep one of them")
    return dict(pairs)


def _no_number(name: str) -> float:
    if name == "Infinity":  # of steps_per_print: never
        return math.inf
    raise ValueError(f"{name} is not a JSON number; leave it out")


def _check_keys(given: dict[str, Any]) -> None:
    for key in given:
        if key in OWNED_BY_RECIPE:
            raise RecipeError(f"deepspeed.config has {key}, which the recipe decides: use {OWNED_BY_RECIPE[key]}")
        if key in IDLE:
            raise RecipeError(f"deepspeed.config has {key}, which has no use in a run: {IDLE[key]}; leave it out")
        if key not in PASSED_THROUGH:
            hint = did_you_mean(key, PASSED_THROUGH)
            raise RecipeError(f"deepspeed.config has {key:.100}, which is not supported here{hint}")
    steps = given.get("steps_per_print", 1)  # infinite for never
    if isinstance(steps, bool) or not isinstance(steps, int | float) or not steps >= 1:
        raise RecipeError(f"deepspeed.config: steps_per_print={steps!r} is not a number of steps; leave it out")


def _check_fixed(config: dict[str, Any]) -> None:
    for path, (accepted, why) in FIXED.items():
        *sections, key = path.split(".")
        holder = config
        for section in sections:
            holder = holder[section]
        if (value := holder.get(key, accepted)) != accepted:
            raise RecipeError(f"deepspeed.config: {path} is {value!r}, under which {why}; leave it out")


def _lay_under(given: dict[str, Any], generated: dict[str, Any], path: str) -> dict[str, Any]:
    """Merge ``generated`` into ``given``; a leaf that both set must be equal."""
    merged = dict(given)
    for key, value in given.items():
        if value == "auto":
            raise RecipeError(
                f"deepspeed.config: {path}{key} is 'auto', which only Hugging Face's Trainer understands; leave it out "
                "and the recipe fills it in"
            )
        if isinstance(value, dict):
            inner = generated.get(key)
            merged[key] = _lay_under(value, inner if isinstance(inner, dict) else {}, f"{path}{key}.")
    for key, value in generated.items():
        if key not in given:
            merged[key] = value
        elif not isinstance(value, dict) and given[key] != value:
            raise RecipeError(
                f"deepspeed.config contradicts the recipe: {path}{key} is {given[key]!r} there, but the recipe "
                f"makes it {value!r}; remove it from the JSON or change the recipe"
            )
        elif isinstance(value, dict) and not isinstance(given[key], dict):
            raise RecipeError(f"deepspeed.config: {path}{key} must be an object, not {given[key]!r}")
    return merged
