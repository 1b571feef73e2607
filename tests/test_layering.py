"""Imports run downwards and without cycles, and files are short (docs/architecture.md)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def layering() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layering", Path(__file__).parent.parent / "docs/layering.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imports(layering) -> dict:
    return layering.imports()


def test_imports_run_downwards(layering, imports):
    wrong = [
        f"{module} imports {other}: {layering.subpackage(module)} is not above {layering.subpackage(other)}"
        for module, others in imports.items()
        for other in others
        if not layering.may_import(layering.subpackage(module), other)
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_modules_import_each_other(layering, imports):
    assert layering.cycles(imports) == []


def test_a_cycle_is_found(layering):
    assert layering.cycles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == [["b", "c"]]


def test_files_are_short(layering):
    root = layering.ROOT
    files = [file for folder in (*layering.PACKAGES.values(), root / "tests") for file in folder.rglob("*.py")]
    lengths = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in files}
    long = {name: length for name, length in lengths.items() if length > layering.LONGEST and name not in layering.LONG}
    assert not long, f"split them, or list them in docs/layering.py with the reason: {long}"
    assert not {name for name in layering.LONG if lengths.get(name, 0) <= layering.LONGEST}, "no longer long"


def test_the_kernels_stand_alone(layering, imports):
    assert not layering.may_import("kernels", "ground")
    imported = {
        other for module, others in imports.items() if layering.subpackage(module) == "kernels" for other in others
    }
    assert all(layering.subpackage(other) == "kernels" for other in imported)
