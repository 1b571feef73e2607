"""Bytes of one rank that do not depend on the tokens: weights, gradients, optimizer, and DeepSpeed's buffers.

Read off DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``runtime/fp16/unfused_optimizer.py``) and
off :mod:`sparsetrain.training.run`, which puts the whole model on every device before ZeRO takes it, unless
:func:`~sparsetrain.training.distributed.deepspeed_config.loads_into_shards`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.plan.measured import BYTES_4BIT, BYTES_8BIT
from sparsetrain.plan.setting import Setting
from sparsetrain.training.distributed.deepspeed_config import loads_into_shards, sums_in_float32

MASTER_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of an element of a master weight, by ``train.optimizer.states``."""


@dataclass(frozen=True)
class States:
    """Bytes on the device, unless said otherwise."""

    loading: float
    """The model before ZeRO partitions it."""
    weights: float
    """The weights between steps: all, or this rank's shard."""
    gathered: float
    """ZeRO-3: whole weights of the layers in use."""
    gathered_head: float
    """ZeRO-3: whole weights of the output projection and the last layer, while the loss is computed."""
    masters: float
    """Copies of the trained weights that are updated, in fp32 unless ``train.optimizer.states`` says otherwise."""
    moments: float
    """The optimizer's other states, such as Adam's two moments."""
    gradients: float
    """Gradients at the end of backward."""
    bucket: float
    """DeepSpeed's buffer for gradients to reduce, from the first gradient to the end of backward (always at ZeRO-3)."""
    reducing: float
    """A second copy of a bucket while it is reduced."""
    stepping: float
    """Temporary memory of the optimizer step: fp32 gradients, or fp64 copies for the norm."""
    host: float
    """Bytes in host memory."""

    @property
    def optimizer(self) -> float:
        """Masters and moments."""
        return self.masters + self.moments


def count_states(setting: Setting) -> States:
    """The states of one rank."""
    parameters, zero, stage, ranks = setting.parameters, setting.zero, setting.stage, setting.ranks
    element = setting.element
    trained, largest = parameters.trained, parameters.largest_trained
    whole = weight_bytes(setting)
    shards = ranks if stage >= 1 else 1
    offloaded = setting.recipe.deepspeed.offload_optimizer == "cpu"
    of_master = MASTER_BYTES[setting.recipe.train.optimizer.states]
    # In fp32 without ZeRO, and at ZeRO-3, the weights are their own masters.
    own_masters = element == of_master and stage in (0, 3)
    masters = 0.0 if own_masters else float(of_master) * trained / shards
    summed = _summed(setting)
    moments = _moments(setting, summed) / shards

    bucket_elements = float(zero["reduce_bucket_size"]) if stage >= 1 else 0.0
    buckets = 2 if stage in (1, 2) and zero.get("overlap_comm") else 1
    bucket = buckets * element * bucket_elements
    if offloaded and stage <= 2:
        # Through which the gradients leave for host memory.
        bucket += element * largest
    in_flight = max(min(bucket_elements, trained), largest) if stage >= 1 else 0
    reducing = float(element * in_flight)
    # ZeRO-2 sums the micro batches beside the gradients of the newest, in fp32 as they arrive; ZeRO-1 sums whole ones.
    kept = 2 if stage == 2 and setting.batch.accumulation > 1 and summed == element else 1
    gradients = float(summed * trained)
    if stage == 1 and summed != element:
        gradients += float(element * trained)
    if stage >= 2:
        gradients = 0.0 if offloaded else kept * gradients / ranks
    elif stage == 1 and not offloaded:
        reducing += gradients / ranks
    group = max(parameters.trained_decayed, parameters.trained_undecayed) / shards
    if offloaded:
        stepping = float(element * largest)
    elif stage == 0:
        stepping = 4.0 * trained if element == 2 else 0.0
    else:
        group = min(group, float(zero["sub_group_size"])) if stage == 3 else group
        cast = of_master if summed != of_master else 0
        stepping = max(float(summed + cast) * group, 8.0 * min(largest, trained / shards))

    host = 0.0
    if offloaded:
        # fp32 masters, moments and gradients, and a copy in the model's dtype.
        host += (16.0 + element) * trained / shards
        masters = moments = 0.0
    loading, weights, gathered, gathered_head = whole, whole, 0.0, 0.0
    if stage == 3:
        shard = whole / ranks
        layer = parameters.matrices / setting.shape.layers
        prefetch = float(zero["stage3_prefetch_bucket_size"])
        head = float(setting.shape.vocab * setting.shape.hidden)
        gathered = element * min(float(parameters.total), 2 * layer + prefetch)
        gathered_head = element * min(float(parameters.total), head + layer + prefetch)
        weights = shard
        if setting.recipe.deepspeed.offload_parameters == "cpu":
            host, weights = host + shard, 0.0
        if loads_into_shards(setting.recipe):
            loading = weights + element * float(max(parameters.embedding, parameters.largest_matrix))
    return States(
        loading=loading,
        weights=weights,
        gathered=gathered,
        gathered_head=gathered_head,
        masters=masters,
        moments=moments,
        gradients=gradients,
        bucket=bucket,
        reducing=reducing,
        stepping=stepping,
        host=host,
    )


def saved_bytes(setting: Setting) -> float:
    """Bytes of a checkpoint over all ranks: masters and moments of what is trained. The master of a weight in fp32 is
    the weight itself, and is saved like one."""
    masters = MASTER_BYTES[setting.recipe.train.optimizer.states] * setting.parameters.trained
    return masters + _moments(setting, _summed(setting))


def _summed(setting: Setting) -> int:
    """Bytes of an element of a summed gradient."""
    return 4 if sums_in_float32(setting.recipe, setting.batch.accumulation) else setting.element


def _moments(setting: Setting, summed: int) -> float:
    """Bytes of what the optimizer keeps of all trained parameters beside their masters.

    Args:
        summed: Bytes of an element of a summed gradient.
    """
    parameters, optimizer = setting.parameters, setting.recipe.train.optimizer
    adam = 4.0 if optimizer.states == "bfloat16" else 8.0
    if optimizer.name == "adamw_8bit":
        return (2.0 + 8.0 / 256) * parameters.trained
    if optimizer.name == "adafactor":
        return 4.0 * (parameters.norms + parameters.biases)  # a matrix's row and column are less than a hundredth of it
    if optimizer.name == "muon":
        head = parameters.head if parameters.trains_head else 0
        matrices = parameters.trained_decayed - head - parameters.new_modules
        return summed * matrices + adam * (parameters.trained - matrices)
    return adam * parameters.trained


def weight_bytes(setting: Setting) -> float:
    """Bytes of all weights, with frozen matrices in 4 or 8 bits if the recipe says so."""
    parameters, bits = setting.parameters, setting.recipe.base_bits
    each = {"none": float(setting.element), "4bit": BYTES_4BIT, "8bit": BYTES_8BIT}[bits]
    return parameters.matrices * each + setting.element * (parameters.total - parameters.matrices)
