"""What to do with rows that fit no form: the setting that reads them, or how to write them anew."""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.nearest import did_you_mean

QUESTIONS, ANSWERS = ("instruction", "question", "query", "problem"), ("output", "response", "answer", "solution")
"""Columns that together are Alpaca's form."""
_PAIRS = (
    *(("prompt", answer) for answer in (*ANSWERS, "canonical_solution")),
    *(("input", "output"), ("input", "response"), ("inputs", "targets"), ("source", "target"), ("user", "assistant")),
    *(("instruction", "completion"), ("question", "completion"), ("human", "bot"), ("document", "summary")),
    ("inputs_pretokenized", "targets_pretokenized"),
)
_TURNS = ("dialogue", "dialog", "turns", "items", "chat")
_TEXTS = ("content", "document", "raw_content", "body")
_ANEW = (
    (
        {"instruction", "instances"},
        "each of its instances is an input with its output (self-instruct); write each as a row of its own: "
        "{instruction, input, output}",
    ),
    (
        {"question_id", "turns"},
        "its turns are questions without answers (MT-Bench), so there is nothing to learn; write messages, a list of "
        "{role: user or assistant, content: ...}, with the answers that are to be learned",
    ),
    (
        {"tools", "answers"},
        "its answers are calls (xLAM); write messages: the question as {role: user, content: ...}, and the answers as "
        "{role: assistant, tool_calls: [{name, arguments}, ...]}; tools is read as it is",
    ),
    (
        {"question", "answers"},
        "answers holds several answers to a question (SQuAD); write the one that is to be learned into a column answer",
    ),
    (
        {"conversation_a", "conversation_b"},
        "it compares two conversations; write the better one as messages, or both as chosen and rejected for a recipe "
        "with a preference section",
    ),
)
"""Columns that tell a published set, and what is said of it."""


def advice(columns: Sequence[str]) -> str:
    """How rows with these columns, which fit no form, can be read; goes on behind a statement that they fit none."""
    for known, anew in _ANEW:
        if known <= set(columns):
            return f": {anew}"
    return (
        f"{_hint(columns)}. Set form, and text_field, prompt_field and completion_field, or messages_field, to say how "
        "a row becomes tokens"
    )


def _hint(columns: Sequence[str]) -> str:
    """A hint at the intended columns, based on names in published data sets."""
    for prompt, completion in _PAIRS:
        if prompt in columns and completion in columns:
            given = f"prompt_field: {prompt}, " if prompt != "prompt" else ""
            return f" (did you mean {given}completion_field: {completion}?)"
    for field, names in (("messages_field", _TURNS), ("text_field", _TEXTS)):
        if named := [column for column in columns if column in names]:
            return f" (did you mean {field}: {named[0]}?)"
    return did_you_mean("text", columns, " ({})", write=lambda near: f"text_field: {near}", cutoff=0.75)
