"""Schemas of the positions in the training data that checkpoints store."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsetrain.section import Section

Count = Annotated[int, Field(ge=0, lt=2**62)]
P = TypeVar("P", bound=BaseModel)


class _Strict(Section):
    model_config = ConfigDict(strict=True)


class Position(_Strict):
    """The position of a :class:`~sparsetrain.data.stream.RowStream`."""

    mixture: dict[str, Any]
    """The settings that determine which rows the position refers to."""
    rows: Count
    """Rows returned before the current packing window."""
    row: Count
    """Rows returned from the current packing window."""
    draws: Count
    """Draws from the mixture before the current packing window."""
    mapped_draws: Count
    """Draws from mapped sources."""
    sources: list[dict[str, Any]]
    """The position of each source."""

    def check(self, sources: int) -> None:
        """Compare the numbers with one another.

        Raises:
            ValueError: they do not fit, or it is one of other sources.
        """
        if len(self.sources) != sources:
            raise ValueError(f"the data position has {len(self.sources)} sources, and the recipe {sources}")
        if self.mapped_draws > self.draws:
            raise ValueError("the data position counts more of a part than of the whole")
        drawn = [source.get("drawn") for source in self.sources]
        counted = [number for number in drawn if isinstance(number, int)]
        if sum(counted) > self.draws or (len(counted) == sources and sum(counted) != self.draws):
            raise ValueError(f"{sum(counted)} draws from the sources of the data position, and {self.draws} in all")


class Drawn(_Strict):
    """The position of a mapped or synthetic source."""

    drawn: Count


class Streamed(_Strict):
    """The position of a streaming source."""

    passes: Count
    row: Count
    documents: Count
    malformed: Count
    dataset: dict[str, Any] | None


def read_position(state: Any, schema: type[P]) -> P:
    """A position that was saved.

    Raises:
        ValueError: it holds something else; the message says what, where.
    """
    try:
        return schema.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(("data", *map(str, first["loc"])))
        raise ValueError(f"{place}={first['input']!r:.60}: {first['msg'][:200]}") from None
