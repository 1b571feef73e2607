"""The base of every recipe section: unknown keys are errors, attribute docstrings become field descriptions, and
numbers have bounds that say why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Section(BaseModel):
    """A strict, immutable group of settings.

    ``extra="forbid"`` turns a misspelt key into an error, and the docstring under each field is its description in the
    JSON Schema, in ``sparsetrain recipe show`` and in the documentation.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class Bounds:
    """The valid range of a number, with a reason for the error message."""

    most: float
    why: str
    least: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        least = {} if self.least is None else {"minimum": self.least}
        return {**handler(schema), **least, "maximum": self.most}

    def check(self, value: float) -> float:
        """The value itself.

        Raises:
            ValueError: it is outside.
        """
        if value > self.most:
            raise ValueError(f"expected a number of at most {self.most:,}, got {value}: {self.why}")
        if self.least is not None and value < self.least:
            raise ValueError(f"expected a number of at least {self.least:g}, got {value}: {self.why}")
        return value


Text = Annotated[str, Field(min_length=1, max_length=4096)]
"""A name, a path or an id."""

Changes = Annotated[
    dict[str, Any],
    BeforeValidator(lambda given: {} if given is None else given, json_schema_input_type=dict[str, Any] | None),
]
"""Settings that change others; null is none, which drops those of a base, whose mappings merge."""

MOST_LISTED = 1000
"""Maximum entries of a list: sources, lengths, tasks."""

MOST_TOKENS = 2**27
"""The longest row, document or context: 134 million tokens."""

MOST_BLOCKS = 2**20
"""Blocks of a row: a static pattern has a list for each."""

MOST_STEPS = 10**9

_ROW = Bounds(MOST_TOKENS, "kernels count the elements of a row in 32 bits")
Tokens = Annotated[int, Field(gt=0), _ROW]
"""A number of tokens of one row."""

TokensOrNone = Annotated[int, Field(ge=0), _ROW]

_LISTS = Bounds(MOST_BLOCKS, "no row has more blocks")
Blocks = Annotated[int, Field(gt=0), _LISTS]
"""A number of blocks, or a distance between them."""

BlocksOrNone = Annotated[int, Field(ge=0), _LISTS]

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A fraction below 1."""

Steps = Annotated[int, Field(gt=0), Bounds(MOST_STEPS, "no run has more steps")]
"""A number of optimizer steps."""
