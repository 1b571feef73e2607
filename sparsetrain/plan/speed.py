"""Estimate the time of a step from operations and measured rates, and from bytes and bandwidths."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.methods.costs import AttentionRate
from sparsetrain.plan.activations import layer_bytes
from sparsetrain.plan.measured import (
    BANDWIDTH_SHARE,
    BESIDE_GATHERS,
    EXCHANGE_SHARE,
    EXCHANGE_WAIT,
    GATHER_WAIT,
    HOST_LINK,
    HOST_OPTIMIZER,
    LINK_SHARE,
    MATRIX_SHARE,
    MEASURED_PEAK,
)
from sparsetrain.plan.setting import Setting

MATRICES_A_LAYER = 7
"""Projections of a decoder layer; ZeRO-3 gathers each for itself."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by component."""

    matrices: float
    """Products with weights, including recomputation."""
    attention: float
    elementwise: float
    """Norms, activations, rotary positions, cross entropy: bound by bandwidth."""
    communication: float
    """Communication that does not overlap with computation."""
    optimizer: float
    tokens: int
    """Tokens of the step over all ranks."""

    @property
    def seconds(self) -> float:
        """The step."""
        return self.matrices + self.attention + self.elementwise + self.communication + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds


def estimate_time(setting: Setting, *, dense: bool = False) -> StepTime:
    """The time of a step.

    Args:
        dense: with full attention in every layer instead of the recipe's.
    """
    micro_batches = setting.batch.accumulation
    peak = setting.device.flops(setting.recipe.model.dtype)
    per_micro = (
        _matrix_flops(setting) / (peak * MATRIX_SHARE),
        _attention_seconds(setting, dense),
        _elementwise_bytes(setting) / (setting.device.bandwidth * BANDWIDTH_SHARE),
    )
    matrices, attention, elementwise = (seconds * micro_batches for seconds in per_micro)
    return StepTime(
        matrices=matrices,
        attention=attention,
        elementwise=elementwise,
        communication=_communication(setting, matrices + attention + elementwise),
        optimizer=_optimizer(setting),
        tokens=setting.batch.tokens_per_step,
    )


def _matrix_flops(setting: Setting) -> float:
    """FLOPs of products with weights, for one micro batch on one rank."""
    parameters, tokens = setting.parameters, setting.tokens
    head = setting.shape.vocab * setting.shape.hidden
    # Forward, what checkpointing computes again, the gradient of the input, and of the weight where it is trained.
    passes = 1 + (setting.checkpointing != "none") + 1 + parameters.trains_matrices + setting.reference_passes
    recomputed = setting.loss_chunk < tokens and not setting.fused_loss
    head_passes = 1 + recomputed + 1 + parameters.trains_head + setting.reference_passes
    tiled = 0.0
    if setting.mlp_tokens < tokens:
        shape = setting.shape
        tiled = float(shape.layers * 3 * shape.hidden * shape.intermediate)
    adapters = parameters.adapters * (passes + 1)
    return 2.0 * tokens * (parameters.matrices * passes + tiled + head * head_passes + adapters)


def _attention_seconds(setting: Setting, dense: bool) -> float:
    """Seconds of attention for one micro batch on one rank, over all layers."""
    shape, config = setting.shape, setting.recipe.attention
    length, rows = setting.recipe.sequence.length, setting.recipe.train.micro_batch
    pairs = length * (length + 1) / 2
    flops = 4.0 * shape.head_dim * pairs * rows * shape.heads / setting.parallel
    recomputed = setting.checkpointing == "layer"

    def seconds(rate: AttentionRate, density: float) -> float:
        which = 0 if shape.head_dim > 64 else 1
        scale = setting.device.flops(setting.recipe.model.dtype) / MEASURED_PEAK
        forward, backward = rate.forward[which] * scale, rate.backward[which] * scale
        return flops * density * ((1 + recomputed + setting.reference_passes) / forward + 2.5 / backward)

    dense_layers = shape.layers if dense else setting.dense_layers
    sparse_layers = shape.layers - dense_layers
    total = dense_layers * seconds(setting.dense_attention.rate, 1.0)
    if sparse_layers:
        total += sparse_layers * seconds(setting.attention.rate, config.build(shape.kv_heads).density(length))
    return total


