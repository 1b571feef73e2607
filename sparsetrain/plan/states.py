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
    offloaded = _on_host(setting)
    return States(
        **_weights(setting),
        masters=0.0 if offloaded else _masters(setting),
        moments=0.0 if offloaded else _moments(setting) / _shards(setting),
        gradients=_gradients(setting),
        bucket=_bucket(setting),
        reducing=_reducing(setting),
        stepping=_stepping(setting),
        host=_host(setting),
    )


def _on_host(setting: Setting) -> bool:
    """Whether the optimizer's states are in host memory."""
    return setting.recipe.deepspeed.offload_optimizer == "cpu"


def _shards(setting: Setting) -> int:
    """Ranks that share out the optimizer's states."""
    return setting.ranks if setting.stage >= 1 else 1


def _weights(setting: Setting) -> dict[str, float]:
    """``loading``, ``weights``, ``gathered`` and ``gathered_head`` of the states."""
    parameters, shape, element = setting.parameters, setting.shape, setting.element
    whole = weight_bytes(setting)
    if setting.stage < 3:
        return {"loading": whole, "weights": whole, "gathered": 0.0, "gathered_head": 0.0}
    layer = parameters.matrices / shape.layers
    prefetch = float(setting.zero["stage3_prefetch_bucket_size"])
    head = float(shape.vocab * shape.hidden)
    shard = 0.0 if setting.recipe.deepspeed.offload_parameters == "cpu" else whole / setting.ranks
    loading = whole
    if loads_into_shards(setting.recipe):
        loading = shard + element * float(max(parameters.embedding, parameters.largest_matrix))
    return {
        "loading": loading,
        "weights": shard,
        "gathered": element * min(float(parameters.total), 2 * layer + prefetch),
        "gathered_head": element * min(float(parameters.total), head + layer + prefetch),
    }


def _masters(setting: Setting) -> float:
    of_master = MASTER_BYTES[setting.recipe.train.optimizer.states]
    # In fp32 without ZeRO, and at ZeRO-3, the weights are their own masters.
    if setting.element == of_master and setting.stage in (0, 3):
        return 0.0
    return float(of_master) * setting.parameters.trained / _shards(setting)


def _gradients(setting: Setting) -> float:
    stage, element, trained, summed = setting.stage, setting.element, setting.parameters.trained, _summed(setting)
    if stage < 2:
        # ZeRO-1 sums whole gradients, in fp32 beside the newest.
        return float(summed * trained) + (float(element * trained) if stage == 1 and summed != element else 0.0)
    if _on_host(setting):
        return 0.0
    # ZeRO-2 sums the micro batches beside the gradients of the newest, in fp32 as they arrive.
    kept = 2 if stage == 2 and setting.batch.accumulation > 1 and summed == element else 1
    return kept * float(summed * trained) / setting.ranks


def _bucket(setting: Setting) -> float:
    stage, zero = setting.stage, setting.zero
    buckets = 2 if stage in (1, 2) and zero.get("overlap_comm") else 1
    bucket = buckets * setting.element * _bucket_elements(setting)
    if _on_host(setting) and stage <= 2:
        # Through which the gradients leave for host memory.
        bucket += setting.element * setting.parameters.largest_trained
    return bucket


def _bucket_elements(setting: Setting) -> float:
    return float(setting.zero["reduce_bucket_size"]) if setting.stage >= 1 else 0.0


def _reducing(setting: Setting) -> float:
    if setting.stage == 0:
        return 0.0
    parameters = setting.parameters
    in_flight = max(min(_bucket_elements(setting), parameters.trained), parameters.largest_trained)
    reducing = float(setting.element * in_flight)
    if setting.stage == 1 and not _on_host(setting):
        reducing += _gradients(setting) / setting.ranks
    return reducing


def _stepping(setting: Setting) -> float:
    parameters, stage, element = setting.parameters, setting.stage, setting.element
    trained, largest = parameters.trained, parameters.largest_trained
    if _on_host(setting):
        return float(element * largest)
    if stage == 0:
        return 4.0 * trained if element == 2 else 0.0
    group = max(parameters.trained_decayed, parameters.trained_undecayed) / _shards(setting)
    if stage == 3:
        group = min(group, float(setting.zero["sub_group_size"]))
    of_master, summed = MASTER_BYTES[setting.recipe.train.optimizer.states], _summed(setting)
    cast = of_master if summed != of_master else 0
    return max(float(summed + cast) * group, 8.0 * min(largest, trained / _shards(setting)))


def _host(setting: Setting) -> float:
    host = 0.0
    if _on_host(setting):
        # fp32 masters, moments and gradients, and a copy in the model's dtype.
        host += (16.0 + setting.element) * setting.parameters.trained / _shards(setting)
    if setting.stage == 3 and setting.recipe.deepspeed.offload_parameters == "cpu":
        host += weight_bytes(setting) / setting.ranks
    return host


def saved_bytes(setting: Setting) -> float:
    """Bytes of a checkpoint over all ranks: masters and moments of what is trained. The master of a weight in fp32 is
    the weight itself, and is saved like one."""
    masters = MASTER_BYTES[setting.recipe.train.optimizer.states] * setting.parameters.trained
    return masters + _moments(setting)


def _summed(setting: Setting) -> int:
    """Bytes of an element of a summed gradient."""
    return 4 if sums_in_float32(setting.recipe, setting.batch.accumulation) else setting.element


def _moments(setting: Setting) -> float:
    """Bytes of what the optimizer keeps of all trained parameters beside their masters."""
    parameters, optimizer = setting.parameters, setting.recipe.train.optimizer
    adam = 4.0 if optimizer.states == "bfloat16" else 8.0
    if optimizer.name == "adamw_8bit":
        return (2.0 + 8.0 / 256) * parameters.trained
    if optimizer.name == "adafactor":
        return 4.0 * (parameters.norms + parameters.biases)  # a matrix's row and column are less than a hundredth of it
    if optimizer.name == "muon":
        head = parameters.head if parameters.trains_head else 0
        matrices = parameters.trained_decayed - head - parameters.new_modules
        return _summed(setting) * matrices + adam * (parameters.trained - matrices)
    return adam * parameters.trained


def weight_bytes(setting: Setting) -> float:
    """Bytes of all weights, with frozen matrices in 4 or 8 bits if the recipe says so."""
    parameters, bits = setting.parameters, setting.recipe.base_bits
    each = {"none": float(setting.element), "4bit": BYTES_4BIT, "8bit": BYTES_8BIT}[bits]
    return parameters.matrices * each + setting.element * (parameters.total - parameters.matrices)
