"""The tokens of a prompt: as a plain text, or as a user's turn with the answer begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsetrain.data.chat_template import apply_template
from sparsetrain.data.encoding import encode, opening
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.fit import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "the-text-of-a-prompt-goes-here"


class Encoder:
    """Encodes prompts.

    Args:
        chat: whether the text becomes a user's turn by the tokenizer's template. What the model writes goes on from the
            sample's prefix, which is appended behind the template.

    Raises:
        DataError: the template cannot hold a user's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> None:
        self._tokenizer = tokenizer
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

    def _plain(self, sample: Sample) -> int:
        return len(encode(self._tokenizer, sample.text + sample.prefix))

    def _turn(self) -> tuple[str, str]:
        if not self._tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; prompt: plain asks without one")
        messages = [{"role": "user", "content": _MARK}]
        try:
            text = apply_template(self._tokenizer, messages, prompt=True).text
        except MalformedRow as error:
            raise DataError(f"{error}; prompt: plain asks without it") from error
        before, mark, behind = text.partition(_MARK)
        if not mark or _MARK in behind:
            raise DataError(
                "the chat template does not write a user's turn once, as it is; prompt: plain asks without it"
            )
        return before, behind
