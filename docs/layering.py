"""The subpackages by layer, the imports that are allowed between them, and the diagram in docs/architecture.md.

    python docs/layering.py    # draws docs/images/layering.png from the imports of the code

``tests/test_layering.py`` checks the code against the table.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"sparsetrain": ROOT / "sparsetrain", "sparsetrain_kernels": ROOT / "kernels/sparsetrain_kernels"}

LAYERS: list[dict[str, str]] = [
    {"kernels": "differentiable tensor functions", "ground": "errors, sections, files, patterns, ranks"},
    {"methods": "how a layer attends"},
    {"generation": "what is kept of the past"},
    {"recipe": "the schema, loading, overrides"},
    {"data": "rows of tokens", "modeling": "methods in transformers' models"},
    {"evaluation": "what a model can do", "inference": "texts that a model writes"},
    {"training": "a run from its recipe to an export"},
    {"plan": "memory and time before a run", "doctor": "this machine", "bench": "speed beside others"},
    {"cli": "commands"},
]
"""The subpackages by layer, lowest first, with their content. A subpackage imports only from lower layers."""

EXCEPTIONS = {
    ("kernels", "ground"): "the kernels are independent of models, recipes and Hugging Face",
    ("plan", "doctor"): "neighbours",
}
"""Imports that are not allowed although the layers would allow them, with the reason."""

ALSO = {("doctor", "plan"), ("bench", "plan"), ("evaluation", "inference")}
"""Imports between neighbours that are allowed."""

SHARED = {"sparsetrain.evaluation.base", "sparsetrain.evaluation.registry"}
"""Modules that every subpackage from ``recipe`` up may import: the schema's union of evaluation tasks derives from
their registry, which names the tasks and imports them lazily."""

LONGEST = 500
"""Maximum number of lines of a file."""
LONG: dict[str, str] = {}
"""Files that may be longer, with the reason."""


def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


def imports() -> dict[str, set[str]]:
    """For each module the modules of ours that it imports, at its top, in a function or only for types."""
    files = modules()
    edges: dict[str, set[str]] = defaultdict(set)
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    edges[module] |= {name if name in files else node.module} & files.keys()
            elif isinstance(node, ast.Import):
                edges[module] |= {alias.name for alias in node.names} & files.keys()
    return edges


def subpackage(module: str) -> str:
    """The subpackage of a module; the package's ``__init__`` counts as the highest."""
    package, *rest = module.split(".")
    if package == "sparsetrain_kernels":
        return "kernels"
    if not rest:
        return "cli"
    return rest[0] if any(rest[0] in layer for layer in LAYERS) else "ground"


def may_import(importer: str, imported: str) -> bool:
    """Whether the table allows a subpackage to import another one, or a module."""
    if imported in SHARED and importer not in ("kernels", "ground", "methods"):
        return True
    imported = subpackage(imported) if imported.split(".")[0] in PACKAGES else imported
    layer = {name: index for index, names in enumerate(LAYERS) for name in names}
    if importer == imported or (importer, imported) in ALSO:
        return True
    return layer[imported] < layer[importer] and (importer, imported) not in EXCEPTIONS


def cycles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches the others by imports (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(edges.get(module, ())):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(edges):
        if module not in number:
            visit(module)
    return found


def draw(out: Path) -> None:
    """Draw the subpackages by layer, with an arrow from each to those it imports, wider for more imports.

    All subpackages import the ground files, so no arrow is drawn to them.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    counts = defaultdict[tuple[str, str], int](int)
    for module, others in imports().items():
        for other in others:
            if subpackage(module) != subpackage(other) != "ground":
                counts[subpackage(module), subpackage(other)] += 1

    figure = Figure(figsize=(12, 1.35 * len(LAYERS)), layout="constrained")
    axes = figure.subplots()
    middle: dict[str, tuple[float, float]] = {}
    for level, layer in enumerate(LAYERS):
        for place, (name, what) in enumerate(layer.items()):
            x, y = 12 * (place + 0.5) / len(layer), 1.6 * level
            middle[name] = (x, y)
            box = FancyBboxPatch((x - 1.75, y - 0.38), 3.5, 0.76, boxstyle="round,pad=0.05", fc="#eef3f8", ec="#30506e")
            axes.add_patch(box)
            axes.text(x, y + 0.13, name, ha="center", va="center", weight="bold", size=11)
            axes.text(x, y - 0.17, what, ha="center", va="center", size=8.5)
    for (above, below), count in sorted(counts.items()):
        (x1, y1), (x2, y2) = middle[above], middle[below]
        bend = 0.0 if abs(y1 - y2) < 2 else 0.25 if x2 <= x1 else -0.25
        style = {"arrowstyle": "-|>", "color": "#8aa0b4", "lw": 0.6 + count / 25, "alpha": 0.75}
        ends = {"shrinkA": 26, "shrinkB": 26, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", (x2, y2), (x1, y1), arrowprops={**style, **ends}, zorder=0)
    axes.set_xlim(0, 12)
    axes.set_ylim(-0.8, 1.6 * len(LAYERS) - 0.8)
    axes.set_axis_off()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(ROOT / "docs/images/layering.png")
