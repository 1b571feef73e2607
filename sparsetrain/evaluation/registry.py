"""The evaluation tasks there are. A new one is a file in ``tasks/`` and a line here.

The schema of a recipe needs their sections, and what they measure with stands above recipes. So they are named
here, and imported when one is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Annotated, Any, cast

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from sparsetrain.evaluation.base import TaskResult, TaskSection

PLACES = {
    "perplexity": "sparsetrain.evaluation.tasks.perplexity:PerplexitySection",
    "passkey": "sparsetrain.evaluation.tasks.passkey:PasskeySection",
    "recall": "sparsetrain.evaluation.tasks.recall:RecallSection",
}
"""Module and class of each task's section by its name."""


class _Tasks(MutableMapping[str, type[TaskSection]]):
    """The section of each task by name, imported when it is asked for."""

    def __init__(self) -> None:
        self._added: dict[str, type[TaskSection]] = {}

    def __getitem__(self, name: str) -> type[TaskSection]:
        if name in self._added:
            return self._added[name]
        module, _, section = PLACES[name].partition(":")
        return cast(type[TaskSection], getattr(import_module(module), section))

    def __setitem__(self, name: str, section: type[TaskSection]) -> None:
        self._added[name] = section

    def __delitem__(self, name: str) -> None:
        del self._added[name]

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES | self._added)

    def __len__(self) -> int:
        return len(PLACES | self._added)


TASKS = _Tasks()
"""The section of each task by name. More can be put in, as a test does."""


class _ByTask:
    """Validates a mapping by the class that its ``task`` names: a section, or the result of that section."""

    strict = True
    """JSON is taken as the rest of a recipe: ``"30"`` is no number."""

    @staticmethod
    def choices() -> Mapping[str, type[BaseModel]]:
        """The classes by task."""
        return TASKS

    @classmethod
    def validate(cls, value: Any, info: core_schema.ValidationInfo) -> Any:
        """The mapping as an object; objects stay."""
        choices = cls.choices()
        if isinstance(value, tuple(choices.values())):
            return value
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        if "task" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'task'"})
        task = value["task"]
        if not isinstance(task, str) or task not in choices:
            expected = ", ".join(repr(name) for name in choices)
            known = {"discriminator": "'task'", "tag": str(task), "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", known)
        if info.mode == "json":
            return choices[task].model_validate_json(json.dumps(value), strict=cls.strict)
        return choices[task].model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(cls.validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: dict[Any, CoreSchema] = {
            name: choice.__pydantic_core_schema__ for name, choice in cls.choices().items()
        }
        return handler(core_schema.tagged_union_schema(choices, discriminator="task"))


class _ResultByTask(_ByTask):
    strict = False  # "Infinity" is one

    @staticmethod
    def choices() -> Mapping[str, type[BaseModel]]:
        return {name: section.result for name, section in TASKS.items()}


AnyTask = Annotated[TaskSection, _ByTask]
"""An entry of ``eval.tasks``: the field ``task`` decides which section it is."""

AnyResult = Annotated[TaskResult, _ResultByTask]
"""What a task measured: the field ``task`` decides what that is."""
