"""Run all checks, print what they find, and say whether a run would be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

from sparsetrain.doctor.finding import Finding
from sparsetrain.doctor.installation import (
    check_attention,
    check_kernels_package,
    check_packages,
    check_serving,
    check_versions,
)
from sparsetrain.doctor.machine import (
    check_caches,
    check_compiler,
    check_device,
    check_extension_locks,
    check_port,
    check_shared_memory,
    check_wandb,
)
from sparsetrain.doctor.needs import check_disk, check_machine, check_model, check_recipe_data
from sparsetrain.errors import SparsetrainError
from sparsetrain.recipe.schema import Recipe


def diagnose(
    recipe: Recipe | None = None,
    naming_places: Callable[[], AbstractContextManager[None]] = nullcontext,
    gpus: int | None = None,
) -> int:
    """Run every check, print the findings, and return the exit code: 2 if one of them would stop a run.

    Args:
        naming_places: adds to an error where the settings are written that it names.
        gpus: GPUs of the run, one process each; by default ``sequence.parallel``.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    findings = list(run_checks(recipe, naming_places, gpus))
    console = Console(highlight=False)
    width = max((len(each.check) for each in findings), default=0)
    table = Table.grid("", "", "", padding=(0, 2, 0, 0))
    for each in findings:
        table.add_row(f"[{colours[each.status]}]{each.status}[/]", each.check, escape(each.found))
        if not console.is_terminal:
            console.print(f"{each.status:4}  {each.check:{width}}  {each.found}", soft_wrap=True, markup=False)
    if console.is_terminal:
        console.print(table)
    for each in findings:
        if each.fix:
            # Not in the table, where it would be broken into lines and could not be copied.
            console.print(f"\n{each.status} {each.check}: {each.fix}", soft_wrap=True, markup=False)
    return 2 if any(each.status == "fail" for each in findings) else 0


def run_checks(
    recipe: Recipe | None = None,
    naming_places: Callable[[], AbstractContextManager[None]] = nullcontext,
    gpus: int | None = None,
) -> Iterator[Finding]:
    """Run all checks in order. A check that raises is a finding, too."""
    checks: list[tuple[str, Callable[[], Finding | Iterable[Finding]]]] = [
        ("versions", check_versions),
        ("kernels package", check_kernels_package),
        ("extension locks", check_extension_locks),
        ("port", check_port),
        ("device", check_device),
        ("caches", check_caches),
        ("shared memory", check_shared_memory),
        ("attention", check_attention),
        ("packages", check_packages),
        ("serving", check_serving),
        ("compiler", lambda: check_compiler(recipe)),
        ("W&B", lambda: check_wandb(recipe)),
    ]
    if recipe is not None:
        checks += [
            ("machine", lambda: check_machine(recipe, gpus)),
            ("model", lambda: check_model(recipe)),
            ("disk", lambda: check_disk(recipe)),
            ("data", lambda: check_recipe_data(recipe)),
        ]
    for name, check in checks:
        try:
            with naming_places():
                result = check()
                found = [result] if isinstance(result, Finding) else list(result)
            yield from found
        except SparsetrainError as error:
            yield Finding("fail", name, str(error))
        except Exception as error:
            yield Finding("fail", name, f"the check itself failed: {type(error).__name__}: {error}")
