"""Measures the rows of ``sparsetrain eval``: a model with each attention method and each decode setting."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from sparsetrain.durable import write_whole
from sparsetrain.errors import ModelError
from sparsetrain.evaluation.base import Task, TaskResult, without_steps
from sparsetrain.evaluation.fingerprint import describe, weights_digest
from sparsetrain.evaluation.journal import Journal
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.row_model import put, recorded, recorded_section
from sparsetrain.evaluation.runner import evaluate, told_work
from sparsetrain.inference.models import MODEL, Source
from sparsetrain.modeling import check_learned_positions, set_decode
from sparsetrain.modeling.layers import attention_density
from sparsetrain.modeling.outline import outline
from sparsetrain.modeling.positions import position_limit
from sparsetrain.recipe.rows import DENSE, Attention, Decoding, Row
from sparsetrain.time_left import counting

if TYPE_CHECKING:
    from sparsetrain.recipe.schema import EvalSection
    from sparsetrain.world import World


@dataclass(frozen=True)
class Labelled:
    """A row, by the name that it has beside the others of this model."""

    label: str
    attention: Attention
    decoding: Decoding


@dataclass(frozen=True)
class Evaluation:
    """The rows of a model, and what is measured of each.

    Args:
        inputs: of the section's tasks, made with its seed; the same for all rows.
        output: the file that has the rows which are done; None keeps nothing.
        fresh: do not use finished samples of an earlier call.
    """

    source: Source
    section: EvalSection
    seed: int
    inputs: Mapping[str, Task]
    dtype: torch.dtype | None
    output: Path | None
    fresh: bool

    def labelled(self, asked: Sequence[Row]) -> list[Labelled]:
        """The rows, tried on the model without its weights.

        Raises:
            ModelError: the model cannot take one of them, no task would be different, or two are one.
        """
        tasks = self.section.tasks
        if not all(row.decoding.recorded for row in asked) and not any(task.writes for task in tasks):
            raise ModelError(f"--decode has no effect on {without_steps(tasks)}; add a task that writes: ruler")
        for task in tasks if any(not row.decoding.recorded for row in asked) else ():
            if task.instead_of_decode:
                _note(f"{task.label} is the same in all rows of --decode: {task.instead_of_decode}")
        self._note_positions()
        rows: list[Labelled] = []
        for row in asked:
            tried: Any = outline(self.source.path, MODEL)
            with torch.device("meta"):
                put(tried, row.attention, row.decoding)
            for task in self.section.tasks:
                task.check_model(tried)
            named = row.attention.label
            if row.attention.config is None:
                method = recorded(tried)["attention"]["method"]
                named = DENSE if method == "full" else f"{named} ({method})"
            if not any(each.attention == row.attention for each in rows):
                self._note_all_read(named, tried)
            label = named if row.decoding.recorded else f"{named}, {row.decoding.label}"
            if any(each.label == label for each in rows):
                raise ModelError("--attention trained is dense: this model attends fully; drop one of the two")
            rows.append(Labelled(label, row.attention, row.decoding))
        return rows

    def told(self, rows: Sequence[Labelled], world: World, recipe: str | None) -> str:
        """How much is measured.

        Args:
            recipe: that alone says what.
        """
        rows_told = f", for each of {len(rows)} rows" if len(rows) > 1 else ""
        asked = "" if recipe is None else f"; {recipe} asks for them, --tasks NAME for some of them"
        return f"{told_work(self.inputs, world.size)}{rows_told}{asked}"

    def measure(self, rows: Sequence[Labelled], world: World, results: dict[str, EvalResult]) -> None:
        """Put the result of each row into ``results`` by its label, as soon as it is done; the file has the same."""
        about: dict[str, Any] = {}
        # A method that is replaced loses its weights, so each has a model of its own.
        for attention, group in groupby(rows, key=lambda row: row.attention):
            model = self._load(attention, world)
            weights, own = weights_digest(model, world), recorded_section(model)
            # What does not write is the same under every decode setting.
            same: dict[str, TaskResult] = {}
            for row in group:
                section = own if row.decoding.recorded else row.decoding.section
                if section != recorded_section(model):
                    set_decode(model, section)
                about[row.label] = describe(model, self.source.tokenizer, weights)
                first = next(iter(results.values()), None)
                new = self._measured(row.label, model, about[row.label], [*same], first, world)
                found = {**same, **new.tasks}
                same = {task.label: found[task.label] for task in self.section.tasks if not task.writes}
                results[row.label] = EvalResult(tasks={name: found[name] for name in self.section.by_name})
                if self.output is not None and world.main:
                    self._write(results, about)
            del model

    def _load(self, attention: Attention, world: World) -> Any:
        torch.manual_seed(self.seed)  # of modules that a method adds
        model: Any = self.source.load(self.dtype)
        put(model, attention, None)
        return model.to(world.device)

    def _measured(
        self,
        label: str,
        model: Any,
        about: dict[str, Any],
        known: Sequence[str],
        first: EvalResult | None,
        world: World,
    ) -> EvalResult:
        """What a row measures.

        Args:
            known: names of tasks that need not be.
            first: the result of the first row.
        """
        tasks = [task for task in self.section.tasks if task.label not in known]
        console = Console(stderr=True, quiet=not world.main)
        journal = None
        if self.output is not None:
            folder = samples_folder(self.output)
            journal = Journal.open(folder, label, about, world, fresh=self.fresh, say=_note)
            for note in journal.notes if world.main else ():
                _note(f"{label}: {note}")
        with counting(label, console) as count:
            return evaluate(
                model,
                self.source.tokenizer,
                self.section.model_copy(update={"tasks": tasks}),
                world,
                seed=self.seed,
                inputs=self.inputs,
                on_progress=count,
                journal=journal,
                first=first,
            )

    @property
    def _lengths(self) -> dict[str, Sequence[int]]:
        return {task.path(name): each for task in self.section.tasks for name, each in task.lengths_by_field().items()}

    def _note_positions(self) -> None:
        """Say which lengths a model with rotary positions was not made for; learned positions end."""
        check_learned_positions(self.source.outline, self._lengths)
        limit = position_limit(self.source.outline)
        for field, lengths in self._lengths.items():
            if limit is not None and max(lengths, default=0) > limit and os.environ.get("RANK", "0") == "0":
                _note(
                    f"{field}: {max(lengths):,} tokens are more than the {limit:,} positions of the model "
                    "(max_position_embeddings)"
                )

    def _note_all_read(self, label: str, model: Any) -> None:
        """Say that a method leaves no key out: usual settings are for long texts, and the row looks like dense."""
        longest = max((length for lengths in self._lengths.values() for length in lengths), default=0)
        method = recorded(model)["attention"]["method"]
        everything = longest and method != "full" and min(attention_density(model, longest)) == 1.0
        if everything and os.environ.get("RANK", "0") == "0":
            _note(
                f"{label} leaves no key out of {longest:,} tokens, the most that are measured: the row says nothing "
                "of sparse attention; give longer --lengths, or other fields of the method"
            )

    def _write(self, results: dict[str, EvalResult], about: dict[str, Any]) -> None:
        rows = {label: {**about[label], **json.loads(result.model_dump_json())} for label, result in results.items()}
        content = {"model": self.source.path, "seed": self.seed, "rows": rows}
        assert self.output is not None
        write_whole(self.output, json.dumps(content, indent=2) + "\n")


def samples_folder(output: Path) -> Path:
    """Where finished samples are kept: ``result.samples`` beside ``result.json``."""
    return output.with_name(f"{output.stem}.samples")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
