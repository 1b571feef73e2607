"""One call of a layer's attention. transformers' keyword arguments end here: each is honoured, harmless, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.methods.memory import Memory
from sparsetrain.modeling.attention.documents import bounds, explicit_documents
from sparsetrain.modeling.attention.mask import MaskRequest, received
from sparsetrain.modeling.attention.plan import LayerPlan

HARMLESS_ARGUMENTS = frozenset(
    {
        *("position_embeddings", "cache_position", "return_dict"),
        *("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        *("output_hidden_states", "output_router_logits", "num_items_in_batch"),
        # Of generate(stop_strings=..., tokenizer=...), which hands both to every pass.
        *("tokenizer", "assistant_tokenizer"),
    }
)
"""Arguments that models pass besides those of :func:`parse_call`: bookkeeping, and other spellings of the documents."""


@dataclass(frozen=True)
class AttentionCall:
    """Everything that is honoured of one call."""

    query: Tensor
    """``[B, Hq, N, D]``."""
    key: Tensor
    """``[B, Hkv, M, D]``; with a cache ``M > N``."""
    value: Tensor
    """``[B, Hkv, M, D]``."""
    scale: float
    """Factor on the logits."""
    softcap: float | None = None
    """Soft cap of the logits (Gemma-2)."""
    sink_logits: Tensor | None = None
    """``[Hq]`` learned sink logits (gpt-oss)."""
    padding: Tensor | None = None
    """bool ``[B, M]``, False on padding; None without padding."""
    cu_seqlens: Tensor | None = None
    """int32 ``[documents + 1]``: the documents of a packed row, as the caller gave them."""
    position_ids: Tensor | None = None
    """Else these tell the documents apart: one starts where the position is not the previous one plus one."""
    positions_withheld: bool = False
    """The model passes positions on, and there are none for this call."""
    packed: bool = False
    """The model's mask keeps documents apart, so there must be some."""
    caches: bool = False
    """The call fills a cache."""
    training: bool = False
    memory: Memory | None = None
    """The layer's memory of the past, in place of a cache; then ``M == N``."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's extra inputs."""
    planned: Any = None
    """What the method has planned for the documents of the pass (:meth:`Method.plan_pass`)."""

    @property
    def rows(self) -> int:
        """``B``."""
        return self.query.shape[0]

    @property
    def tokens(self) -> int:
        """``N``."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """``M``."""
        return self.key.shape[2]

    @property
    def settings(self) -> dict[str, Any]:
        """The options of an attention operation that do not depend on rows."""
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": self.sink_logits}

    def documents(self) -> list[Tensor] | None:
        """``cu_seqlens`` of each row; None if every row is one document.

        Raises:
            ModelError: nothing tells the documents apart.
        """
        if self.cu_seqlens is not None:
            return [self.cu_seqlens]
        if self.tokens == 1 or (self.positions_withheld and not self.training):
            return None
        positions = self.position_ids
        if positions is None or positions.ndim != 2:
            given = "no position_ids" if positions is None else f"position_ids of shape {list(positions.shape)}"
            raise ModelError(
                f"this model hands its attention {given}, which tells no documents apart; pass it cu_seqlens"
            )
        return bounds(positions, self.rows)


def parse_call(
    plan: LayerPlan,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    sliding_window: int | None = None,
    use_cache: bool | None = None,
    sparsetrain_memory: Memory | None = None,
    sparsetrain_planned: Any = None,
    **kwargs: Any,
) -> AttentionCall:
    """Read what transformers' ``AttentionInterface`` passes.

    Args:
        attention_mask: the padding, and the request of :func:`~sparsetrain.modeling.attention.mask.mask_of_requests`.

    Raises:
        ModelError: anything asked for that no method here would honour.
    """
    padding, request = received(attention_mask)
    _check_window(plan, module, request, sliding_window)
    if dropout > 0:
        raise ModelError(
            f"attention dropout of {dropout} is not supported; set the model's attention_dropout (attn_pdrop in GPT-2) "
            "to 0, in a recipe with model.config_overrides"
        )
    if is_causal is False:
        raise ModelError("is_causal=False: only causal attention is supported")
    if output_attentions:
        raise ModelError("output_attentions=True: attention weights are never formed; load the dense model to see them")
    if value.shape[-1] != key.shape[-1]:
        raise ModelError(f"keys of width {key.shape[-1]} and values of width {value.shape[-1]} are not supported")
    # Models with three-dimensional positions (Qwen2.5-VL) pass None for the text's own; elsewhere that is no answer.
    withheld = kwargs.get("position_ids", query) is None
    positions = kwargs.pop("position_ids", None)
    names = plan.method.extra_inputs if plan.method is not None else frozenset()
    extra = {name: kwargs.pop(name) for name in names if name in kwargs}
    # Plain loops: Dynamo before torch 2.13 cannot trace sets of a mapping's keys.
    for name, argument in kwargs.items():
        if argument is not None and name not in HARMLESS_ARGUMENTS:
            raise ModelError(f"{type(module).__name__} passes {name} to its attention, which no method here honours")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sink_logits=s_aux,
        padding=padding,
        cu_seqlens=explicit_documents(kwargs),
        position_ids=positions,
        positions_withheld=withheld,
        packed=request is not None and request.packed,
        caches=bool(use_cache),
        training=module.training,
        memory=sparsetrain_memory,
        extra=extra,
        planned=sparsetrain_planned,
    )


def _check_window(plan: LayerPlan, module: nn.Module, request: MaskRequest | None, window: int | None) -> None:
    """Refuse a sliding window that is not the layer's: models ask for it in the call, in the mask, or in both."""
    name = type(module).__name__
    if request is not None:
        if window is not None and window != request.window:
            raise ModelError(
                f"{name} asks for a sliding window of {window} tokens in layer {plan.index}, and its mask for "
                f"{request.window}: which is meant cannot be told; not supported"
            )
        window = request.window
    if window != plan.window:
        raise ModelError(
            f"layer {plan.index} was built with a sliding window of {plan.window} tokens, but {name} asks for {window} "
            "in its call or its mask; not supported"
        )
