"""A plan: memory, time, whether it fits, and suggested changes if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsetrain.plan.devices import Device
from sparsetrain.plan.memory import Memory, estimate_memory
from sparsetrain.plan.setting import Setting
from sparsetrain.plan.shape import ModelShape
from sparsetrain.plan.speed import StepTime, estimate_time
from sparsetrain.plan.suggest import Suggestion, suggest
from sparsetrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """The estimated memory and time of a recipe on a number of GPUs."""

    setting: Setting
    capacity: float
    """Memory of one GPU in bytes."""
    memory: Memory
    time: StepTime
    dense_time: StepTime
    """The same recipe with full attention in every layer."""
    suggestion: Suggestion | None
    """Suggested changes if it does not fit."""

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.memory.needed <= self.capacity


def plan_recipe(
    recipe: Recipe,
    shape: ModelShape,
    *,
    ranks: int,
    device: Device,
    capacity: float | None = None,
    liger: bool = False,
    reload: Callable[[list[str]], Recipe] | None = None,
) -> Plan:
    """Estimate a recipe.

    Args:
        shape: of its model, from :func:`sparsetrain.plan.shape.find_shape`.
        ranks: GPUs, one process each.
        capacity: bytes of one; None takes the device's.
        liger: what ``train.liger: auto`` means: whether liger-kernel is installed there.
        reload: the recipe under further overrides; without it nothing is suggested.

    Raises:
        RecipeError: the batch cannot be made on so many ranks.
    """
    bytes_each = device.memory if capacity is None else capacity

    def setting(changed: Recipe) -> Setting:
        choice = changed.train.liger
        return Setting(changed, shape, ranks, device, liger=choice == "on" or (choice == "auto" and liger))

    now = setting(recipe)
    memory = estimate_memory(now)
    suggestion = None
    if memory.needed > bytes_each and reload is not None:
        suggestion = suggest(now, bytes_each, reload, setting)
    return Plan(now, bytes_each, memory, estimate_time(now), estimate_time(now, dense=True), suggestion)
