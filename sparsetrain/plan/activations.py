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


@dataclass(frozen=True)
class _Saved:
    """Bytes of one token that autograd saves in a layer, by part."""

    norm: float
    """Of each of the two norms."""
    into_attention: float
    heads_norm: float
    result: float
    """The output of attention, with its log-sum-exp."""
    attention: float
    """The norm of heads, query, key and value, the result, and what the method saves."""
    into_mlp: float
    mlp: float

    @property
    def to_the_second_norm(self) -> float:
        """All parts up to the norm before the MLP."""
        return self.norm + self.into_attention + self.attention + self.norm

    @property
    def before_mlp(self) -> float:
        """All parts up to the input of the MLP."""
        return self.to_the_second_norm + self.into_mlp


def layer_bytes(setting: Setting) -> LayerBytes:
    """The activations of a layer; of the more expensive kind if dense and sparse layers alternate."""
    tokens, saved = setting.tokens, _saved(setting)
    statistics = 8 + 4
    # With tiles the MLP keeps its input alone.
    mlp = setting.element * setting.shape.hidden if _is_tiled(setting) else saved.mlp
    sparse = 1 - setting.dense_layers / setting.shape.layers
    dequantized = 0.0
    lora = setting.recipe.lora
    if lora is not None and lora.quantize_base != "none":
        dequantized = float(setting.element * setting.parameters.largest_matrix)
    return LayerBytes(
        input=float(setting.element * setting.shape.hidden * tokens),
        selection=float(setting.attention.saved_bytes * tokens * sparse),
        attention_result=float(saved.result * tokens),
        saved=float((saved.before_mlp + mlp + statistics) * tokens),
        backward=_backward(setting, saved) + statistics * tokens + dequantized,
    )


def _is_tiled(setting: Setting) -> bool:
    return setting.mlp_tokens < setting.tokens


def _saved(setting: Setting) -> _Saved:
    shape, parameters, e, liger = setting.shape, setting.parameters, setting.element, setting.liger
    hidden, q, kv, wide = shape.hidden, shape.q_width, setting.kv_width, shape.intermediate
    full, adapted = parameters.trains_matrices, parameters.targets

    # Norm: an fp32 copy of its input (Liger: the input itself), and where its weight is trained what it multiplies.
    norm = e * hidden if liger else 4 * hidden + (e * hidden if parameters.trains_norms else 0)
    reads_input = full or setting.attention.keeps_input or adapted & {"q_proj", "k_proj", "v_proj", "qkv_proj"}
    heads_norm = (e if liger else 4) * (q + kv) if shape.qk_norm else 0
    if shape.qk_norm and parameters.trains_norms and not liger:
        heads_norm += e * (q + kv)
    log_sum_exp = 4 * shape.heads
    result = e * q + log_sum_exp
    # Gate and up, the activated gate, and what goes into the last projection where that needs it.
    product = e * wide if full or "down_proj" in adapted else 0
    return _Saved(
        norm=norm,
        into_attention=e * hidden if reads_input else 0,
        heads_norm=heads_norm,
        result=result,
        attention=heads_norm + e * (q + 2 * kv) + result + setting.attention.saved_bytes,
        into_mlp=e * hidden if full or adapted & {"gate_proj", "up_proj", "gate_up_proj"} else 0,
        mlp=(2 if liger else 3) * e * wide + product,
    )


def _backward(setting: Setting, saved: _Saved) -> float:
    """Peak bytes of a layer's backward pass over its phases, from the MLP back to its input."""
    shape, e, liger, tokens = setting.shape, setting.element, setting.liger, setting.tokens
    hidden, q, kv, wide = shape.hidden, shape.q_width, setting.kv_width, shape.intermediate
    gradient = e * hidden
    norm_backward = 4 * hidden if liger else 20 * hidden
    # Gradients of both factors beside that of their product; the product itself is gone by then. Liger works in place.
    mlp_backward = (4 if liger else 6) * e * wide
    if _is_tiled(setting):
        at_a_time = (mlp_backward + saved.into_mlp) * setting.mlp_tokens / tokens
        # The gradient of the MLP's input is put together from its parts.
        in_mlp = saved.before_mlp + gradient + at_a_time + 2 * e * hidden
    else:
        in_mlp = saved.before_mlp + gradient + max(saved.mlp + 2 * e * wide, mlp_backward)
    in_norm = saved.to_the_second_norm + norm_backward + gradient
    exchanged = 2 * e * (q + 2 * kv) if setting.parallel > 1 else 0
    in_attention = saved.norm + saved.into_attention + saved.attention + gradient + e * (2 * q + 2 * kv)
    in_attention += _attention_extra(setting) + exchanged
    in_heads = 0.0
    if shape.qk_norm:
        in_heads = saved.norm + saved.into_attention + saved.heads_norm + (1 if liger else 5) * 4 * q
        in_heads += e * (q + 2 * kv) + gradient
    at_input = 2 * saved.norm + norm_backward + 2 * gradient
    # Gradients of the MLP's weights: with tiles the sum and that of one tile, then the layer's own.
    weights = float(e * 3 * hidden * wide) if setting.parameters.trains_matrices else 0.0
    return max(
        in_mlp * tokens + (2 * weights if _is_tiled(setting) else 0.0),
        in_norm * tokens + weights,
        max(in_attention, in_heads, at_input) * tokens + weights,
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
