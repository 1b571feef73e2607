"""The choice of the next token: greedy or sampled, by the user's settings or the model's ``generation_config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sparsetrain.errors import ModelError
from sparsetrain.section import Section

if TYPE_CHECKING:
    from transformers import GenerationConfig

DRAWS = ("top_k", "top_p", "min_p")
"""Settings that only mean something where tokens are drawn."""


class Sampling(Section):
    """Settings of one token's choice. What is None is the model's own."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Draw from the k likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Above 1: make tokens that were there before less likely."""

    def arguments(self, own: GenerationConfig) -> dict[str, Any]:
        """The arguments of ``model.generate``.

        Args:
            own: the model's generation config.

        Raises:
            ModelError: temperature 0 together with a setting of drawn tokens.
        """
        given = self.model_dump(exclude_none=True)
        draws = [name for name in DRAWS if name in given]
        if self.temperature == 0 and draws:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in draws)
            raise ModelError(f"--temperature 0 takes the likeliest token, so {flags} would have no effect; drop one")
        if self.temperature is None and not draws:
            return given
        if self.temperature == 0:
            del given["temperature"]
            # None: the model's own values would be told off as being of no use.
            return given | {"do_sample": False, "temperature": None, **dict.fromkeys(DRAWS)}
        return given | {"do_sample": True}

    def describe(self, own: GenerationConfig) -> str:
        """The choice in words, such as ``sampling (temperature 0.7, top_p 0.9)``."""
        merged = {**own.to_dict(), **self.arguments(own)}
        if not merged.get("do_sample"):
            return "greedy"
        names = ("temperature", *DRAWS)
        shown = [f"{name} {merged[name]:g}" for name in names if merged.get(name) is not None]
        return f"sampling ({', '.join(shown)})" if shown else "sampling"
