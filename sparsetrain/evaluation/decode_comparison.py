"""Decode settings beside one another: as published, and each with as many bytes read as the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.decode_answers import Answerer, Measured
from sparsetrain.evaluation.decode_settings import Asked, Setting, chosen_settings, settings
from sparsetrain.generation.measured import MeasuredMemory, WindowMemory
from sparsetrain.generation.settings import Decode

FITTED = 8
"""Documents on which a setting is fitted to a budget. Only the bytes that it reads there are looked at."""
DENSE = "dense"
UNFIT = ("accuracy", "standard_error", "error", "mass", "output_length", "ended", "length_right", "length_wrong")
"""What is not said of a setting that does not fit."""


class DecodeRow(BaseModel):
    """What one setting reads and loses."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    budget: float | None = None
    """Share of the bytes of full attention that the setting may read; None as published."""
    section: dict[str, Any]
    """The decode section; empty where another model reads what its attention reads."""
    fits: bool = True
    """Whether the setting can read so little. Otherwise nothing but its least share was measured."""
    bytes_share: float
    """Bytes read over those of full attention."""
    bytes: float
    """Bytes that a layer reads for a token, in the mean over steps and layers."""
    keys_share: float
    """Keys read by a KV head over all keys."""
    accuracy: float | None = None
    standard_error: float | None = None
    """Of the accuracy, over documents."""
    documents: int = 0
    error: float | None = None
    """Norm of the output's error of a layer over the norm of its output, in the mean over steps, heads and layers; None
    of another model, whose layers have nothing to be compared with."""
    error_by_layer: dict[int, float] = {}
    mass: float | None = None
    """True softmax weight of the keys that are read, in the mean."""
    output_length: float | None = None
    """Tokens written from the answer on, in the mean; None where a document has several answers."""
    ended: float | None = None
    """Share of the answers that the model ended, likewise."""
    length_right: float | None = None
    """As ``output_length``, of the right answers that the model ended; None where there are none."""
    length_wrong: float | None = None
    """The same of the wrong ones."""


def compare(
    answerer: Answerer,
    *,
    budgets: Sequence[float],
    dense_layers: list[int],
    asked: Sequence[Asked] = (),
    beside: Mapping[str, Callable[[], Answerer]] | None = None,
    on_row: Callable[[DecodeRow], None] = lambda row: None,
    on_batch: Callable[[int], None] = lambda documents: None,
) -> list[DecodeRow]:
    """A row for full attention, for each published setting, and for each setting at each budget.

    A setting is fitted to a budget by the one number that says how much it reads: the largest with which it reads no
    more, on the first documents.

    Args:
        budgets: shares of the bytes that full attention reads, each in (0, 1).
        dense_layers: layers that read everything, and are not measured.
        asked: the settings; none means all. One with fields of its own is measured as it is, at no budget.
        beside: other models by the name of their row, made one after the other. They read what their attention reads.
        on_row: called with each row.
        on_batch: called with the documents of each batch that is answered.

    Raises:
        ModelError: the model has no layer with full attention that could read less, or too little memory.
    """
    tokens = answerer.longest
    known = settings(tokens, dense_layers, answerer.width)
    window = next(each for each in known if each.memory is WindowMemory)
    known = chosen_settings(asked, known)
    rows: list[DecodeRow] = []

    def add(row: DecodeRow) -> None:
        rows.append(row)
        on_row(row)

    def measure(name: str, decode: Decode, memory: type[MeasuredMemory], budget: float | None = None) -> None:
        add(_row(name, budget, decode, answerer.answer(decode, memory, on_batch=on_batch)))

    measure(DENSE, window.decode(tokens), WindowMemory)
    for setting in known:
        if setting.published:
            measure(setting.name, setting.decode(), setting.memory)
    for name, make in (beside or {}).items():
        add(_row(name, None, None, make().answer(None, None, on_batch=on_batch)))
    fitter = _Fitter(answerer)
    for budget in sorted(budgets):
        for setting in (each for each in known if each.fitted):
            least = setting.values(tokens)[0]
            if fitter.share(setting, least) <= budget:
                value = fitter.fit(setting, setting.values(tokens), budget)
                measure(setting.name, setting.decode(value), setting.memory, budget)
            else:
                row = _row(setting.name, budget, setting.decode(least), fitter.read(setting, least))
                add(row.model_copy(update=dict.fromkeys(UNFIT) | {"fits": False, "error_by_layer": {}}))
    return rows


class _Fitter:
    """Finds the number with which a setting reads no more than a budget."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._known: dict[tuple[str, Any], Measured] = {}

    def read(self, setting: Setting, value: Any) -> Measured:
        """What a setting reads with some number."""
        if (setting.name, value) not in self._known:
            measured = self._answerer.answer(setting.decode(value), setting.memory, first=FITTED)
            self._known[setting.name, value] = measured
        return self._known[setting.name, value]

    def share(self, setting: Setting, value: Any) -> float:
        """The same over what full attention reads."""
        measured = self.read(setting, value)
        return measured.mean("bytes") / measured.mean("dense_bytes")

    def fit(self, setting: Setting, values: Sequence[Any], budget: float) -> Any:
        """The largest of some ascending numbers with which the setting reads no more; the first one does not."""
        within, beyond = 0, len(values)
        while beyond - within > 1:
            middle = (within + beyond) // 2
            if self.share(setting, values[middle]) <= budget:
                within = middle
            else:
                beyond = middle
        return values[within]


def _row(name: str, budget: float | None, decode: Decode | None, measured: Measured) -> DecodeRow:
    documents, compared = len(measured.found), decode is not None
    return DecodeRow(
        name=name,
        budget=budget,
        section={} if decode is None else decode.model_dump(mode="json", exclude_none=True),
        bytes_share=measured.mean("bytes") / measured.mean("dense_bytes"),
        bytes=measured.mean("bytes"),
        keys_share=measured.mean("keys") / measured.mean("length"),
        accuracy=statistics.fmean(measured.found),
        standard_error=statistics.stdev(measured.found) / documents**0.5 if documents > 1 else None,
        documents=documents,
        error=measured.mean("error") if compared else None,
        error_by_layer={layer: measured.mean("error", layer) for layer in measured.layers} if compared else {},
        mass=measured.mean("mass") if compared else None,
        output_length=statistics.fmean(measured.lengths) if measured.lengths else None,
        ended=statistics.fmean(measured.ended) if measured.lengths else None,
        length_right=measured.ended_length(right=True) if measured.lengths else None,
        length_wrong=measured.ended_length(right=False) if measured.lengths else None,
    )
