"""The inputs of an estimate: the recipe, its model, and the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sparsetrain.errors import RecipeError
from sparsetrain.methods.costs import AttentionCosts, LayerShape
from sparsetrain.methods.full import FullConfig
from sparsetrain.plan.devices import Device
from sparsetrain.plan.second_model import SecondModel, second_models
from sparsetrain.plan.shape import ELEMENT, ModelShape
from sparsetrain.plan.trained import Parameters, count_parameters
from sparsetrain.recipe.batch import BatchShape, batch_shape
from sparsetrain.recipe.heads import heads_fault
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config

# DeepSpeed's own defaults, for what neither the recipe nor its deepspeed.config says (runtime/zero/config.py).
_ZERO_DEFAULTS = {
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


@dataclass(frozen=True)
class Setting:
    """One rank of a run, with all inputs of its memory and time."""

    recipe: Recipe
    shape: ModelShape
    ranks: int
    """Processes, one a GPU."""
    device: Device
    liger: bool
    """Whether Liger's kernels are used."""

    @cached_property
    def parameters(self) -> Parameters:
        """The numbers of parameters and trained parameters."""
        return count_parameters(self.shape, self.recipe, self.attention.parameters)

    @cached_property
    def batch(self) -> BatchShape:
        """Micro batch, accumulation and ranks.

        Raises:
            RecipeError: the global batch cannot be made on so many ranks, or the ranks cannot share a sequence.
        """
        parallel, kv_heads = self.recipe.sequence.parallel, self.shape.kv_heads
        fault = heads_fault(parallel, self.shape.heads, kv_heads) or self.shape.rotary_fault
        fault = fault or self.recipe.attention.heads_fault(kv_heads, parallel)
        if parallel > 1 and fault is not None:
            raise RecipeError(f"sequence.parallel: {fault}")
        return batch_shape(self.recipe, self.ranks, (self.shape.heads, kv_heads))

    @property
    def parallel(self) -> int:
        """Ranks that share a sequence."""
        return self.recipe.sequence.parallel

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch that this rank holds."""
        return self.batch.tokens_per_pass

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys over the ranks that share a sequence: beyond the KV heads they hold copies."""
        return max(self.shape.kv_heads, self.parallel) * self.shape.head_dim

    @property
    def element(self) -> int:
        """Bytes of an element of the model's dtype."""
        return ELEMENT[self.recipe.model.dtype]

    @property
    def checkpointing(self) -> Literal["none", "layer", "selective"]:
        """The mode of activation checkpointing."""
        return self.recipe.train.activation_checkpointing

    @property
    def reference_passes(self) -> int:
        """Forward passes without gradients of each micro batch, for the reference of ``preference``."""
        return int(self.recipe.reference == "adapters_off")

    @property
    def fused_loss(self) -> bool:
        """Whether Liger computes the loss: of tokens, not of pairs of answers."""
        return self.liger and self.recipe.preference is None

    @property
    def loss_chunk(self) -> int:
        """Positions whose logits exist at a time."""
        wanted = self.recipe.train.loss_chunk
        whole = wanted is None or not self.shape.plain_head
        return self.tokens if whole or wanted is None else min(wanted, self.tokens)

    @property
    def mlp_tokens(self) -> int:
        """Tokens that go through an MLP at a time."""
        return min(self.recipe.train.mlp_chunk or self.tokens, self.tokens)

    @cached_property
    def zero(self) -> dict[str, Any]:
        """The ``zero_optimization`` section that DeepSpeed would get, with its defaults."""
        plan = self.batch.with_steps(1)
        return {**_ZERO_DEFAULTS, **deepspeed_config(self.recipe, plan, self.parameters.trained)["zero_optimization"]}

    @cached_property
    def second_models(self) -> tuple[SecondModel, ...]:
        """The models that evaluations load beside the one that is trained."""
        return tuple(second_models(self.recipe))

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.recipe.deepspeed.stage

    @cached_property
    def dense_layers(self) -> int:
        """Layers that attend to everything before them."""
        if self.recipe.attention.method == "full":
            return self.shape.layers
        return len(self.recipe.attention.resolve_dense_layers(self.shape.layers))

    @cached_property
    def attention(self) -> AttentionCosts:
        """The costs of a layer that takes the recipe's method."""
        return self.recipe.attention.costs(self._layer)

    @cached_property
    def dense_attention(self) -> AttentionCosts:
        """The costs of a layer with full attention."""
        return FullConfig().costs(self._layer)

    @property
    def _layer(self) -> LayerShape:
        shape = self.shape
        return LayerShape(
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            length=self.recipe.sequence.length,
            tokens=self.tokens,
            hopper=self.device.hopper,
        )
