"""The model card of a run: the model, its training and its evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sparsetrain.durable import read_bytes
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.report import REPORT_FILE, read_results
from sparsetrain.evaluation.result import EvalResult as RunResult
from sparsetrain.recipe import Recipe
from sparsetrain.recipe.describe import attention_facts
from sparsetrain.recipe.local_model import OWN_MODELS
from sparsetrain.recipe.yaml_source import dump_yaml
from sparsetrain.source_section import DataSource
from sparsetrain.training.changes import read_history
from sparsetrain.training.output.public_recipe import lies_here, public_recipe, without_places
from sparsetrain.training.output.run_folder import label_at_end

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def model_card(
    recipe: Recipe,
    run: Path,
    base: str | None = None,
    *,
    adapters: bool,
    license: str | None = None,
    repository: str | None = None,
) -> str:
    """The card in the Hub's format: YAML, then Markdown. It names no folder of this machine.

    Args:
        run: The run folder.
        base: The Hub id or folder of the base, if it is not the recipe's.
        adapters: Whether the folder holds only adapters.
        license: Its identifier on the Hub; by default that of the base, where it is known.
        repository: ``ORG/NAME`` on the Hub, where the folder will be.
    """
    base = base or recipe.model.path
    settings, replaced = public_recipe(recipe)
    origin = _origin(base, recipe)
    kind = "LoRA adapters for" if adapters else "A finetune of" if base else "Pretrained from"
    parts = [
        "---",
        _head(recipe, run, base, adapters, license or license_of(base)),
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"{kind} {origin} at {recipe.sequence.length:,} tokens: {attention_facts(recipe)}. Made with sparsetrain.",
        "",
        *_usage(repository, adapters),
        "## Data",
        "",
        *(f"- {_describe(source)}" for source in recipe.data.sources),
        "",
        *_evaluation(recipe, run),
        "## Recipe",
        "",
        f"Trained by this recipe, {_versions(run)}.",
        "",
        "<details>",  # a page long
        "<summary>Every setting, defaults included</summary>",
        "",
        "```yaml",
        dump_yaml(settings).rstrip(),
        "```",
        "",
        "</details>",
        "",
        *_history(run),
    ]
    return without_places("\n".join(parts), {**replaced, str(run): run.name})


def license_of(base: str | None) -> str | None:
    """The license in the card of a base model, where that card is on this machine."""
    import yaml
    from huggingface_hub import metadata_load, try_to_load_from_cache

    if base is None:
        return None
    if base.startswith(OWN_MODELS):
        return "apache-2.0"
    file = os.path.join(os.path.expanduser(base), "README.md")
    if not lies_here(base):
        found = try_to_load_from_cache(base, "README.md") if base.count("/") <= 1 else None
        file = found if isinstance(found, str) else ""
    try:
        head = metadata_load(file) if os.path.isfile(file) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = (head or {}).get("license")
    return named if isinstance(named, str) else None


def _head(recipe: Recipe, run: Path, base: str | None, adapters: bool, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    hub = sorted({source.path for source in recipe.data.sources if source.path and _is_hub_data(source)})
    data = ModelCardData(
        base_model=base if base and not lies_here(base) and not base.startswith(OWN_MODELS) else None,
        datasets=hub or None,
        library_name="peft" if adapters else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=["sparsetrain", "sparse-attention", recipe.attention.method, *(["lora"] if recipe.lora else [])],
        model_name=recipe.name,
        eval_results=list(_metrics(recipe, run)) or None,
    )
    return data.to_yaml()


def _metrics(recipe: Recipe, run: Path) -> Iterator[EvalResult]:
    """The numbers of the last evaluation for the Hub's ``model-index``."""
    from huggingface_hub import EvalResult

    result = _results(run).get(label_at_end(recipe))
    for name, measured in ({} if result is None else result.tasks).items():
        for ending, value in measured.metrics().items():
            if math.isfinite(value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=measured.task,
                    dataset_name=name,
                    metric_type=measured.task,
                    metric_name=f"{name}{ending}",
                    metric_value=round(value, 6),
                )


def _origin(base: str | None, recipe: Recipe) -> str:
    if base is None:
        return f"random weights ({(recipe.model.architecture or {}).get('model_type')})"
    return PurePath(base).name if lies_here(base) else base


def _usage(repository: str | None, adapters: bool) -> list[str]:
    """How it is generated with: by its name on the Hub, or from the folder of the card."""
    place = "." if repository is None else repository
    here = "# the folder of this card"
    fetched: list[str] = []
    if repository is not None and adapters:
        place = PurePath(repository).name
        fetched, here = [f"hf download {repository} --local-dir {place}"], "# downloaded as above"
    what = "the base, its attention method and the adapters" if adapters else "with its attention method"
    return [
        "```",
        *fetched,
        f'sparsetrain generate {place} --prompt "Once upon a time"',
        "```",
        "",
        "```python",
        "import sparsetrain",
        "",
        f'folder = "{place}"  {here if repository is None or adapters else ""}'.rstrip(),
        f"model = sparsetrain.load(folder)  # {what}",
        "```",
        "",
        "It was trained to attend sparsely. Without sparsetrain (transformers, vLLM, SGLang) it attends to every key.",
        "",
    ]


def _is_hub_data(source: DataSource) -> bool:
    path = source.path or ""
    return path.count("/") == 1 and not lies_here(path) and not any(sign in path for sign in "*?[")


def _describe(source: DataSource) -> str:
    """A source in a line: what it is, without its folder."""
    if source.path is None:
        return f"{source.synthetic} prompts, generated"
    split = f", split `{source.split}`"
    if _is_hub_data(source):
        return f"[{source.path}](https://huggingface.co/datasets/{source.path}){split}"
    return f"`{PurePath(source.path).name}`" + (split if source.path == "python-stdlib" else ", local files")


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


def _results(run: Path) -> dict[str, RunResult]:
    try:
        return read_results(run)
    except (CheckpointError, OSError):  # damaged: treated as missing
        return {}


def _evaluation(recipe: Recipe, run: Path) -> list[str]:
    """The results of the run from its report, with a note if the final evaluation is missing."""
    results = _results(run)
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
