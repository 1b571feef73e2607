"""What a recipe says of any task whose prompts a model continues."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsetrain.evaluation.base import TaskSection
from sparsetrain.section import MOST_LISTED, Bounds, Text, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MADE: dict[str, tuple[Any, list[Any]]] = {}
"""The prompts of the last evaluation, by the name of the task, and what they depend on."""


class GenerativeSection(TaskSection):
    """The settings of prompts."""

    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)] = [4096, 8192, 16384, 32768]
    """Tokens of a prompt and its answer together, with BOS and the chat template."""
    samples: Annotated[int, Field(gt=0), Bounds(10_000, "each is a prompt of its own, of every task and length")] = 25
    """Prompts of each task and length."""
    prompt: Literal["auto", "chat", "plain"] = "auto"
    """``chat`` puts the prompt into a user's turn of the tokenizer's chat template, ``plain`` takes it as it is; both
    end with the beginning of the answer. ``auto`` is ``chat`` where there is a template."""
    haystack: Text | None = None
    """A text file that fills prompts up, between whose sentences something is hidden; they end at ``.``, ``!`` or ``?``
    before a space. null is a generated text."""

    @abstractmethod
    def make(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Any]:
        """All prompts.

        Raises:
            DataError: a length has no room, or a file cannot be read.
        """

    def made(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Any]:
        """All prompts. They are kept for the next evaluation of the run: making long ones takes minutes."""
        from sparsetrain.data.encoding import tokenizer_fingerprint

        changed = [file.stat().st_mtime_ns for file in self.files() if file.exists()]
        key = (self, tokenizer_fingerprint(tokenizer), seed, changed)
        known, prompts = _MADE.get(self.label, (None, []))
        if known != key:
            prompts = self.make(tokenizer, seed)
            _MADE[self.label] = key, prompts
        return prompts

    def place(self, name: str) -> Path | None:
        """The file or folder that a field names."""
        path = getattr(self, name)
        return None if path is None else Path(path).expanduser()

    def files(self) -> list[Path]:
        """The user's files."""
        path = self.place("haystack")
        return [] if path is None else [path]

    def uses_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether prompts are turns of a chat."""
        return self.prompt == "chat" or (self.prompt == "auto" and bool(tokenizer.chat_template))

    def asked_by(self, tokenizer: PreTrainedTokenizerBase) -> Literal["chat", "plain"]:
        """How prompts are put to the model."""
        return "chat" if self.uses_chat(tokenizer) else "plain"

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """Prompts with their answers."""
        return {"lengths": self.lengths}
