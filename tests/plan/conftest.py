"""Recipes and settings for plans of models that are nowhere on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from sparsetrain.plan.devices import find_device
from sparsetrain.plan.setting import Setting
from sparsetrain.plan.shape import ModelShape
from sparsetrain.recipe.schema import Recipe

if TYPE_CHECKING:
    from sparsetrain.world import World

SHAPE = ModelShape(
    layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=1000, tied=False, qk_norm=True
)


def make_recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe with these fields; ``train={"micro_batch": 2}`` and the like are laid over a minimal one."""
    given: dict[str, Any] = {
        "model": {"path": "some/model"},
        "attention": {"method": "full"},
        "data": {"sources": [{"synthetic": "passkey"}]},
        "sequence": {"length": 4096},
        "train": {"steps": 1, "lr": 1e-4, "activation_checkpointing": "layer", "liger": "off"},
        "deepspeed": {"stage": 0},
    }
    for name, fields in sections.items():
        given[name] = {**given.get(name, {}), **fields}
    return Recipe.model_validate(given)


@pytest.fixture
def setting() -> Callable[..., Setting]:
    """``setting(ranks=2, shape=..., train={...})``: a recipe on so many H200s."""

    def build(ranks: int = 1, shape: ModelShape = SHAPE, liger: bool = False, **sections: dict[str, Any]) -> Setting:
        return Setting(make_recipe(**sections), shape, ranks, find_device("h200"), liger)

    return build


@pytest.fixture
def recipe_of() -> Callable[..., Recipe]:
    """``recipe_of(train={...})``: the recipe of such a setting."""
    return make_recipe


@pytest.fixture
def shape() -> ModelShape:
    """Four layers of width 64."""
    return SHAPE


@pytest.fixture
def world() -> World:
    """A process group of this process alone."""
    from sparsetrain.training.distributed.engine import init_world

    return init_world()
