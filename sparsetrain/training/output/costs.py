"""The costs of a model in this run: parameters, attention density, FLOPs per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparsetrain.modeling import attention_density
from sparsetrain.recipe import Recipe
from sparsetrain.training.output.flops import model_flops_per_token, peak_flops
from sparsetrain.training.trainable import total_size, trainable_size
from sparsetrain.world import World


@dataclass(frozen=True)
class Costs:
    """The costs of a model: parameters, the density of each layer, and FLOPs per token."""

    parameters: int
    densities: list[float]
    flops_per_token: float
    peak_flops: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, recipe: Recipe, world: World) -> Costs:
        text_config = model.config.get_text_config()
        length = recipe.sequence.length
        parameters = total_size(model)
        lookup = 0 if text_config.tie_word_embeddings else text_config.vocab_size * text_config.hidden_size
        densities = attention_density(model, length)
        heads = text_config.num_attention_heads
        flops = model_flops_per_token(
            parameters - lookup,
            len(densities),
            heads,
            getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            sum(densities) / len(densities) * (length + 1) / 2,
            frozen_params=parameters - trainable_size(model),
        )
        peak = None
        if world.device.type == "cuda":
            per_device = peak_flops(torch.cuda.get_device_name(world.device), recipe.model.dtype)
            peak = per_device * world.size if per_device else None
        return cls(parameters, densities, flops, peak)

    def describe(self) -> str:
        mean = sum(self.densities) / len(self.densities)
        sparse = sum(density < 1.0 for density in self.densities)
        return (
            f"model: {self.parameters / 1e6:,.1f}M parameters, {sparse} of {len(self.densities)} layers sparse, "
            f"{mean:.1%} of the causal pairs attended"
        )

    def density_by_layer(self) -> dict[str, float]:
        return {f"attention/density/layer_{index:02d}": density for index, density in enumerate(self.densities)}

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOP utilisation; None if the peak of the device is not known."""
        return tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None
