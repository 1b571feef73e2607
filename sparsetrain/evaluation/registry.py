"""The evaluation tasks there are. A new one is a file in ``tasks/`` and a line here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from sparsetrain.evaluation.base import TaskResult, TaskSection
from sparsetrain.evaluation.tasks.passkey import PasskeySection
from sparsetrain.evaluation.tasks.perplexity import PerplexitySection
from sparsetrain.evaluation.tasks.recall import RecallSection

TASKS: dict[str, type[TaskSection]] = {
    "perplexity": PerplexitySection,
    "passkey": PasskeySection,
    "recall": RecallSection,
}
"""The section of each task by name."""


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
