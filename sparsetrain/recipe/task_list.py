"""Address entries of ``eval.tasks`` by name, in bases and overrides (``eval.tasks.passkey.lengths=[4096]``)."""

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
"""Maximum number of characters of a task's name."""

LONGEST = 500
"""Maximum number of characters of an entry that an error quotes."""


def label_of(entry: Any) -> str | None:
    """The name of an entry; None if it has none."""
    if not isinstance(entry, dict):
        return None
    return next((name for key in ("name", "task") if isinstance(name := entry.get(key), str)), None)


def task_entries(data: Any) -> list[Any]:
    """The entries of a recipe's ``eval.tasks``; empty if that is not a list."""
    for part in TASK_LIST:
        data = data.get(part) if isinstance(data, dict) else None
    return data if isinstance(data, list) else []


def align(parent: Source, child: Source) -> list[str]:
    """Reorder the base's entries, in place, to match the entries of the same names in the file merged over it.

    Tasks that the file does not list are dropped, as with every list; listed ones inherit the base's settings.

    Returns:
        A sentence about dropped tasks, if any.
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
    """Reorder the entries of ``eval.tasks`` and their places; None inserts an empty entry."""
    entries, depth = task_entries(source.data), len(TASK_LIST)

    def moved(path: KeyPath) -> list[KeyPath]:
        """The new paths of an old path."""
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
    """Replace a task's name in an override's path by its list index. Other paths and unknown names are unchanged."""
    depth = len(TASK_LIST)
    if len(path) > depth and path[:depth] == TASK_LIST:
        labels = [label_of(entry) for entry in task_entries(data)]
        if path[depth] in labels:
            return (*TASK_LIST, labels.index(str(path[depth])), *path[depth + 1 :])
    return path


def completed(path: KeyPath, value: Source, given: Sequence[KeyPath], source: Source) -> KeyPath:
    """The path for an override of a task's setting; adds an entry for a missing task.

    Args:
        path: The path as given.
        value: The value of the override. A whole entry gets the task and name from the path.
        given: The paths of all overrides.
        source: The recipe, to whose list a missing task is added.

    Raises:
        RecipeError: There is no task of that name.
    """
    depth, place = len(TASK_LIST), value.place(())
    if len(path) <= depth or path[:depth] != TASK_LIST or str(path[depth]).isdigit():
        return path
    name, rest = str(path[depth]), path[depth + 1 :]
    found = located(path, source.data)
    entries = task_entries(source.data)
    kind = name if name in TASKS else None
    if found != path:
        kind = entries[int(found[depth])].get("task")
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
    """Remove the entries that the command line set to null."""
    gone = {path[-1] for path in removed}
    if gone:
        arrange(source, [index for index in range(len(task_entries(source.data))) if index not in gone])


def named(path: KeyPath, data: Any) -> KeyPath:
    """Replace a task's list index in a path by its name, if the name is unique; for messages."""
    number = path[len(TASK_LIST)] if len(path) > len(TASK_LIST) and path[: len(TASK_LIST)] == TASK_LIST else None
    labels = [label_of(entry) for entry in task_entries(data)]
    label = labels[number] if isinstance(number, int) and number < len(labels) else None
    if label is None or labels.count(label) > 1 or len(label) > LONGEST_NAME:
        return path
    return (*TASK_LIST, label, *path[len(TASK_LIST) + 1 :])


def named_places(source: Source) -> dict[KeyPath, str]:
    """The places of all settings, with those of tasks also by name."""
    return source.places | {named(path, source.data): place for path, place in source.places.items()}


def former_section(task: str, value: Any) -> str:
    """The replacement of a former section ``eval.TASK``, with the given values."""
    if value is None:
        return "tasks are a list now, and one that eval.tasks does not list is not measured; leave this out"
    entry = {"task": task, **(value if isinstance(value, dict) else {})}
    text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6).strip()
    text = text if len(text) <= LONGEST else f"{{task: {task}, ...}}"
    return f"tasks are a list now; write it as an entry of eval.tasks: - {text}"


def former_override(path: KeyPath, text: str) -> str | None:
    """The replacement of a former override ``eval.TASK...=VALUE``; None for other overrides."""
    if len(path) < 2 or path[0] != "eval" or path[1] not in TASKS:
        return None
    return f"tasks are a list now; write eval.tasks.{text.removeprefix('eval.')}"


def _copied(entry: Any) -> Any:
    """A copy of an entry: two entries of one name, which are refused later, must not be one object."""
    return dict(entry) if isinstance(entry, dict) else entry
