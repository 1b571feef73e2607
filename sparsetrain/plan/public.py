"""Check overrides of known Hub models before they are downloaded."""

from __future__ import annotations

from sparsetrain.plan.shape import known_config
from sparsetrain.recipe.local_model import model_folder
from sparsetrain.recipe.schema import ModelSection

EVERYWHERE = frozenset({"max_position_embeddings", "num_hidden_layers", "rope_theta"})
"""Fields that every known family has. To know others takes transformers, whose import takes longer than a plan."""
ROPE = frozenset(
    {
        *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    }
)
"""Keys of ``rope_parameters`` that every known family has."""


def check_public(section: ModelSection) -> None:
    """Refuse ``model.config_overrides`` that the family of a known model does not have, or that make no model.

    Raises:
        ModelError: names the override.
    """
    strange = section.config_overrides.keys() - EVERYWHERE
    rope = section.config_overrides.get("rope_parameters")
    if isinstance(rope, dict) and rope.keys() <= ROPE:
        strange -= {"rope_parameters"}
    if section.path is None or model_folder(section) is not None or not strange:
        return
    values = known_config(section)
    if values is None:
        return
    from sparsetrain.modeling.configs import check_overrides

    check_overrides(values, section)
