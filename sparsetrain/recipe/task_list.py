"""The list ``eval.tasks`` goes by names: a file lays its entries over those of its base, and the command line says
``eval.tasks.passkey.lengths=[4096]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.registry import TASKS
from sparsetrain.recipe.yaml_source import KeyPath, Source

TASK_LIST: KeyPath = ("eval", "tasks")

LONGEST_NAME = 64
"""Characters of a task's name."""

LONGEST = 500
"""Characters of an entry that an error writes out."""


def label_of(entry: Any) -> str | None:
    """The name an entry goes by, None of what has none."""
    if not isinstance(entry, dict):
        return None
    return next((name for key in ("name", "task") if isinstance(name := entry.get(key), str)), None)


def task_entries(data: Any) -> list[Any]:
    """The entries of a recipe's ``eval.tasks``, none where that is no list."""
    for part in TASK_LIST:
        data = data.get(part) if isinstance(data, dict) else None
    return data if isinstance(data, list) else []


def align(parent: Source, child: Source) -> list[str]:
    """Put the base's entries, in place, where the file that is laid over it has entries of the same names.

    What the file does not list is not measured, as with every list; what it lists takes the base's settings.

    Returns:
        What is not measured any more, a sentence.
    """
    tasks = child.data.get("eval")
    if not isinstance(tasks, dict) or not isinstance(tasks.get("tasks"), list) or not task_entries(parent.data):
        return []
    before = [label_of(entry) for entry in task_entries(parent.data)]
    after = [label_of(entry) for entry in tasks["tasks"]]
    gone = [
        f"{name} ({parent.place((*TASK_LIST, index))})"
        for index, name in enumerate(before)
        if name not in (*after, None)
    ]
    arrange(parent, [before.index(name) if name is not None and name in before else None for name in after])
    place = child.place(TASK_LIST)
    return [f"{place}: eval.tasks leaves out {' and '.join(gone)}, which the base measures"] if gone else []


def arrange(source: Source, order: Sequence[int | None]) -> None:
    """Put the entries of ``eval.tasks`` in another order, with their places; None makes an empty one."""
    entries, depth = task_entries(source.data), len(TASK_LIST)

    def moved(path: KeyPath) -> list[KeyPath]:
        """Where what stood at a path stands now."""
        if len(path) <= depth or path[:depth] != TASK_LIST:
            return [path]
        return [(*TASK_LIST, new, *path[depth + 1 :]) for new, old in enumerate(order) if old == path[depth]]

    source.places = {new: place for path, place in source.places.items() for new in moved(path)}
    source.problems = [replace(each, path=new) for each in source.problems for new in moved(each.path)]
    source.unreadable = {
        new: replace(problem, path=new) for path, problem in source.unreadable.items() for new in moved(path)
    }
    source.data["eval"]["tasks"] = [{} if old is None else _copied(entries[old]) for old in order]


def located(path: KeyPath, data: Any) -> KeyPath:
    """A path of the command line with a task's name as its number in the list. Others, and unknown names, stay."""
    depth = len(TASK_LIST)
    if len(path) > depth and path[:depth] == TASK_LIST:
        labels = [label_of(entry) for entry in task_entries(data)]
        if path[depth] in labels:
            return (*TASK_LIST, labels.index(str(path[depth])), *path[depth + 1 :])
    return path


def completed(path: KeyPath, value: Source, given: Sequence[KeyPath], source: Source) -> KeyPath:
    """The path at which an override of a task's setting is to be put, in a list that has the task.

    Args:
        path: as it was given.
        value: of the override. A whole entry gets the task and the name that it was given for.
        given: the paths of all overrides.
        source: the recipe, whose list gets an entry for a task that it lacks.

    Raises:
        RecipeError: there is no task of that name.
    """
    depth, place = len(TASK_LIST), value.place(())
    if len(path) <= depth or path[:depth] != TASK_LIST or str(path[depth]).isdigit():
        return path
    name, rest = str(path[depth]), path[depth + 1 :]
    found = located(path, source.data)
    entries = task_entries(source.data)
    kind = entries[int(found[depth])].get("task") if found != path else name if name in TASKS else None
    if not rest and isinstance(value.data, dict):
        kind = value.data.get("task", kind)
    if found == path and kind is None and (*path[: depth + 1], "task") not in given:
        there = ", ".join(filter(None, map(label_of, entries))) or "none"
        raise RecipeError(
            f"{place}: eval.tasks has no task called {name} (there is: {there}); a new one needs "
            f"eval.tasks.{name}.task={'/'.join(TASKS)}"
        )
    entry = {} if kind is None else {"task": kind}
    entry |= {} if name == kind else {"name": name}
    if found == path and not (not rest and value.data is None):
        if source.data.get("eval") is None:
            source.data["eval"] = {}
        section = source.data["eval"]
        if not isinstance(section, dict) or not isinstance(section.get("tasks") or [], list):
            return path
        section["tasks"] = [*(section.get("tasks") or []), entry]
        index = len(section["tasks"]) - 1
        source.places |= {(*TASK_LIST, index): place} | {(*TASK_LIST, index, key): place for key in entry}
        found = (*TASK_LIST, index, *rest)
    if not rest and isinstance(value.data, dict):
        if label_of(entry | value.data) != name:
            raise RecipeError(f"{place}: the task is called {name}, and {value.data.get('name')} in its value")
        value.data = entry | value.data
    return found


def without_removed(source: Source, removed: Sequence[KeyPath]) -> None:
    """Take the entries out that the command line set to null."""
    gone = {path[-1] for path in removed}
    if gone:
        arrange(source, [index for index in range(len(task_entries(source.data))) if index not in gone])


def named(path: KeyPath, data: Any) -> KeyPath:
    """A path with a task's number in the list as its name, where no other task has that: messages say it so."""
    number = path[len(TASK_LIST)] if len(path) > len(TASK_LIST) and path[: len(TASK_LIST)] == TASK_LIST else None
    labels = [label_of(entry) for entry in task_entries(data)]
    label = labels[number] if isinstance(number, int) and number < len(labels) else None
    if label is None or labels.count(label) > 1 or len(label) > LONGEST_NAME:
        return path
    return (*TASK_LIST, label, *path[len(TASK_LIST) + 1 :])


def named_places(source: Source) -> dict[KeyPath, str]:
    """The places of all settings, those of tasks by their names too."""
    return source.places | {named(path, source.data): place for path, place in source.places.items()}


def former_section(task: str, value: Any) -> str:
    """What to write instead of a section ``eval.TASK``, with the values that were given."""
    if value is None:
        return "tasks are a list now, and one that eval.tasks does not list is not measured; leave this out"
    entry = {"task": task, **(value if isinstance(value, dict) else {})}
    text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6).strip()
    text = text if len(text) <= LONGEST else f"{{task: {task}, ...}}"
    return f"tasks are a list now; write it as an entry of eval.tasks: - {text}"


def former_override(path: KeyPath, text: str) -> str | None:
    """What to write instead of an override ``eval.TASK...=VALUE``; None of others."""
    if len(path) < 2 or path[0] != "eval" or path[1] not in TASKS:
        return None
    return f"tasks are a list now; write eval.tasks.{text.removeprefix('eval.')}"


def _copied(entry: Any) -> Any:
    """Two entries of one name, which are refused later, must not be one object."""
    return dict(entry) if isinstance(entry, dict) else entry
