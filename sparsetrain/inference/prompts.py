"""Prompts from the command line, from a text file or from the rows of a JSON Lines file, as token ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.data.chat_prompt import chat_prompt
from sparsetrain.data.conversation import conversation_of
from sparsetrain.data.known_columns import check_prompt
from sparsetrain.data.values import keyed_once
from sparsetrain.errors import DataError, ModelError, first_line
from sparsetrain.textfile import text_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = ("completion", "finish", "prompt_tokens", "new_tokens")
"""The columns that a row of the output has beside those of its prompt."""

TABLE_SUFFIXES = (".json", ".csv", ".tsv")
"""Of text files that may have been meant as rows."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, or the messages of a chat."""

    place: str
    """Its source, for error messages."""
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    row: dict[str, Any] = field(default_factory=dict)
    """The columns it came with."""

    @property
    def answered(self) -> bool:
        """Whether its last message is an answer, behind which another one is written.

        Raises:
            MalformedRow: the message cannot be read, which :meth:`encode` names.
        """
        if not self.messages:
            return False
        (last,) = conversation_of(self.messages[-1:], "messages").messages
        return bool(last["role"] == "assistant")

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> list[int]:
        """Its token ids.

        Args:
            chat: write a text as a user's message, by the tokenizer's chat template. Messages always are, with the
                tools, the system prompt and the variables of the template that their row has.

        Raises:
            DataError: it has no tokens, its messages cannot be read, or the template refuses them or omits a part.
            ModelError: it needs a chat template, and the tokenizer has none.
        """
        turns: Any = [{"role": "user", "content": self.text}] if chat and self.messages is None else self.messages
        if turns is not None and not tokenizer.chat_template:
            asked = "messages" if self.messages is not None else "--chat"
            raise ModelError(
                f"{self.place}: {asked} needs a chat template, and the tokenizer of this model has none; write the "
                "whole prompt yourself, or put a chat_template.jinja beside the tokenizer"
            )
        try:
            if turns is None:
                check_prompt(self.row, chat=False)
                # Not verbose: how long a prompt may be is checked, and said, for the model.
                tokens = tokenizer(self.text, verbose=False)["input_ids"]
            else:
                tokens = chat_prompt(turns, self.row, tokenizer)
        except DataError as error:
            raise DataError(f"{self.place}: {error}") from error
        if not tokens:
            raise DataError(f"{self.place}: the prompt is empty; there is nothing to continue")
        return list(tokens)


def read_prompts(given: Sequence[str], file: Path | None) -> list[Prompt]:
    """All prompts: those of the command line, then those of the file.

    Args:
        file: ``.jsonl`` and ``.ndjson`` have one prompt a line, in ``prompt`` (a text) or ``messages`` (a chat); any
            other file is one prompt as a whole; ``-`` is standard input.

    Raises:
        DataError: there is none, or the file cannot be read as that.
    """
    prompts = [Prompt(f"--prompt number {number}", text, row={"prompt": text}) for number, text in enumerate(given, 1)]
    if file is not None:
        text = _read(file)
        if not text:
            what = "standard input is closed or empty" if str(file) == "-" else "the file is empty"
            raise DataError(f'--file {file}: {what}; give text in it, or --prompt "" to begin without one')
        if has_rows(file):
            rows = list(_rows(text, file))
            if not rows:
                raise DataError(f'--file {file} has no rows; give one prompt a line: {{"prompt": "..."}}')
            prompts += rows
        else:
            prompts.append(Prompt(f"--file {file}", text, row={"prompt": text}))
    if not prompts:
        raise DataError("nothing to continue: give --prompt TEXT, or --file with a text or a .jsonl of prompts")
    return prompts


def has_rows(file: Path) -> bool:
    """Whether a file of prompts has one a line."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def _read(file: Path) -> str:
    if str(file) == "-":
        return _standard_input()
    return "".join(text_lines(file, f"--file {file}", DataError))


def _standard_input() -> str:
    try:
        # A closed one is None, or was closed below Python.
        text = "" if sys.stdin is None else sys.stdin.read()
    except (OSError, ValueError) as error:
        raise DataError(f"--file -: standard input cannot be read: {first_line(error)}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"--file -: character {error.start} is not UTF-8; it must be text in UTF-8") from error
    return text.removeprefix("\ufeff")


def _rows(text: str, file: Path) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=keyed_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is no JSON: {first_line(error)}") from error
        yield _prompt(row, place)


def _prompt(row: Any, place: str) -> Prompt:
    if not isinstance(row, dict):
        raise DataError(f'{place}: expected an object such as {{"prompt": "..."}}, got {type(row).__name__}')
    if taken := [name for name in ANSWER if name in row]:
        raise DataError(f"{place} has a column {taken[0]} already, where the answer goes; rename it")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        letters = error.object[error.start : error.end]
        raise DataError(f"{place} holds half of a surrogate pair, {letters!a}, which is no text; remove it") from error
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        found = ", ".join(name for name, value in row.items() if value is not None) or "nothing"
        raise DataError(f"{place}: give either prompt (a text) or messages (a chat); it has {found}")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: prompt must be a text, got {type(text).__name__}")
    if messages is None:
        return Prompt(place, text, row=row)
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DataError(f'{place}: messages must be a list such as [{{"role": "user", "content": "..."}}]')
    return Prompt(place, messages=messages, row=row)
