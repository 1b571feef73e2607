"""Whether a model's logits are just its output projection, so that they can be computed a part at a time."""

from __future__ import annotations

from transformers import PreTrainedModel

# Config fields by which a model changes its logits after the output projection. Such a model computes them itself.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier_scale",
)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output projection of the decoder's hidden states and nothing else."""
    text_config = model.config.get_text_config()
    changed = any(getattr(text_config, name, None) not in (None, 1, 1.0) for name in LOGIT_TRANSFORMS)
    return model.get_decoder() is not None and model.get_output_embeddings() is not None and not changed
