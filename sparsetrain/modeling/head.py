"""Whether a model's head is more than a linear projection, and the factor of its routers' balance loss."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.logits import changes_logits

BALANCE_FACTORS = ("router_aux_loss_coef", "aux_loss_coef")
"""The config fields for the factor of the routers' balance loss, as model families name them."""


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are exactly the output projection of the decoder's hidden states."""
    text_config = model.config.get_text_config()
    changed = changes_logits(lambda name: getattr(text_config, name, None))
    return model.get_decoder() is not None and model.get_output_embeddings() is not None and not changed


def balance_factor(model: PreTrainedModel) -> float:
    """The factor of the routers' balance loss in the model's loss; 0 if the model adds none.

    Models add it if their config sets ``output_router_logits``.

    Raises:
        ModelError: The config sets it, but no balance loss of the model is known.
    """
    config: Any = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    places = ((place, name) for place in (model, config) for name in BALANCE_FACTORS)
    factor = next((getattr(place, name) for place, name in places if hasattr(place, name)), None)
    if factor is None:
        raise ModelError(
            f"output_router_logits is on, but {type(model).__name__} has no known balance loss of its routers "
            f"(no {' or '.join(BALANCE_FACTORS)}); set model.config_overrides={{output_router_logits: false}}"
        )
    return float(factor)
