"""Activation memory in bytes, of a decoder layer (the tensors that autograd saves) and of the loss.

The lists follow transformers' Llama, Mistral and Qwen layers; ``tests/plan`` compares them with every allocation of the
real modules. A name such as ``4 * hidden`` reads: an fp32 tensor of the width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.plan.setting import Setting

_LIGER_LOSS_ROUNDING = 2
"""Liger cuts the loss so that a chunk's logits are as large as the hidden states, rounded up to a power of two rows."""


@dataclass(frozen=True)
class LayerBytes:
    """One decoder layer and micro batch of one rank."""

    input: float
    """Bytes that a checkpointed layer saves: its input."""
    selection: float
    """Bytes that it saves as well: what a sparse layer has selected, in the mean over the layers."""
    attention_result: float
    """Bytes that selective checkpointing saves in addition: attention outputs."""
    saved: float
    """Bytes that autograd saves for one layer without checkpointing."""
    backward: float
    """Peak bytes of one layer's backward pass, including its own activations."""


@dataclass(frozen=True)
class LossBytes:
    """The final norm and the loss."""

    kept: float
    """Bytes for all tokens while the chunks are computed."""
    chunk: float
    """Bytes for one chunk, including gradients of the logits."""
    weight_gradient: float
    """Bytes of the output projection's gradient."""


def layer_bytes(setting: Setting) -> LayerBytes:
    """The activations of a layer; of the more expensive kind if dense and sparse layers alternate."""
    shape, parameters, tokens, e = setting.shape, setting.parameters, setting.tokens, setting.element
    hidden, q, kv, wide = shape.hidden, shape.q_width, setting.kv_width, shape.intermediate
    full, adapted = parameters.trains_matrices, parameters.targets
    method = setting.attention
    liger = setting.liger

    # Norm: an fp32 copy of its input (Liger: the input itself), and where its weight is trained what it multiplies.
    norm = e * hidden if liger else 4 * hidden + (e * hidden if parameters.trains_norms else 0)
    norm_backward = 4 * hidden if liger else 20 * hidden
    into_attention = (
        e * hidden if full or method.keeps_input or adapted & {"q_proj", "k_proj", "v_proj", "qkv_proj"} else 0
    )
    into_mlp = e * hidden if full or adapted & {"gate_proj", "up_proj", "gate_up_proj"} else 0
    heads_norm = (e if liger else 4) * (q + kv) if shape.qk_norm else 0
    if shape.qk_norm and parameters.trains_norms and not liger:
        heads_norm += e * (q + kv)
    log_sum_exp = 4 * shape.heads
    result = e * q + log_sum_exp
    sparse = 1 - setting.dense_layers / shape.layers
    attention = heads_norm + e * (q + 2 * kv) + result + method.saved_bytes
    before_mlp = norm + into_attention + attention + norm + into_mlp
    # Gate and up, the activated gate, and what goes into the last projection where that needs it.
    product = e * wide if full or "down_proj" in adapted else 0
    mlp = (2 if liger else 3) * e * wide + product
    # Gradients of both factors beside that of their product; the product itself is gone by then. Liger works in place.
    mlp_backward = (4 if liger else 6) * e * wide

    gradient = e * hidden
    chunked = setting.mlp_tokens < tokens
    if chunked:
        at_a_time = (mlp_backward + into_mlp) * setting.mlp_tokens / tokens
        # The gradient of the MLP's input is put together from its parts.
        phase_mlp = before_mlp + gradient + at_a_time + 2 * e * hidden
        mlp = e * hidden
    else:
        phase_mlp = before_mlp + gradient + max(mlp + 2 * e * wide, mlp_backward)
    phase_norm = norm + into_attention + attention + norm + norm_backward + gradient
    exchanged = 2 * e * (q + 2 * kv) if setting.parallel > 1 else 0
    phase_attention = (
        norm + into_attention + attention + gradient + e * (2 * q + 2 * kv) + _attention_extra(setting) + exchanged
    )
    phase_heads = 0.0
    if shape.qk_norm:
        phase_heads = norm + into_attention + heads_norm + (5 if not liger else 1) * 4 * q + e * (q + 2 * kv) + gradient
    phase_input = 2 * norm + norm_backward + 2 * gradient
    statistics = 8 + 4
    weights = float(e * 3 * hidden * wide) if full else 0.0
    # Gradients of the MLP's weights: with tiles the sum and that of one tile, then the layer's own.
    phases = (phase_mlp * tokens + (2 * weights if chunked else 0.0), phase_norm * tokens + weights)
    later = max(phase_attention, phase_heads, phase_input) * tokens + weights
    dequantized = 0.0
    lora = setting.recipe.lora
    if lora is not None and lora.quantize_base != "none":
        dequantized = float(e * parameters.largest_matrix)
    return LayerBytes(
        input=float(e * hidden * tokens),
        selection=float(method.saved_bytes * tokens * sparse),
        attention_result=float(result * tokens),
        saved=float((before_mlp + mlp + statistics) * tokens),
        backward=max(*phases, later) + statistics * tokens + dequantized,
    )


def loss_bytes(setting: Setting) -> LossBytes:
    """The activations of the final norm, the output projection and the cross entropy."""
    shape, parameters, tokens, e = setting.shape, setting.parameters, setting.tokens, setting.element
    hidden, vocab, chunk = shape.hidden, shape.vocab, setting.loss_chunk
    head = float(vocab * hidden) if parameters.trains_head else 0.0
    if setting.fused_loss and shape.plain_head and setting.recipe.train.loss_chunk is not None:
        rows = min(tokens, _LIGER_LOSS_ROUNDING * -(-tokens * hidden // vocab))
        # Hidden states before and after the norm, and their gradient; logits become their own gradient.
        return LossBytes(kept=3.0 * e * hidden * tokens, chunk=float(e * vocab * rows), weight_gradient=(4 + e) * head)
    norm = 4 * hidden + (e * hidden if parameters.trains_norms else 0)
    # The hidden states that predict something, and their gradient, a part of it for each chunk.
    kept = float((norm + 2 * e * hidden) * tokens)
    if not shape.plain_head or setting.recipe.train.loss_chunk is None:
        # transformers' own head: logits of all tokens, and those that predict something once more.
        return LossBytes(kept=kept, chunk=(2.0 * e + 12) * vocab * tokens, weight_gradient=e * head)
    # fp32 log-probabilities, their gradient, and the gradient of the logits.
    return LossBytes(kept=kept, chunk=12.0 * vocab * chunk, weight_gradient=e * head)


def rotary_bytes(setting: Setting) -> float:
    """Bytes of cosines and sines, positions and ids, once per micro batch."""
    return float((2 * setting.element * setting.shape.head_dim + 32) * setting.tokens)


def _attention_extra(setting: Setting) -> float:
    """Bytes per token that the attention operation needs in backward, for the most expensive kind of layer."""
    dense = setting.dense_attention.backward_bytes if setting.dense_layers else 0.0
    if setting.dense_layers == setting.shape.layers:
        return dense
    return max(dense, setting.attention.backward_bytes)
