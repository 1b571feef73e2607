"""Train one recipe with several attention methods and seeds, and write one table of what each found.

    python -m sparsetrain.recipes.evidence.run recall --parallel 10
    python -m sparsetrain.recipes.evidence.run recall --parallel 2 train.steps=200   # settings as for any run

Every run is an ordinary training run in a process of its own, and its folder holds everything it did. Runs share one
device. A finished run is not repeated, so an interrupted table is completed by the same command.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sparsetrain.cli.entry import run_script
from sparsetrain.errors import TrainingError
from sparsetrain.evaluation.report import RESULTS_FILE, read_results
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult
from sparsetrain.evaluation.tasks.recall import RecallResult
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parent
SLIDING_BLOCK = 16
ANSWERS = "answers found"

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What one run measured, by name: ``answers found``, ``loss``, ``perplexity at 1024``."""

    method: str
    seed: int
    before: dict[str, float]
    """With the method put in and not yet trained; empty where the recipe does not evaluate at the start."""
    after: dict[str, float]
    seconds: float


def methods(recipe: Recipe, gates: list[str]) -> dict[str, list[str]]:
    """The settings of each method, all with the key budget of a SparseK recipe."""
    attention = recipe.attention
    assert isinstance(attention, SparseKConfig)
    # A window of blocks grows from the start of a block to its end; rounded up, it is never the smaller one.
    window = math.ceil((attention.topk + attention.window) / SLIDING_BLOCK) + 1
    sliding = ["method=sliding", f"block={SLIDING_BLOCK}", f"window={window}", f"sinks={min(1, attention.sinks)}"]
    found = {
        "full": ["attention.method=full", "train.new_modules_lr=null"],
        "sliding": [*(f"attention.{setting}" for setting in sliding), "train.new_modules_lr=null"],
    }
    scorers = {
        "learned": [],
        "frozen": ["attention.scorer=frozen", "attention.init=normal"],
        "detached": ["attention.scorer=detached", "attention.init=normal"],
        "window and random keys": ["attention.scorer=random", "attention.init=null"],
    }
    if recipe.model.path is not None:  # beside random weights there would be nothing to select for
        scorers["scorers alone"] = ["train.parameters=new_modules"]
    for scorer, settings in scorers.items():
        found |= {f"{scorer}, gate {gate}": [f"attention.gate={gate}", *settings] for gate in gates}
    return found


def opened(recipe: str, settings: list[str] | None) -> tuple[Path, Recipe]:
    """A recipe of this folder by its name, or a file, and what it says with settings."""
    file = FOLDER / f"{recipe}.yaml" if (FOLDER / f"{recipe}.yaml").exists() else Path(recipe)
    return file, load_recipe(file, settings or []).recipe


def attention_setting(section: dict[str, Any]) -> str:
    """An attention section as a setting of the command line."""
    return "attention=" + json.dumps(section, separators=(",", ":"))


def choose(known: dict[str, T], only: list[str] | None) -> dict[str, T]:
    """Those that ``--only`` names, or all.

    Raises:
        typer.BadParameter: there is none of a name.
    """
    for name in only or ():
        if name not in known:
            raise typer.BadParameter(f"--only {name!r}: choose from {', '.join(map(repr, known))}")
    return {name: what for name, what in known.items() if not only or name in only}


def train(
    recipe: Path, method: str, seed: int, settings: list[str], folder: Path, program: str = "sparsetrain.cli"
) -> Outcome:
    """One run, in a process of its own; its output goes to a ``.txt`` beside its folder.

    Args:
        program: the module that is sparsetrain's command line.

    Raises:
        TrainingError: the run failed or was stopped; says where its log is.
    """
    log, times = folder.with_suffix(".txt"), folder / "seconds.json"
    if not at_end(folder):
        command = [sys.executable, "-m", program, "run", str(recipe), f"train.seed={seed}", *settings]
        start = time.monotonic()
        with log.open("w") as out:
            code = subprocess.run(
                [*command, f"output={folder}", "--resume"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            ).returncode
        if code:
            raise TrainingError(f"{method}, seed {seed} ended with {code}; see {log}")
        times.write_text(json.dumps(time.monotonic() - start))
    after = at_end(folder)
    if not after:  # a run that is told to stop saves a checkpoint and ends well
        raise TrainingError(f"{method}, seed {seed} was stopped; the same command continues it. See {log}")
    return Outcome(method, seed, measured(folder, ", before"), after, json.loads(times.read_text()))


def at_end(folder: Path) -> dict[str, float]:
    """What the run of a folder measured at its end; empty while it has not come there."""
    return measured(folder, ", after")


def measured(folder: Path, moment: str) -> dict[str, float]:
    """What a run measured with its own method, by name."""
    results = read_results(folder) if (folder / RESULTS_FILE).exists() else {}
    labels = [label for label in results if label.endswith(moment) and not label.startswith("full attention")]
    if not labels:
        return {}
    result = results[labels[-1]]
    found: dict[str, float] = {}
    for task in result.tasks.values():
        if isinstance(task, PerplexityResult):
            found |= {f"perplexity at {length}": value for length, value in task.perplexity.items()}
        elif isinstance(task, RecallResult):
            found |= {ANSWERS: task.accuracy(), "loss": task.loss}
    return found


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each method, what it measured with each seed (before -> after training)."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    names = list(outcomes[0].after)
    columns = [f"{name}, seed {seed}" for name in names for seed in seeds]
    lines = [f"| method | {' | '.join(columns)} | seconds |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        of = {outcome.seed: outcome for outcome in outcomes if outcome.method == method}
        cells = [_cell(of[seed], name) for name in names for seed in seeds]
        seconds = sum(outcome.seconds for outcome in of.values()) / len(of)
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome, name: str) -> str:
    moments = [moment[name] for moment in (outcome.before, outcome.after) if name in moment]
    return " -> ".join(f"{value:.1%}" if name == ANSWERS else f"{value:.3f}" for value in moments)


def main(
    recipe: Annotated[str, typer.Argument(help="recall, recall-finetune, needles, text, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each method; 0 and 1 by default.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    gate: Annotated[list[str] | None, typer.Option(help="Gates of every scorer; the recipe's by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare attention methods with one budget of keys on one task."""
    file, loaded = opened(recipe, settings)
    if not isinstance(loaded.attention, SparseKConfig):
        method = loaded.attention.method
        raise typer.BadParameter(f"{file} has attention.method={method}; the comparison starts from sparsek")
    chosen = choose(methods(loaded, gate or [loaded.attention.gate]), only)
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)

    def run(case: tuple[int, str]) -> Outcome:
        number, method = case
        folder = out / f"{method.replace(', ', '-').replace(' ', '-')}-{number}"
        outcome = train(file, method, number, [*(settings or []), *chosen[method]], folder)
        told = ", ".join(f"{name} {_cell(outcome, name)}" for name in outcome.after)
        print(f"{method}, seed {number}: {told}", flush=True)
        return outcome

    with ThreadPoolExecutor(parallel) as pool:
        outcomes = list(pool.map(run, product(seed or [0, 1], chosen)))
    (out / "table.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (out / "table.md").write_text(table(outcomes))
    print(table(outcomes))


if __name__ == "__main__":
    run_script(main)
