"""The tokens of a prompt: as a plain text, or as a user's turn with the answer begun."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING

from sparsetrain.data.chat_template import apply_template
from sparsetrain.data.encoding import encode, opening
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.fit import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "the-text-of-a-prompt-goes-here"
_ANSWER = "what-was-answered-goes-here"
_NEXT = "the-text-of-the-next-prompt-goes-here"
_LATER = re.compile(rf".*{_MARK}.*{_ANSWER}(.*){_NEXT}(.*)", re.DOTALL)


class Encoder:
    """Encodes prompts.

    Args:
        chat: whether the text becomes a user's turn by the tokenizer's template. What the model writes goes on from the
            sample's prefix, which is appended behind the template.

    Raises:
        DataError: the template cannot hold a user's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._opening = [] if chat else opening(tokenizer)
        self._before, self._behind = self._turn() if chat else ("", "")
        # A prompt is measured, and then taken.
        self._last: tuple[Sample | None, list[int]] = None, []
        plain = Sample(_MARK, _MARK, [])
        self.overhead = len(self.ids(plain)) - self._plain(plain)
        """Tokens of BOS and the template."""

    def ids(self, sample: Sample) -> list[int]:
        """All tokens that the model reads."""
        if self._last[0] is not sample:
            text = f"{self._before}{sample.text}{self._behind}{sample.prefix}"
            self._last = sample, self._opening + encode(self._tokenizer, text)
        return self._last[1]

    def count(self, sample: Sample) -> int:
        """Tokens without those of BOS and the template."""
        return len(self.ids(sample)) - self.overhead

    def next_ids(self, sample: Sample) -> list[int]:
        """Tokens of a question behind an answer, with those that end the answer's turn.

        Raises:
            DataError: the template cannot hold several turns.
        """
        between, behind = self._later
        return encode(self._tokenizer, f"{between}{sample.text}{behind}{sample.prefix}")

    def tokens_before(self, text: str) -> int:
        """Tokens up to the end of a text with which a prompt begins."""
        return len(self._opening) + len(encode(self._tokenizer, self._before + text))

    def _plain(self, sample: Sample) -> int:
        return len(encode(self._tokenizer, sample.text + sample.prefix))

    def _turn(self) -> tuple[str, str]:
        if not self._tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; prompt: plain asks without one")
        text = self._rendered(_MARK)
        before, mark, behind = text.partition(_MARK)
        if not mark or _MARK in behind:
            raise DataError(
                "the chat template does not write a user's turn once, as it is; prompt: plain asks without it"
            )
        return before, behind

    @cached_property
    def _later(self) -> tuple[str, str]:
        """What stands between an answer and the next question, and behind that."""
        if not self._chat:
            return "\n", ""
        found = _LATER.fullmatch(self._rendered(_MARK, _ANSWER, _NEXT))
        if found is None:
            raise DataError(
                "the chat template does not write a user's next turn behind an answer; prompt: plain asks without it"
            )
        return found[1], found[2]

    def _rendered(self, *turns: str) -> str:
        """Turns of the user and the assistant by turns, and where the next answer begins."""
        messages = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), turns)]
        try:
            return apply_template(self._tokenizer, messages, prompt=True).text
        except MalformedRow as error:
            raise DataError(f"{error}; prompt: plain asks without it") from error
