"""Whether a model's logits are just its output projection, so that they can be computed a part at a time."""

from __future__ import annotations

from transformers import PreTrainedModel

from sparsetrain.logits import changes_logits


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output projection of the decoder's hidden states and nothing else."""
    text_config = model.config.get_text_config()
    changed = changes_logits(lambda name: getattr(text_config, name, None))
    return model.get_decoder() is not None and model.get_output_embeddings() is not None and not changed
