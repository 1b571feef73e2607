"""The base of every recipe section: unknown keys are errors, and attribute docstrings become field descriptions."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A strict, immutable group of settings.

    ``extra="forbid"`` turns a misspelt key into an error, and the docstring under each field is its description in the
    JSON Schema, in ``sparsetrain recipe show`` and in the documentation.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
