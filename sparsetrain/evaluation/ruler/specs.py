"""The 13 tasks of RULER with NVIDIA's settings (2404.06654, appendix B), and their scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["number", "word", "uuid"]


@dataclass(frozen=True)
class Needles:
    """A needle-in-a-haystack task."""

    haystack: Haystack
    """One sentence repeated, an essay, or needles that are not asked for."""
    key: Kind
    value: Kind
    keys: int = 1
    """Keys hidden."""
    values: int = 1
    """Values of each key."""
    queries: int = 1
    """Keys asked for."""


NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles("noise", "word", "number"),
    "niah_single_2": Needles("essay", "word", "number"),
    "niah_single_3": Needles("essay", "word", "uuid"),
    "niah_multikey_1": Needles("essay", "word", "number", keys=4),
    "niah_multikey_2": Needles("needle", "word", "number"),
    "niah_multikey_3": Needles("needle", "uuid", "uuid"),
    "niah_multivalue": Needles("essay", "word", "number", values=4),
    "niah_multiquery": Needles("essay", "word", "number", keys=4, queries=4),
}

BUDGETS: dict[str, int] = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
"""Tokens that a model writes at most. They are part of the length."""

ANSWERS: dict[str, int] = {
    **{name: each.queries * each.values for name, each in NEEDLES.items()},
    **{"vt": 5, "cwe": 10, "fwe": 3, "qa_1": 1, "qa_2": 1},
}
"""Answers asked for in a prompt."""

ANY_REFERENCE = ("qa_1", "qa_2")
"""Tasks whose references are paraphrases of one answer."""

LLAMA_2_7B_AT_4K = 85.6
"""The paper's threshold: the mean of Llama-2-7B-chat at 4,096 tokens (section 4)."""

_CONTROL = re.compile(r"[\x00-\x1f]")


def answers_found(task: str, text: str, references: Sequence[str]) -> int:
    """Answers that a text has, of :data:`ANSWERS`: a reference counts where the text contains it, in any case.

    NVIDIA's ``string_match_all`` is the mean of this number over the answers, ``string_match_part`` this number.
    """
    said = _CONTROL.sub("\n", text.strip()).strip().lower()
    found = [reference.lower() in said for reference in references]
    return int(any(found)) if task in ANY_REFERENCE else sum(found)
