"""The model card of a run: the model, its training and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from sparsetrain.durable import read_bytes
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.report import REPORT_FILE, read_results
from sparsetrain.recipe import Recipe
from sparsetrain.recipe.describe import attention_facts
from sparsetrain.training.output.run_folder import label_at_end, read_history


def model_card(recipe: Recipe, run: Path, *, adapters: bool) -> str:
    """The card in the Hub's format: YAML, then Markdown.

    Args:
        run: The run folder.
        adapters: Whether the folder holds only adapters.
    """
    base = recipe.model.path
    named = base is not None and not base.startswith(("/", ".", "~", "sparsetrain:"))
    tags = ["sparsetrain", "sparse-attention", recipe.attention.method, *(["lora"] if recipe.lora else [])]
    head = {
        **({"base_model": base} if named else {}),
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    kind = "LoRA adapters for" if adapters else "A finetune of" if base else "Pretrained from"
    origin = base or f"random weights ({(recipe.model.architecture or {}).get('model_type')})"
    what = "the base, its attention method and the adapters" if adapters else "with its attention method"
    parts = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"{kind} {origin} at {recipe.sequence.length:,} tokens: {attention_facts(recipe)}. Made with sparsetrain.",
        "",
        "```python",
        "import sparsetrain",
        "",
        'folder = "."  # the folder of this card',
        f"model = sparsetrain.load(folder)  # {what}",
        "```",
        "",
        *_evaluation(recipe, run),
        "## Recipe",
        "",
        f"Trained by this recipe, {_versions(run)}.",
        "",
        "```yaml",
        (run / "recipe.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "",
        *_history(run),
    ]
    return "\n".join(parts)


def _history(run: Path) -> list[str]:
    """The changes of the recipe when the run was resumed."""
    lines = read_history(run)
    return ["Changed during the run:", "", *(f"- {line}" for line in lines), ""] if lines else []


def _versions(run: Path) -> str:
    """The versions of Python and packages that the run recorded. If they are missing, the export does not fail."""
    try:
        environment = json.loads(read_bytes(run / "environment.json"))
        versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
        return f"with Python {environment['python']}, {versions}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "with versions that are not known: the run's environment.json is missing or damaged"


def _evaluation(recipe: Recipe, run: Path) -> list[str]:
    """The results of the run from its report, with a note if the final evaluation is missing."""
    try:
        results = read_results(run)
    except (CheckpointError, OSError):  # damaged: treated as missing
        results = {}
    notes = []
    if recipe.eval.at_end and not recipe.eval.empty and label_at_end(recipe) not in results:
        notes = [
            "**The trained model was not evaluated:** the run stopped before the evaluation at its end. Continue it "
            "with `--resume` and export it again to see the result here.",
            "",
        ]
    elif not results:
        notes = ["Nothing was measured in the run.", ""]
    report = run / REPORT_FILE
    lines = report.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[2:] if report.is_file() else []
    return ["## Evaluation", "", *notes, *(f"#{line}" if line.startswith("#") else line for line in lines), ""]
