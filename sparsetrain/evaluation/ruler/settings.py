"""What a recipe says of RULER."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from sparsetrain.evaluation.generative.settings import GenerativeSection
from sparsetrain.evaluation.ruler.specs import NEEDLES, RulerTask
from sparsetrain.section import Bounds, Section, Text

FILES = {"qa_1": "squad", "qa_2": "hotpot"}
"""Tasks that need questions, and the field that names them."""
USERS = {
    "haystack": [task for task, needles in NEEDLES.items() if needles.haystack == "essay"],
    "words": [task for task, needles in NEEDLES.items() if needles.key == "word"] + ["cwe"],
    **{name: [task] for task, name in FILES.items()},
}
"""Fields that name a file or folder, and the tasks that it is for."""

SEVERAL = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "qa_1", "qa_2")
"""Tasks whose texts answer several questions."""


class QuestionSource(Section):
    """Questions from a data set that ``datasets`` reads, in the columns that it has on the Hub."""

    path: Text
    """A Hub id, such as ``rajpurkar/squad``, or local files of rows (jsonl, parquet, arrow)."""
    subset: Text | None = None
    """Configuration name of a Hub dataset, such as ``distractor``."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: Text | None = None
    """Split of a Hub dataset; null is ``validation``."""


class RulerSettings(GenerativeSection):
    """The settings of the task ``ruler``."""

    tasks: Annotated[list[RulerTask], Field(min_length=1)] | None = None
    """What is measured of RULER; null is all 13, without ``qa_1`` and ``qa_2`` where their files are not given."""
    samples: Annotated[int, Field(gt=0), Bounds(10_000, "each is a prompt of its own, of every task and length")] = 25
    """Prompts of each task and length; 500 in the paper."""
    questions: Annotated[int, Field(gt=0), Bounds(100, "each is asked of a copy of the text's cache")] = 1
    """Questions about each text at most, which is read once for all. ``niah_multikey_1``, ``niah_multikey_2``,
    ``niah_multikey_3``, ``qa_1`` and ``qa_2`` have more than one to ask, as many as their texts answer."""
    mirror: bool = False
    """Draw prompts as NVIDIA's scripts do, with seed 42 and one generator for all samples of a task and length. By
    default each sample has a seed of its own, so that it does not depend on their number, and answers are not in the
    same place of every sample."""
    haystack: Text | None = None
    """A text file in which the five tasks with an essay hide needles, between sentences. A sentence ends at ``.``,
    ``!`` or ``?`` before a space. Null is a generated text."""
    words: Text | None = None
    """A folder with ``nounlist.txt``, ``adjectivelist.txt`` and ``verblist.txt``, a word a line, for keys and lists;
    null makes words up."""
    squad: Text | QuestionSource | None = None
    """For ``qa_1``: a JSON file in SQuAD's format, or a data set with its columns: ``{path: rajpurkar/squad}``."""
    hotpot: Text | QuestionSource | None = None
    """For ``qa_2``: a JSON file in HotpotQA's format, or a data set with its columns: ``{path: hotpotqa/hotpot_qa,
    subset: distractor}``."""

    @property
    def measured(self) -> list[str]:
        """The tasks that are measured, in RULER's order."""
        chosen = get_args(RulerTask) if self.tasks is None else self.tasks
        return [task for task in get_args(RulerTask) if task in chosen and task not in self.left_out]

    @property
    def left_out(self) -> dict[str, str]:
        """Tasks that are not measured although ``tasks`` is null, and why."""
        missing = {task: f"no {name} file is given" for task, name in FILES.items() if getattr(self, name) is None}
        return missing if self.tasks is None else {}

    def faults(self) -> Iterator[tuple[str, str]]:
        """Files that are needed and not given, or given and not needed."""
        yield from super().faults()
        yield from self.repeated("tasks")
        for task, name in FILES.items():
            if getattr(self, name) is None and task in (self.tasks or ()):
                needed = "a JSON file or a data set"
                yield "tasks", f"{task} needs {self.path(name)}, {needed}; give it, or leave {task} out"
        if self.questions > 1 and self.mirror:
            yield "questions", "NVIDIA's scripts ask one question of a text; leave it out, or set mirror: false"
        if self.questions > 1 and not {*SEVERAL} & {*self.measured}:
            yield "questions", f"has no effect here: only {', '.join(SEVERAL)} have several questions to ask"
        for name, users in USERS.items():
            if getattr(self, name) is not None and not set(users) & set(self.measured):
                yield name, f"has no effect here: none of {self.path('tasks')} needs it ({', '.join(users)})"

    def files(self) -> list[Path]:
        """The user's files."""
        words = self.place("words")
        named = [self.place(name) for name in USERS if isinstance(getattr(self, name), str) and name != "words"]
        return [path for path in named if path is not None] + ([] if words is None else sorted(words.glob("*.txt")))
