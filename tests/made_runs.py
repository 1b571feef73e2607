"""Folders as runs leave them, made without training, and their pages as they are read."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from sparsetrain.evaluation.generative.tally import Tally
from sparsetrain.evaluation.report import write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.ruler.result import RulerResult
from sparsetrain.evaluation.survival import SURVIVAL_FILE, Survival
from sparsetrain.evaluation.tasks.passkey import PasskeyResult
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult
from sparsetrain.recipe import dump_recipe, load_recipe

LENGTHS = [512, 1024, 2048]
ATTACK = '<script>alert(1)</script> $x_1$ & "it\'s"'


class Words(HTMLParser):
    """The text of a page, its elements, and whatever it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.fetched = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:image/png;base64,")):
                self.fetched.append(value)

    def handle_data(self, data):
        self.text += data + "\n"


def rows(page: str) -> list[str]:
    """The rows of its tables, cells behind one another."""
    found = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [" | ".join(re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row)) for row in found]


def passkey(found: int, lengths: list[int] = LENGTHS) -> PasskeyResult:
    """So many of 8 prompts in every cell."""
    correct = [[found] * 5 for _ in lengths]
    return PasskeyResult(lengths=lengths, depths=[0.0, 0.25, 0.5, 0.75, 1.0], trials=8, digits=5, correct=correct)


def perplexity(*values: float) -> PerplexityResult:
    """At 512 tokens and on."""
    return PerplexityResult(perplexity=dict(zip(LENGTHS, values)), tokens=16384)


def results(**more: Any) -> dict[str, EvalResult]:
    """Of the model before and after training."""
    return {
        "full attention, before": EvalResult(
            tasks={"perplexity": perplexity(17.1, 53.4, 175.8), "passkey": passkey(3)}
        ),
        "power, before": EvalResult(tasks={"perplexity": perplexity(17.3, 53.3, 175.9), "passkey": passkey(3)}),
        "power, after": EvalResult(tasks={"perplexity": perplexity(19.0, 20.0, 22.4), "passkey": passkey(7)} | more),
    }


def lines(steps: int, layers: int = 6) -> list[dict[str, Any]]:
    """What a run of so many steps logs."""
    found = [
        {"step": 0, "model/parameters": 2.8e6, "cache/tokens": 3072, "cache/bytes": 1e7, "cache/bytes_full": 1.4e7}
        | {f"attention/density/layer_{layer:02}": 1.0 if layer == 5 else 0.13 for layer in range(layers)}
    ]
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "loss": 2 + 3 * math.exp(-3 * step / steps) + 0.1 * math.sin(step),
            "lr": 1e-3 * (1 - step / (steps + 1)),
            "tokens": 8192 * step,
            "tokens_per_second": 40000 + 1000 * math.sin(step),
            "peak_memory_gb": 1.5,
        }
        found.append(line | {f"sparsek/kept_mass/layer_{layer:02}": 0.9 - 0.1 * layer for layer in range(layers)})
    return [*found, {"step": 1, "eval/perplexity/2048": 30.1}, {"step": steps, "eval/perplexity/2048": 22.4}]


def record(folder: Path, step: int, **values: float) -> None:
    """A further line of metrics."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def make_run(
    folder: Path,
    *overrides: str,
    steps: int = 60,
    measured: dict[str, EvalResult] | None = None,
    name: str = "quickstart",
) -> Path:
    """A run folder of the quickstart."""
    folder.mkdir(parents=True)
    recipe = load_recipe("quickstart", overrides).recipe.model_copy(update={"name": name})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(steps)))
    (folder / "environment.json").write_text('{"python": "3.11.7", "packages": {"torch": "2.13.0", "triton": null}}')
    write_report(results() if measured is None else measured, folder, title=name)
    return folder


def add_selection(folder: Path) -> None:
    """The lifetimes that SparseK leaves."""
    lifetimes = torch.arange(2048, dtype=torch.int32).remainder(97).repeat(2, 1)
    Survival.of({0: lifetimes, 3: lifetimes}).save(folder / SURVIVAL_FILE)


def ruler() -> RulerResult:
    """Scores of three of its tasks."""
    tallies = {
        task: [Tally(asked=20, right=right, written=400, cut=3) for right in found]
        for task, found in {"niah_single_1": [20, 19], "niah_multikey_3": [9, 2], "qa_1": [12, 8]}.items()
    }
    return RulerResult(
        lengths=[4096, 8192],
        tallies=tallies,
        left_out={"qa_2": "no file"},
        prompt="plain",
        mirror=False,
        haystack="generated",
        words="generated",
    )
