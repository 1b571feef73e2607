"""Builds of a kernel with one line changed: with a fault, which tests have to notice, or with a check."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

_KEPT: list[ModuleType] = []
"""Launches find compiled kernels by the address of the kernel, which must not become another's."""


def changed(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with ``new`` in place of ``old``, which stands in it once; its file lies in ``folder``."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    name = f"changed_{len(_KEPT)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    _KEPT.append(made)
    return made
