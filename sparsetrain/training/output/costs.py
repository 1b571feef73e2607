"""The costs of a model in this run: parameters, attention density, FLOPs per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparsetrain.generation.memories import kept_tokens, make_memory
from sparsetrain.modeling import attention_density, sparse_layers
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE
from sparsetrain.modeling.cache import shares_keys
from sparsetrain.recipe import Recipe
from sparsetrain.training.output.flops import model_flops_per_token, peak_flops
from sparsetrain.training.trainable import total_size, trainable_size
from sparsetrain.world import World

GENERATED = 1024
"""Tokens of a text behind its prompt, for the bytes of a cache."""


@dataclass(frozen=True)
class Costs:
    """The costs of a model: parameters, the density of each layer, and FLOPs per token."""

    parameters: int
    densities: list[float]
    flops_per_token: float
    """With the keys that the method's layers read."""
    dense_flops_per_token: float
    """Had every layer full attention."""
    peak_flops: float | None
    cache: dict[str, float]
    """Bytes of keys and values that generation keeps of a text behind a prompt as long as a row, with the method
    (``cache/bytes``) and with the attention that the model came with (``cache/bytes_full``), and the tokens of prompt
    and text (``cache/tokens``); empty where a memory does not say."""

    @classmethod
    def of(cls, model: PreTrainedModel, recipe: Recipe, world: World) -> Costs:
        text_config = model.config.get_text_config()
        length = recipe.sequence.length
        parameters = total_size(model)
        lookup = 0 if text_config.tie_word_embeddings else text_config.vocab_size * text_config.hidden_size
        densities = attention_density(model, length)
        heads = text_config.num_attention_heads
        sparse, dense = (
            model_flops_per_token(
                parameters - lookup,
                len(densities),
                heads,
                getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
                density * (length + 1) / 2,
                frozen_params=parameters - trainable_size(model),
            )
            for density in (sum(densities) / len(densities), 1.0)
        )
        peak = None
        if world.device.type == "cuda":
            per_device = peak_flops(torch.cuda.get_device_name(world.device), recipe.model.dtype)
            peak = per_device * world.size if per_device else None
        return cls(parameters, densities, sparse, dense, peak, cache_costs(model, recipe))

    def describe(self) -> str:
        mean = sum(self.densities) / len(self.densities)
        sparse = sum(density < 1.0 for density in self.densities)
        return (
            f"model: {self.parameters / 1e6:,.1f}M parameters, {sparse} of {len(self.densities)} layers sparse, "
            f"{mean:.1%} of the causal pairs attended, over all layers"
        )

    def unchanging(self) -> dict[str, float]:
        """What is logged once, before step 1."""
        return self.density_by_layer() | self.cache | {"model/parameters": float(self.parameters)}

    def density_by_layer(self) -> dict[str, float]:
        return {f"attention/density/layer_{index:02d}": density for index, density in enumerate(self.densities)}

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP utilisation by two conventions; empty if the peak of the device is not known.

        ``mfu`` counts the attention that the method computes. ``mfu_dense_equivalent`` counts full attention, whatever
        was computed: it compares speeds of methods at one length, and may exceed 1.
        """
        if not self.peak_flops:
            return {}
        each = {"mfu": self.flops_per_token, "mfu_dense_equivalent": self.dense_flops_per_token}
        return {name: tokens_per_second * flops / self.peak_flops for name, flops in each.items()}


def cache_costs(model: PreTrainedModel, recipe: Recipe) -> dict[str, float]:
    """Bytes of keys and values of one text in generation (:attr:`Costs.cache`)."""
    text_config = model.config.get_text_config()
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    if not isinstance(kv_heads, int) or getattr(text_config, "kv_lora_rank", None) is not None:
        return {}  # a number for each layer, or keys that are not as wide as values
    bytes_each = 2 * kv_heads * head_dim * getattr(torch, recipe.model.dtype).itemsize
    prompt = recipe.sequence.length
    length = prompt + GENERATED
    own, full = 0, 0
    for _, layer, method in sparse_layers(model):
        if shares_keys(layer):
            continue
        window = getattr(layer, PLAN_ATTRIBUTE).window
        kept = [
            kept_tokens(make_memory(each, window, max_length=length, rollback=0), prompt, length)
            for each in (method, None)
        ]
        if kept[0] is None or kept[1] is None:
            return {}
        own, full = own + kept[0] * bytes_each, full + kept[1] * bytes_each
    return {"cache/tokens": float(length), "cache/bytes": float(own), "cache/bytes_full": float(full)}
