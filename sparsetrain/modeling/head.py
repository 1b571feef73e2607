"""From a decoder's hidden states to logits and loss: what the whole model adds to its output projection."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.logits import changes_logits

BALANCE_FACTORS = ("router_aux_loss_coef", "aux_loss_coef")
"""What families call the factor of their routers' balance loss."""


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output projection of the decoder's hidden states and nothing else."""
    text_config = model.config.get_text_config()
    changed = changes_logits(lambda name: getattr(text_config, name, None))
    return model.get_decoder() is not None and model.get_output_embeddings() is not None and not changed


def balance_factor(model: PreTrainedModel) -> float:
    """The factor of the balance loss that a model's routers add to its loss; 0 if they add none.

    Models add it where their config says ``output_router_logits``.

    Raises:
        ModelError: the config says so, and the model has no such loss that is known.
    """
    config: Any = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    places = ((place, name) for place in (model, config) for name in BALANCE_FACTORS)
    factor = next((getattr(place, name) for place, name in places if hasattr(place, name)), None)
    if factor is None:
        raise ModelError(
            f"output_router_logits is on, but {type(model).__name__} has no balance loss of its routers that is known "
            f"(no {' or '.join(BALANCE_FACTORS)}); set model.config_overrides={{output_router_logits: false}}"
        )
    return float(factor)
