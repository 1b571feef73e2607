"""Texts that a model writes behind prompts, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from sparsetrain.generation.texts import end_tokens, left_padded, without_own_settings

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    *,
    in_step: bool,
) -> list[list[int]]:
    """Continue a batch of prompts greedily, in the model's own cache and under the decode section that it records.

    Args:
        prompts: token ids of each, ``[n]``; they may differ in length.
        new_tokens: the most that are written.
        in_step: make ``new_tokens`` forward passes whatever is written. Ranks that share a model by ZeRO-3 must make
            equally many. What is behind the end of a text is dropped, so the texts are the same.

    Returns:
        The tokens of each text, without the one that ends it.
    """
    ids, mask = left_padded(prompts)
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None if in_step or not ends else sorted(ends),
        pad_token_id=min(ends, default=0),
        use_cache=True,
        disable_compile=True,
    )
    with without_own_settings(model):
        written: Any = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            synced_gpus=False,
        )
    return [_until_end(text, ends) for text in written[:, ids.shape[1] :].tolist()]


def _until_end(text: list[int], ends: set[int]) -> list[int]:
    return text[: next((place for place, token in enumerate(text) if token in ends), len(text))]
