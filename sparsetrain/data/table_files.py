"""In which local table a row of a source is: ``datasets`` numbers the rows of all its files together."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from sparsetrain.data.row_choice import kept_rows
from sparsetrain.data.shards import count_rows

if TYPE_CHECKING:
    from sparsetrain.source_section import DataSource


@dataclass
class TableFiles:
    """The files of a source, in the order of its rows. They are counted when the first row is named."""

    source: DataSource
    kind: Literal["parquet", "arrow"]
    files: list[str]

    def place(self, index: int) -> str:
        """``FILE, row NUMBER`` of a row by its number among those that the source reads."""
        index = index if self._kept is None else int(self._kept[index])
        file = bisect_right(self._starts, index) - 1
        return f"{self.files[file]}, row {index - self._starts[file]}"

    @cached_property
    def _starts(self) -> list[int]:
        """The number of the first row of each file, and that of all rows."""
        return list(accumulate((count_rows(self.kind, file) for file in self.files), initial=0))

    @cached_property
    def _kept(self) -> Any:
        total = self._starts[-1]
        return kept_rows(self.source, total if self.source.max_rows is None else min(total, self.source.max_rows))