def _elementwise_bytes(setting: Setting) -> float:
    """Bytes read and written by elementwise operations, for one micro batch on one rank.

    Counted per element of each width, over transformers' modules: forward, again where it is recomputed, and backward.
    """
    shape, tokens = setting.shape, setting.tokens
    scale = setting.element / 2
    forwards = 1 + (setting.checkpointing != "none") + setting.reference_passes
    # RMSNorm reads and writes 36 bytes an element forward and about 60 backward, residuals 6 and 8; Liger's 4 and 8.
    norm_forward, norm_backward = (4, 8) if setting.liger else (36, 60)
    hidden = shape.hidden * 2 * (forwards * (norm_forward + 6) + norm_backward + 8)
    # Activation and product of the MLP: 10 and 18 bytes; fused 6 and 10.
    activation = (6, 10) if setting.liger else (10, 18)
    wide = shape.intermediate * (forwards * activation[0] + activation[1])
    rotary = (6, 6) if setting.liger else (22, 24)
    turned = (shape.q_width + shape.kv_width) * (forwards * rotary[0] + rotary[1])
    if shape.qk_norm:
        turned += (shape.q_width + shape.kv_width) * (forwards * norm_forward + norm_backward)
    logits = shape.vocab * (6 if setting.fused_loss else 50)
    return tokens * scale * (shape.layers * (hidden + wide + turned) + logits)


def _communication(setting: Setting, computing: float) -> float:
    """Seconds of a step in which ranks wait for communication."""
    ranks, parameters, batch = setting.ranks, setting.parameters, setting.batch
    seconds = 0.0
    link = setting.device.link * LINK_SHARE
    if ranks > 1:
        share = (ranks - 1) / ranks
        trained = setting.element * parameters.trained * share
        if setting.stage <= 1:
            seconds += (2 * trained + trained * (setting.stage == 1)) / link
        elif setting.stage == 2:
            # DeepSpeed all-reduces a bucket that several ranks own parts of, and does not overlap it below ZeRO-3.
            seconds += (batch.accumulation * 2 * trained + trained) / link
        else:
            gathers = 2 + (setting.checkpointing != "none") + setting.reference_passes
            gathered = gathers * setting.element * parameters.total * share
            moving = batch.accumulation * (gathered + trained) / link
            waits = GATHER_WAIT * batch.accumulation * gathers * MATRICES_A_LAYER * setting.shape.layers
            seconds += max(waits + BESIDE_GATHERS * computing, moving - computing)
    if setting.parallel > 1:
        seconds += _exchange(setting) * batch.accumulation
    if setting.recipe.train.offload_activations:
        moved = 2 * layer_bytes(setting).input * setting.shape.layers * batch.accumulation / HOST_LINK
        seconds += max(0.0, moved - computing)
    if setting.stage == 3 and setting.recipe.deepspeed.offload_parameters == "cpu":
        shard = setting.element * parameters.total / ranks
        gathers = 2 + (setting.checkpointing != "none") + setting.reference_passes
        seconds += max(0.0, gathers * batch.accumulation * shard / HOST_LINK - computing)
    return seconds


def _exchange(setting: Setting) -> float:
    """Seconds in which the ranks that share a row exchange it, in all layers of one micro batch.

    Queries, keys and values go to the ranks of their heads and the output comes back: in each forward pass (selective
    checkpointing keeps what attention returned, not what was exchanged) and once in backward. Nothing else runs
    meanwhile. Before or after each, elements are copied into the order of the exchange.
    """
    shape, parallel = setting.shape, setting.parallel
    dealt, returned = shape.q_width + 2 * setting.kv_width, shape.q_width
    forwards = 1 + (setting.checkpointing != "none")
    sent = (forwards + 1) * (dealt + returned) * (parallel - 1) / parallel
    # In backward what was dealt is copied on both sides, as its gradients come from kernels in tensors of their own.
    copied = forwards * (dealt + returned) + 2 * dealt + returned
    each = setting.element * setting.tokens * shape.layers
    moving = sent * each / (setting.device.link * EXCHANGE_SHARE)
    waits = EXCHANGE_WAIT * 2 * (forwards + 1) * shape.layers
    return moving + 2 * copied * each / (setting.device.bandwidth * BANDWIDTH_SHARE) + waits


def _optimizer(setting: Setting) -> float:
    """Seconds of the optimizer step: reading and writing master weights, moments, gradients and weights once."""
    shards = setting.ranks if setting.stage >= 1 else 1
    moved = (2 * 12 + 2 * 4 + 2 * setting.element) * setting.parameters.trained / shards
    if setting.recipe.deepspeed.offload_optimizer == "cpu":
        return moved / HOST_OPTIMIZER
    return moved / (setting.device.bandwidth * BANDWIDTH_SHARE)
