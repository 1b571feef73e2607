"""The tokens of a conversation up to the assistant's next turn, written as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsetrain.data.conversation import conversation_of
from sparsetrain.data.encoding import encode
from sparsetrain.data.forms import RowForm
from sparsetrain.data.known_columns import check_prompt, read_columns
from sparsetrain.data.render import with_columns
from sparsetrain.data.template_coverage import check_coverage
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = RowForm("chat", ("messages",), read_columns("chat", ()))


def chat_prompt(turns: Any, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a conversation with a generation prompt behind it.

    Args:
        turns: the turns, in any form that rows of training may have.
        row: its other columns, of which tools, a system prompt and variables of the template are read.

    Raises:
        MalformedRow: the turns or a column cannot be read, or the template refuses them or omits a part of them.
        DataError: the template cannot be compiled, or does not terminate.
    """
    check_prompt(row, chat=True)
    try:
        conversation = with_columns(conversation_of(turns, "messages"), row, _FORM)
        check_coverage(conversation, tokenizer, conversation.written(tokenizer).text)
    except MalformedRow as problem:
        # What its recipe could do does not help where there is none.
        raise MalformedRow(problem.without_recipe) from problem
    return encode(tokenizer, conversation.written(tokenizer, prompt=True).text)
