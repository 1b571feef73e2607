"""The registry of evaluation tasks. A new one of ours is a file in ``tasks/`` and a line here.

The schema of a recipe needs their sections, and what they measure with stands above recipes. So they are named
here, and imported when one is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any, cast

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.base import TaskResult, TaskSection
from sparsetrain.installed import Installed

PLACES = {
    "multi_turn": "sparsetrain.evaluation.tasks.multi_turn:MultiTurnSection",
    "perplexity": "sparsetrain.evaluation.tasks.perplexity:PerplexitySection",
    "passkey": "sparsetrain.evaluation.tasks.passkey:PasskeySection",
    "recall": "sparsetrain.evaluation.tasks.recall:RecallSection",
    "preference": "sparsetrain.evaluation.tasks.preference:PreferenceSection",
    "reasoning": "sparsetrain.evaluation.tasks.reasoning:ReasoningSection",
    "ruler": "sparsetrain.evaluation.tasks.ruler:RulerSection",
    "key_tokens": "sparsetrain.evaluation.tasks.key_tokens:KeyTokensSection",
    "receptive_field": "sparsetrain.evaluation.tasks.receptive_field:ReceptiveFieldSection",
    "attention_error": "sparsetrain.evaluation.tasks.attention_error:AttentionErrorSection",
}
"""Module and class of each task's section by its name."""


INSTALLED: Installed[TaskSection] = Installed(
    "sparsetrain.tasks", TaskSection, key="task", setting="task", noun="an evaluation task", error=RecipeError
)
"""Tasks of other installed packages."""


class _Tasks(MutableMapping[str, type[TaskSection]]):
    """The section of each task by name, imported when it is asked for.

    Asking for one whose package cannot be used raises a RecipeError.
    """

    def __init__(self) -> None:
        self._added: dict[str, type[TaskSection]] = {}

    def __getitem__(self, name: str) -> type[TaskSection]:
        if name in self._added:
            return self._added[name]
        if name in INSTALLED.entries:
            return INSTALLED.load(name, tuple(PLACES))
        module, _, section = PLACES[name].partition(":")
        return cast(type[TaskSection], getattr(import_module(module), section))

    def __setitem__(self, name: str, section: type[TaskSection]) -> None:
        self._added[name] = section

    def __delitem__(self, name: str) -> None:
        del self._added[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**PLACES, **INSTALLED.entries, **self._added})

    def __len__(self) -> int:
        return len(tuple(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in tuple(iter(self))

    def usable(self, names: Iterable[Any] | None = None) -> list[type[TaskSection]]:
        """The sections of these names, by default of all, without those that there are not or that cannot be used."""
        found = []
        for name in self if names is None else names:
            with suppress(RecipeError):
                found += [self[name]] if name in self else []
        return found


TASKS = _Tasks()
"""The section of each task by name. More can be put in, as a test does."""


class _ByTask:
    """Validates a mapping by the class that its ``task`` names: a section, or the result of that section."""

    base: type[BaseModel] = TaskSection
    strict = True
    """Types are strict, as in the rest of a recipe: ``"30"`` is not a number."""

    @staticmethod
    def choice(section: type[TaskSection]) -> type[BaseModel]:
        """The class that belongs to a section."""
        return section

    @classmethod
    def validate(cls, value: Any, info: core_schema.ValidationInfo) -> Any:
        """The mapping as an object; objects stay."""
        if isinstance(value, cls.base):
            return value
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        if "task" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'task'"})
        task = value["task"]
        if not isinstance(task, str) or task not in TASKS:
            expected = ", ".join(repr(name) for name in TASKS)
            known = {"discriminator": "'task'", "tag": str(task), "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", known)
        try:
            chosen = cls.choice(TASKS[task])
        except RecipeError as error:
            raise PydanticCustomError("section_unusable", "{fault}", {"fault": str(error), "key": "task"}) from None
        if info.mode == "json":
            return chosen.model_validate_json(json.dumps(value), strict=cls.strict)
        return chosen.model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(cls.validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: dict[Any, CoreSchema] = {
            section.model_fields["task"].default: cls.choice(section).__pydantic_core_schema__
            for section in TASKS.usable()
        }
        return handler(core_schema.tagged_union_schema(choices, discriminator="task"))


class _ResultByTask(_ByTask):
    base = TaskResult
    strict = False  # "Infinity" is one

    @staticmethod
    def choice(section: type[TaskSection]) -> type[BaseModel]:
        return section.result


AnyTask = Annotated[TaskSection, _ByTask]
"""An entry of ``eval.tasks``; its field ``task`` selects the class."""

AnyResult = Annotated[TaskResult, _ResultByTask]
"""The result of a task; its field ``task`` selects the class."""
