"""How the modules of ``sparsetrain_kernels`` are reached, and which of them know one another."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import sparsetrain_kernels
from sparsetrain_kernels.backend import TRITON_INSTALLED

ROOT = Path(sparsetrain_kernels.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "sparsetrain_kernels."))
SPARSEK = ("sparsek_projection", "causal_selection", "score_placement")


def imported(file: Path) -> set[str]:
    """The modules that a file imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_imported_by_its_path(name: str) -> None:
    """``import a.b.c as x`` looks b and c up as attributes, which functions of the same names would hide."""
    if not TRITON_INSTALLED and {"triton", "hopper", "launching", "online_softmax"} & set(name.split(".")):
        pytest.skip("needs triton")
    if ".hopper." in name:
        pytest.importorskip("triton.experimental.gluon")
    importlib.import_module(name)
    found: dict[str, object] = {}
    exec(f"import {name} as module", found)
    assert found["module"] is sys.modules[name]


def test_what_operations_share_is_public_and_below_them() -> None:
    private = {
        f"{file.relative_to(ROOT)}: {node.module}.{alias.name}"
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sparsetrain_kernels")
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert not private
    operations = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    upwards = {
        f"{file.name}: {name}"
        for file in ROOT.glob("*.py")
        if file.name != "__init__.py"
        for name in imported(file)
        if set(name.split(".")[1:2]) & operations
    }
    assert not upwards


def test_operations_import_one_another_in_no_circle() -> None:
    """TopologicalSorter raises where they do."""
    operations = {folder.parent for folder in ROOT.glob("*/__init__.py")}
    edges = {
        folder.name: {
            name.split(".")[1]
            for file in folder.rglob("*.py")
            for name in imported(file)
            if name.startswith("sparsetrain_kernels.")
        }
        - {folder.name}
        for folder in operations
    }
    assert tuple(TopologicalSorter(edges).static_order())


def test_no_module_imports_what_stands_above_the_kernels() -> None:
    files = [*ROOT.rglob("*.py"), *(ROOT.parent / "benchmarks").glob("*.py")]
    above = {
        f"{file.relative_to(ROOT.parent)}: {name}"
        for file in files
        for name in imported(file)
        if name.split(".")[0] in ("sparsetrain", "transformers", "tests")
    }
    assert not above


@pytest.mark.parametrize("operation", SPARSEK)
def test_the_operations_of_sparsek_do_not_import_one_another(operation: str) -> None:
    others = [f"sparsetrain_kernels.{other}" for other in SPARSEK if other != operation]
    edges = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / operation).rglob("*.py")
        for name in imported(file)
        if name.startswith(tuple(others))
    }
    assert not edges
