"""From a row of a dataset to tokens and the spans of them that carry loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.data.chat import Rendered, render_chat
from sparsetrain.data.conversation import messages_of
from sparsetrain.data.document import Tokens
from sparsetrain.data.encoding import encode, end_of_text, opening, shared_prefix
from sparsetrain.data.forms import RowForm
from sparsetrain.data.values import MalformedRow, string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_VERSION = 2
"""Raised whenever the same row would give other tokens, so that nothing cached before is used."""

ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
"""Prompt of an Alpaca row where the tokenizer has no chat template."""


def render(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokens of one row; none for an empty text.

    Text and prompt + completion begin with BOS where the tokenizer puts one and end with EOS; a chat begins and ends
    as its template says.

    Raises:
        MalformedRow: a column is missing or of the wrong type, the completion is empty, no turn is the assistant's, or
            the chat template refuses the conversation.
    """
    match form.kind:
        case "text":
            input_ids, targets = _text(string(row, form.fields[0]), tokenizer)
        case "prompt_completion":
            input_ids, targets = _completion(string(row, form.fields[0]), string(row, form.fields[1]), tokenizer)
        case "chat":
            input_ids, targets = render_chat(messages_of(row, form.fields[0]), tokenizer)
        case "alpaca":
            input_ids, targets = _alpaca(row, form, tokenizer)
    return Tokens(np.array(input_ids, dtype=np.int32), targets)


def _text(text: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if not text.strip():
        return [], []
    input_ids = [*opening(tokenizer), *encode(tokenizer, text), end_of_text(tokenizer)]
    return input_ids, [(1, len(input_ids))]


def _completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Loss on the completion and EOS. A token that reaches over the boundary counts to the completion."""
    if not completion.strip():
        raise MalformedRow("the completion is empty")
    start = opening(tokenizer)
    asked = start + encode(tokenizer, prompt)
    input_ids = [*start, *encode(tokenizer, prompt + completion), end_of_text(tokenizer)]
    return input_ids, [(max(1, shared_prefix(asked, input_ids)), len(input_ids))]


def _alpaca(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    instruction, answer = string(row, "instruction"), string(row, "output")
    if "input" in form.fields and row.get("input"):
        instruction = f"{instruction}\n\n{string(row, 'input')}"
    if not tokenizer.chat_template:
        return _completion(ALPACA_PROMPT.format(instruction=instruction), answer, tokenizer)
    return render_chat([{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}], tokenizer)
