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
from typing import Annotated

import typer

from sparsetrain.evaluation.report import RESULTS_FILE, read_results
from sparsetrain.evaluation.result import RecallResult
from sparsetrain.methods.sparsek import SparseKConfig
from sparsetrain.recipe import load_recipe

FOLDER = Path(__file__).parent
SLIDING_BLOCK = 16


@dataclass(frozen=True)
class Outcome:
    """What one run measured at its end."""

    method: str
    seed: int
    answers: int
    accuracy: float
    loss: float
    seconds: float


def methods(attention: SparseKConfig, gates: list[str]) -> dict[str, list[str]]:
    """The settings of each method, all with the key budget of a SparseK recipe."""
    # A window of blocks grows from the start of a block to its end; rounded up, it is never the smaller one.
    window = math.ceil((attention.topk + attention.window) / SLIDING_BLOCK) + 1
    sliding = ["method=sliding", f"block={SLIDING_BLOCK}", f"window={window}", f"sinks={min(1, attention.sinks)}"]
    return {
        "full": ["attention.method=full"],
        **{f"learned, gate {gate}": [f"attention.gate={gate}"] for gate in gates},
        "frozen": ["attention.scorer=frozen"],
        "window and random keys": ["attention.scorer=random"],
        "sliding": [f"attention.{setting}" for setting in sliding],
    }


def train(recipe: Path, method: str, seed: int, settings: list[str], folder: Path) -> Outcome:
    """One run, in a process of its own; its output goes to a ``.txt`` beside its folder.

    Raises:
        RuntimeError: the run failed or was stopped; says where its log is.
    """
    log, times = folder.with_suffix(".txt"), folder / "seconds.json"
    if at_end(folder) is None:
        command = [sys.executable, "-m", "sparsetrain.cli", "run", str(recipe), f"train.seed={seed}", *settings]
        start = time.monotonic()
        with log.open("w") as out:
            code = subprocess.run(
                [*command, f"output={folder}", "--resume"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            ).returncode
        if code:
            raise RuntimeError(f"{method}, seed {seed} ended with {code}; see {log}")
        times.write_text(json.dumps(time.monotonic() - start))
    recall = at_end(folder)
    if recall is None:  # a run that is told to stop saves a checkpoint and ends well
        raise RuntimeError(f"{method}, seed {seed} was stopped; the same command continues it. See {log}")
    return Outcome(method, seed, recall.answers, recall.accuracy(), recall.loss, json.loads(times.read_text()))


def at_end(folder: Path) -> RecallResult | None:
    """What the run of a folder measured at its end; None while it has not come there."""
    results = read_results(folder) if (folder / RESULTS_FILE).exists() else {}
    return next((result.recall for label, result in results.items() if label.endswith(", after")), None)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each method, accuracy and loss of each seed."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    names = [f"{what}, seed {seed}" for what in ("answers found", "loss") for seed in seeds]
    lines = [f"| method | {' | '.join(names)} | seconds |", "| --- |" + " ---: |" * (len(names) + 1)]
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        of = {outcome.seed: outcome for outcome in outcomes if outcome.method == method}
        cells = [f"{of[seed].accuracy:.1%}" for seed in seeds] + [f"{of[seed].loss:.3f}" for seed in seeds]
        seconds = sum(outcome.seconds for outcome in of.values()) / len(of)
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe of this folder (recall, marked), or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of each method.")] = 2,
    parallel: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    gate: Annotated[
        list[str] | None, typer.Option(help="Gates of the learned scorer; the recipe's by default.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare attention methods with one budget of keys on one task."""
    file = FOLDER / f"{recipe}.yaml" if (FOLDER / f"{recipe}.yaml").exists() else Path(recipe)
    attention = load_recipe(file, settings or []).recipe.attention
    if not isinstance(attention, SparseKConfig):
        raise typer.BadParameter(f"{file} has attention.method={attention.method}; the comparison starts from sparsek")
    known = methods(attention, gate or [attention.gate])
    chosen = {name: what for name, what in known.items() if not only or name in only}
    if not chosen:
        raise typer.BadParameter(f"--only {only}: choose from {list(known)}")
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)

    def run(case: tuple[str, int]) -> Outcome:
        method, seed = case
        folder = out / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"
        outcome = train(file, method, seed, [*(settings or []), *chosen[method]], folder)
        print(f"{method}, seed {seed}: {outcome.accuracy:.1%} found, loss {outcome.loss:.3f}", flush=True)
        return outcome

    with ThreadPoolExecutor(parallel) as pool:
        outcomes = list(pool.map(run, product(chosen, range(seeds))))
    (out / "table.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (out / "table.md").write_text(table(outcomes))
    print(table(outcomes))


if __name__ == "__main__":
    typer.run(main)
