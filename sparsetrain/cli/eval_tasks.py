"""What ``sparsetrain eval`` measures: the tasks of a recipe, of the run, or those that the command line names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.base import TaskSection
from sparsetrain.evaluation.registry import TASKS
from sparsetrain.nearest import did_you_mean
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.consistency import task_faults
from sparsetrain.recipe.loading import validated
from sparsetrain.recipe.overrides import apply_overrides
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.recipe.yaml_source import Source
from sparsetrain.section import MOST_TOKENS, Section

LONGEST = 32768
"""Tokens of the longest text that is measured where nothing is said of lengths."""
FEWEST = 128


class _Train(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class _EvaluationAlone(Section):
    """The part of a recipe that an evaluation needs."""

    eval: EvalSection = EvalSection()
    train: _Train = _Train()


@dataclass(frozen=True)
class Measured:
    """What is measured."""

    section: EvalSection
    seed: int
    recipe: str | None = None
    """The recipe that it is of."""


def choose_tasks(
    model: str,
    settings: Sequence[str],
    names: Sequence[str] | None,
    lengths: Sequence[int] | None,
    positions: Callable[[], int | None],
) -> Measured:
    """The evaluation that a command line asks for.

    Args:
        settings: a recipe, or none, then overrides.
        names: the tasks to measure, of the recipe or by their kind; None for those of the recipe.
        lengths: of every task that has lengths; None for the recipe's.
        positions: the most that the model supports, asked for where nothing says what or how long: it finds the model.

    Raises:
        RecipeError: names what is wrong, and what to give.
    """
    recipe, overrides = _split(settings)
    for override in overrides:
        if not override.startswith(("eval.", "eval=", "train.seed=")):
            raise RecipeError(f"{override} has no effect here: only the eval section of the recipe is used")
    recipe = recipe or _own_recipe(model)
    if recipe is None and not names and not overrides:
        positions()
    known = {} if recipe is None else load_recipe(recipe).recipe.eval.by_name
    flags = list(_without(known, names, overrides, recipe))
    for name in names or ():
        if name in known:
            continue
        if name in TASKS:
            usual = TASKS[name].suggested(list(lengths or _usual_lengths(positions())))
            # Another source takes nothing of the usual one, such as its split.
            named = [
                field
                for field in usual
                if any(each.startswith(f"eval.tasks.{name}.{field}.path=") for each in overrides)
            ]
            suggested = {field: value for field, value in usual.items() if field not in named}
            flags.append(f"eval.tasks.{name}={json.dumps({'task': name, **suggested})}")
        elif not any(override.startswith(f"eval.tasks.{name}") for override in overrides):
            raise RecipeError(_no_task(name, known, recipe))
    measured = _load(recipe, [*flags, *overrides])
    if measured.section.empty:
        lacks = f"nothing says what to measure of {model}, which is not of a run" if recipe is None else None
        lacks = lacks or f"{recipe} has nothing to measure"
        raise RecipeError(f"{lacks}: name tasks, such as --tasks perplexity,passkey, or give eval.tasks")
    return measured if lengths is None else _with_lengths(measured, lengths, overrides)


def read_lengths(text: str) -> list[int]:
    """The numbers of tokens in ``4k,8k,16384``, ascending; ``k`` is 1,024 and ``m`` 1,048,576.

    Raises:
        RecipeError: one is no number of tokens.
    """
    found: list[int] = []
    for part in filter(None, (each.strip().lower() for each in text.split(","))):
        matched = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([km]?)", part)
        tokens = float(matched[1]) * {"": 1, "k": 1024, "m": 1024**2}[matched[2]] if matched else 0.0
        if not tokens.is_integer() or not 0 < tokens <= MOST_TOKENS:
            raise RecipeError(f"--lengths {text}: {part} is no number of tokens such as 4k, 512 or 1m")
        if tokens in found:
            raise RecipeError(f"--lengths {text}: {part} is there twice; each length is measured once")
        found.append(int(tokens))
    if not found:
        raise RecipeError("--lengths is empty; give tokens such as 4k,8k,16k")
    return sorted(found)


def _split(settings: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first is one, and the overrides."""
    if settings and ("=" not in settings[0] or Path(settings[0]).is_file()):
        return settings[0], list(settings[1:])
    return None, list(settings)


def _own_recipe(model: str) -> str | None:
    """The recipe of the run that a model is of."""
    folder = Path(model)
    for place in (folder, folder.absolute().parent):
        file = place / "recipe.yaml"
        if file.is_file() and (place == folder or folder.absolute().name == "final"):
            return str(file)
    return None


def _without(
    known: dict[str, TaskSection], names: Sequence[str] | None, overrides: Sequence[str], recipe: str | None
) -> Iterator[str]:
    """Overrides that leave out the recipe's other tasks."""
    for label in known if names is not None else ():
        if label in names:  # type: ignore[operator]
            continue
        for override in overrides:
            if override.startswith((f"eval.tasks.{label}.", f"eval.tasks.{label}=")):
                raise RecipeError(f"{override} has no effect: --tasks leaves {label} of {recipe} out; add it there")
        yield f"eval.tasks.{label}=null"


def _usual_lengths(positions: int | None) -> list[int]:
    """Powers of two up to the positions of a model, three of them."""
    longest = FEWEST
    while longest * 2 <= min(positions or LONGEST, LONGEST):
        longest *= 2
    return sorted({max(FEWEST, longest // 4), max(FEWEST, longest // 2), longest})


def _with_lengths(measured: Measured, lengths: Sequence[int], overrides: Sequence[str]) -> Measured:
    """The same with other lengths, except where an override says those of one task."""
    tasks, able = [], False
    for section in measured.section.tasks:
        values = section.model_dump(mode="json")
        for field in section.lengths_by_field():
            *above, last = field.split(".")
            container = reduce(lambda inner, part: inner[part], above, values)
            if isinstance(container[last], list):
                able = True
                if not any(override.startswith(f"{section.path(field)}=") for override in overrides):
                    container[last] = list(lengths)
        tasks.append(type(section).model_validate_json(json.dumps(values)))
    if not able:
        raise RecipeError("--lengths has no effect: none of the tasks has lengths; name one that has with --tasks")
    changed = replace(measured, section=measured.section.model_copy(update={"tasks": tasks}))
    for task in tasks:
        for field, fault in task.faults():
            raise RecipeError(f"--lengths: {task.path(field)}: {fault}")
    return changed


def _no_task(name: str, known: dict[str, TaskSection], recipe: str | None) -> str:
    everything = list(dict.fromkeys((*known, *TASKS)))
    guess = did_you_mean(name, everything, otherwise=";")
    has = f"{recipe} has {', '.join(known)}; " if known else ""
    return f"--tasks {name}: there is no such task{guess} {has}tasks are {', '.join(TASKS)}"


def _load(recipe: str | None, overrides: Sequence[str]) -> Measured:
    if recipe is not None:
        loaded = load_recipe(recipe, overrides)
        return Measured(loaded.recipe.eval, loaded.recipe.train.seed, recipe)
    source = Source({"eval": {"tasks": []}})
    apply_overrides(source, overrides)
    alone = validated(source, "the command line", _EvaluationAlone, lambda part: task_faults(part.eval))
    return Measured(alone.eval, alone.train.seed)
