"""Check the special tokens of a chat template against the model before step 1."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.data.ending import Ending, remarks, turn_ending
from sparsetrain.modeling.vocabulary import added_token_ids
from sparsetrain.recipe.lora_section import LoraSection

UNTRAINED = 0.05
"""An embedding row whose norm is below this fraction of the median counts as untrained."""
SAMPLED = 2048
"""Number of rows from which the median is computed."""
COMPARED = 8
"""Number of elements compared first in the search for equal rows."""


def set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoraSection | None) -> list[str]:
    """Make generation stop at the tokens that end turns in the data; return messages about this and about tokens that
    cannot be learned.

    The end tokens are added to ``generation_config.eos_token_id``, which is saved with the model.

    Args:
        model: The model as loaded, with unsharded weights.
        lora: The recipe's section, if adapters are trained; embedding rows that they leave frozen are not learned.
    """
    ending = turn_ending(tokenizer)
    lines = [f"warning: {remark}" for remark in remarks(ending, tokenizer)]
    if ending.token is not None:
        lines += _stop_at([ending.token, *ending.others], model, tokenizer)
    return lines + ([] if lora is None else _frozen(model, tokenizer, lora, ending))


def _stop_at(tokens: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    config = model.generation_config
    if config is None:
        return []
    listed = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    known = [listed] if isinstance(listed, int) else list(listed or [])
    added = [token for token in tokens if token not in known]
    if not added:
        return []
    config.eos_token_id = [*known, *added]
    names = _names(added, tokenizer)
    return [f"chat: turns end with {names}, added to eos_token_id in generation_config: generation stops there"]


def _frozen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoraSection, ending: Ending) -> list[str]:
    """Warnings about control tokens whose rows are untrained in the base and frozen with adapters."""
    lines = []
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    trained = set(added_token_ids(model))
    control = [token for token in ending.control if token not in trained]
    unread = _untrained(embedding.weight, control) if not lora.train_embeddings else []
    if unread:
        lines.append(
            f"warning: the base never trained the embedding of {_names(unread, tokenizer)}, which the chat template "
            "writes, and lora keeps it frozen: the model cannot learn its meaning. Name it in model.add_tokens, which "
            "trains its row, set lora.train_embeddings: true, or start from an instruction-tuned model"
        )
    ends = [] if ending.token is None else [ending.token, *ending.others]
    learned = [token for token in ends if token not in trained]
    adapted = isinstance(lora.targets, list) and any(target.endswith("lm_head") for target in lora.targets)
    unwritten = [] if tied or adapted else _untrained(head.weight, learned)
    if unwritten:
        lines.append(
            f"warning: the base never trained the output row of {_names(unwritten, tokenizer)}, which ends turns, and "
            "lora keeps it frozen: the model will not learn to stop. Name it in model.add_tokens, start from an "
            "instruction-tuned model, train without lora, or name lm_head in lora.targets"
        )
    return lines


@torch.no_grad()
def _untrained(weight: torch.Tensor, tokens: list[int] | tuple[int, ...]) -> list[int]:
    """The tokens whose rows of ``weight`` ``[rows, width]`` are near zero or equal to another token's row."""
    sample = weight[:: max(1, len(weight) // SAMPLED)].float().norm(dim=-1)
    typical = sample[sample > 0].median() if (sample > 0).any() else sample.new_tensor(1.0)

    def untrained(token: int) -> bool:
        row = weight[token]
        alike = (weight[:, :COMPARED] == row[:COMPARED]).all(-1).nonzero().flatten()
        return bool(row.float().norm() < UNTRAINED * typical) or int((weight[alike] == row).all(-1).sum()) > 1

    return [token for token in tokens if token < len(weight) and untrained(token)]


def _names(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(repr(name) for name in tokenizer.convert_ids_to_tokens(tokens))
