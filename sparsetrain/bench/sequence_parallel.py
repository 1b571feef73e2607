"""The same recipe on 1, 2, 4, ... GPUs that share every sequence: equal losses, tokens per second, memory of a rank.

    python -m sparsetrain.bench.sequence_parallel RECIPE [KEY=VALUE]... --ranks 1 2 4 --output runs/shared

Each number of ranks is a run of its own by DeepSpeed's launcher, without evaluation and export.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from sparsetrain.errors import BenchError

WARMUP = 2
"""First steps whose time is not counted: kernels are compiled in them."""

QUIET = ("eval.at_start=false", "eval.at_end=false", "checkpoint.export=false", "wandb.mode=disabled")


def measure(recipe: str, overrides: list[str], ranks: int, folder: Path) -> list[dict[str, float]]:
    """Train on ``ranks`` ranks that share every sequence; the metrics of each step.

    Raises:
        BenchError: the run failed; it has said why.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--module"]
    settings = [*QUIET, *overrides, f"sequence.parallel={ranks}", "train.log_every=1", f"output={folder}"]
    done = subprocess.run([*launcher, "sparsetrain.launch.train", recipe, *settings], check=False)
    if done.returncode:
        raise BenchError(f"the run on {ranks} ranks ended with exit code {done.returncode}; its message is above")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [step for step in map(json.loads, lines) if "loss" in step]


def compare(runs: dict[int, list[dict[str, float]]]) -> str:
    """A Markdown table of runs by their number of ranks, each against the first."""
    first = next(iter(runs.values()))
    lines = [
        "| ranks | last loss | losses differ by | norms differ by | tokens/s | peak GB a rank |",
        "| ---: " * 6 + "|",
    ]
    for ranks, steps in runs.items():
        loss, norm = (
            max(abs(mine[name] / theirs[name] - 1) for mine, theirs in zip(steps, first, strict=True))
            for name in ("loss", "grad_norm")
        )
        speed = median(step["tokens_per_second"] for step in steps[min(WARMUP, len(steps) - 1) :])
        peak = steps[-1]["peak_memory_gb"]
        lines.append(f"| {ranks} | {steps[-1]['loss']:.6f} | {loss:.1e} | {norm:.1e} | {speed:,.0f} | {peak:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    given = parser.parse_args()
    try:
        runs = {
            ranks: measure(given.recipe, given.overrides, ranks, given.output / str(ranks)) for ranks in given.ranks
        }
    except BenchError as error:
        sys.exit(f"error: {error}")
    print(compare(runs))


if __name__ == "__main__":
    main()
