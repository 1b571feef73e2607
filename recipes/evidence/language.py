"""Train a language model with every method at one budget of keys, and tell what each keeps of text and of facts.

    python -m sparsetrain.recipes.evidence.language language --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.language language --only power --only sliding train.steps=300

Facts are measured by the hops from the last block to theirs, as by :mod:`~sparsetrain.recipes.evidence.relay`; text by
the tokens trained on, as by :mod:`~sparsetrain.recipes.evidence.tokens`. Runs are those of
:mod:`~sparsetrain.recipes.evidence.run`, and are not repeated.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from sparsetrain.recipes.evidence import relay, tokens
from sparsetrain.recipes.evidence.run import attention_setting, choose, opened, train

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.tasks.recall import RecallSection
from sparsetrain.recipe import Recipe
from sparsetrain.source_section import DataSource

MEASURED = "facts.json"
KV_HEADS = 4
"""Of base.yaml's model, among which variants split distances."""
DOCUMENTS = 100
"""Held-out documents of each task."""
TASKS: dict[str, dict[str, Any]] = {
    "recall": {"synthetic": "recall", "keys": 8},
    "needles": {"synthetic": "multikey", "keys": 4, "distractors": 8},
    "passkey": {"synthetic": "passkey"},
}


def methods(recipe: Recipe) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """The attention section of each method, and the settings it needs, at the budget of a power recipe.

    Raises:
        typer.BadParameter: the recipe's attention is not power.
    """
    power, blocks = relay.the_power(recipe), recipe.sequence.length // relay.the_power(recipe).block
    keys = power.pattern().max_key_blocks(blocks) * power.block
    sections = {**relay.with_hybrids(power, blocks, KV_HEADS), **tokens.chosen_keys(keys)}
    # As needles found it (docs/evidence.md): k shrinks, and nothing favours near tokens.
    sections["sparsek"] |= {"slope": 0.0, "topk_start": 4 * keys, "topk_steps": 0.6}
    return {name: (section, [tokens.SCORERS] * (name == "sparsek")) for name, section in sections.items()}


def tasks(length: int) -> dict[str, RecallSection]:
    """The tasks whose facts have a place, in documents of one length."""
    return {
        name: RecallSection(source=DataSource(**source, lengths=[length]), documents=DOCUMENTS)
        for name, source in TASKS.items()
    }


def main(
    recipe: Annotated[str, typer.Argument(help="language, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each method; 2 and 3 by default.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare methods with one budget of keys in a language model."""
    file, loaded = opened(recipe, settings)
    chosen = choose(methods(loaded), only)
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)
    length, block = loaded.sequence.length, relay.the_power(loaded).block

    def run(case: tuple[int, str]) -> tuple[int, str, Path]:
        number, name = case
        folder = relay.run_folder(out, name, number)
        section, own = chosen[name]
        own = [*(settings or []), attention_setting(section), *own, "checkpoint.export=true"]
        train(file, name, number, own, folder)
        return number, name, folder

    facts: dict[str, list[relay.Outcome]] = {name: [] for name in TASKS}
    curves = []
    with ThreadPoolExecutor(parallel) as pool:
        for number, name, folder in pool.map(run, product(seed or [2, 3], chosen)):
            measured = folder / MEASURED
            if not measured.exists():
                found = relay.measure(str(folder), chosen[name][0], tasks(length), block, name, number)
                measured.write_text(json.dumps({task: asdict(of) for task, of in found.items()}) + "\n")
            for task, of in json.loads(measured.read_text()).items():
                facts[task].append(relay.Outcome(**of))
            curves.append(tokens.curve(folder, name, number, length * loaded.train.micro_batch))
            print(name, number, {task: sum(of[-1].found) for task, of in facts.items()}, curves[-1].points, flush=True)
    tables = [f"## {task}\n\n{relay.table(outcomes)}" for task, outcomes in facts.items()]
    tables += [tokens.table(curves, measure) for measure in (tokens.PERPLEXITY, tokens.KEY_TOKENS)]
    report = {"facts": {task: list(map(asdict, of)) for task, of in facts.items()}, "text": list(map(asdict, curves))}
    (out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    run_script(main)
