"""A source of documents in a recipe, for training or evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from sparsetrain.counted import counted
from sparsetrain.section import MOST_BLOCKS, MOST_LISTED, Bounds, Section, Text, Tokens

ROOM = 2**17
"""Length in tokens that is sufficient for every synthetic document."""

_KEYS = Bounds(MOST_BLOCKS, "a document holds all of them")

_ROWS_OF_A_SET = Bounds(2**40, "no data set has more rows")

Name = Annotated[str, Field(min_length=1, max_length=256)]
TurnKey = Literal["role", "content", "tool_calls", "reasoning_content", "train"]
Role = Literal["system", "user", "assistant", "tool"]

# The columns of a source, and the forms that read each.
_COLUMNS = {
    "text_field": ("text",),
    "prompt_field": ("prompt_completion", "preference"),
    "completion_field": ("prompt_completion",),
    "separator": ("prompt_completion", "preference"),
    "messages_field": ("chat",),
    "chosen_field": ("preference",),
    "rejected_field": ("preference",),
}

_NAMES = ("columns", "turn_keys", "roles")
_ROWS = ("max_rows", "validation")


class DataSource(Section):
    """A source of documents. Give ``path`` (files, a folder, a Hub id, ``python-stdlib``) or ``synthetic``."""

    name: Text | None = None
    """Name in logs and errors; by default the path or the synthetic task."""
    path: Text | None = None
    """Local file, glob or folder (jsonl, json, parquet, arrow; txt, md, rst, py: one document a file), a Hub dataset
    id, or ``python-stdlib``."""
    synthetic: Literal["passkey", "multikey", "recall"] | None = None
    """A generated retrieval task: one hidden key; several of which one is asked for; or key and value tokens, all of
    which are asked for (associative recall, MQAR of 2312.04927)."""
    form: Literal["auto", "text", "prompt_completion", "chat", "tokens", "preference"] = "auto"
    """The form of rows. ``text``: plain text. ``prompt_completion``: loss on the completion. ``chat``: messages, with
    loss on the assistant's turns by the tokenizer's chat template. ``tokens``: pretokenised ``input_ids`` and
    ``labels``. ``preference``: pairs of a preferred and a rejected answer (with the ``preference`` section). ``auto``
    decides by the columns of the first row."""
    text_field: Text = "text"
    """Column that holds the text (form ``text``)."""
    prompt_field: Text = "prompt"
    """Column that holds the prompt (forms ``prompt_completion`` and ``preference``)."""
    completion_field: Text = "completion"
    """Column that holds the completion (form ``prompt_completion``)."""
    separator: Annotated[str, Field(max_length=4096)] = ""
    """Text between a prompt and its completion, which belongs to the prompt (forms ``prompt_completion`` and
    ``preference``)."""
    messages_field: Text = "messages"
    """Column that holds the list of ``{role, content}`` turns (form ``chat``)."""
    chosen_field: Text = "chosen"
    """Column that holds the preferred answer, or the conversation that ends with it (form ``preference``)."""
    rejected_field: Text = "rejected"
    """Column that holds the rejected answer, or the conversation that ends with it (form ``preference``)."""
    columns: Annotated[dict[Name, Name], Field(max_length=MOST_LISTED)] = {}
    """The meaning of columns that have other names: ours first, such as ``{instruction: task, output: reply}``."""
    turn_keys: Annotated[dict[TurnKey, Name], Field(max_length=MOST_LISTED)] = {}
    """The same for the keys of turns: ``{role: speaker, content: utterance}``."""
    roles: dict[Role, Name | Annotated[list[Name], Field(min_length=1, max_length=MOST_LISTED)]] = {}
    """The same for roles, one or several: ``{assistant: [Sage, Expert], user: Seeker}``."""
    ignore: list[str] = []
    """Columns and keys of turns to ignore although they have a meaning, such as ``[rejected]``. Otherwise a row with
    an unsupported column is refused."""
    subset: Text | None = None
    """Configuration name of a Hub dataset."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: Text = "train"
    """Split to read. ``python-stdlib`` has ``train`` and ``validation`` (every 20th file), local files have them where
    ``validation`` is given."""
    max_rows: Annotated[int, Field(gt=0), _ROWS_OF_A_SET] | None = None
    """Read only the first rows, at most so many."""
    validation: Annotated[Annotated[int, _ROWS_OF_A_SET] | float, Field(gt=0), _ROWS_OF_A_SET] | None = None
    """Hold out rows of local files: a fraction of them below 1 (``0.02``), or a number (``200``). ``split: train``
    reads the others, ``split: validation`` (as the source of an evaluation, with the same ``path``, ``max_rows`` and
    ``validation``) these. Which they are depends on the number of rows alone. A document is never in both."""
    weight: PositiveFloat = 1.0
    """Relative frequency with which this source is drawn. A draw is a document, or a part of ``sequence.length`` tokens
    of a longer one; for a streaming source, a whole document."""
    streaming: bool = False
    """Read rows as they are needed instead of tokenising the whole source first (and caching it)."""
    shuffle: bool = True
    """Draw documents in a seeded random order, a new one each epoch. A streaming source is read in order, and only
    the rows packed together are shuffled: 32 to 256 of them, the fewer the longer."""
    lengths: Annotated[list[Tokens], Field(max_length=MOST_LISTED)] = []
    """Synthetic tasks: document lengths in tokens, drawn uniformly; by default ``sequence.length``."""
    keys: Annotated[int, Field(gt=0), _KEYS] = 4
    """Synthetic ``multikey`` and ``recall``: number of keys in a document that may be asked for."""
    distractors: Annotated[int, Field(ge=0), _KEYS] = 0
    """Synthetic ``multikey`` and ``recall``: number of additional keys that are never asked for. If there are any, the
    keys that may be asked for are marked (``hint``)."""
    hint: Literal["mark", "question", "none"] = "mark"
    """Synthetic ``recall`` with ``distractors``: how a document says early which keys will be asked for. ``mark``: a
    mark in front of each. ``question``: the question at the beginning. ``none``: it is known only at the end."""
    digits: Annotated[int, Field(ge=1, le=12)] = 5
    """Synthetic ``passkey`` and ``multikey``: number of digits of a key."""

    @model_validator(mode="after")
    def _one_origin(self) -> DataSource:
        if (self.path is None) == (self.synthetic is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(f"a source has either a path or a synthetic task; {given} is given")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> DataSource:
        """Refuse a setting that this kind of source would not read."""
        kinds = {
            "sources with a path": (
                self.synthetic is None,
                ("form", *_COLUMNS, *_NAMES, "ignore", *_ROWS, "subset", "revision", "split", "streaming", "shuffle"),
            ),
            "synthetic sources": (self.synthetic is not None, ("lengths",)),
            "synthetic: passkey and multikey": (self.synthetic in ("passkey", "multikey"), ("digits",)),
            "synthetic: multikey and recall": (self.synthetic in ("multikey", "recall"), ("keys", "distractors")),
            "synthetic: recall with distractors": (self.synthetic == "recall" and self.distractors > 0, ("hint",)),
        } | {
            " and ".join(f"form: {form}" for form in forms): (
                self.form in ("auto", *forms),
                tuple(name for name in _COLUMNS if _COLUMNS[name] == forms),
            )
            for forms in set(_COLUMNS.values())
        }
        for kind, (holds, names) in kinds.items():
            for name in names:
                if not holds and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={getattr(self, name)} has no effect here: it belongs to {kind}")
        return self

    @model_validator(mode="after")
    def _one_name_each(self) -> DataSource:
        for setting in _NAMES:
            values = getattr(self, setting).values()
            names = [name for value in values for name in ([value] if isinstance(value, str) else value)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{setting} gives {twice[0]!r} two meanings")
        return self

    @field_validator("validation")
    @classmethod
    def _fraction_or_number(cls, value: float | None) -> float | None:
        if not isinstance(value, float) or value < 1:
            return value
        if value == 1 or value != int(value):
            raise ValueError(
                f"{value} is neither a fraction of the rows, which is below 1, nor a whole number of them; write "
                f"{int(value)} for {counted(int(value), 'row')}, or a fraction such as 0.02"
            )
        return int(value)

    @model_validator(mode="after")
    def _rows_to_hold_out(self) -> DataSource:
        if self.validation is None:
            return self
        if self.streaming:
            raise ValueError(
                "validation needs the number of rows, which a streaming source does not know; set streaming: false, or "
                "keep the rows for evaluation in a file of their own"
            )
        if self.split not in ("train", "validation"):
            raise ValueError(
                f"split={self.split}: validation={self.validation:g} makes the splits train and validation"
            )
        return self

    def held_out_of(self, rows: int) -> int:
        """The rows that ``validation`` holds out of so many."""
        assert self.validation is not None
        return round(self.validation * rows) if self.validation < 1 else int(self.validation)

    @property
    def label(self) -> str:
        """The name used in logs and errors."""
        return self.name or self.path or str(self.synthetic)
