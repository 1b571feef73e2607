"""A finished run as a folder to give away: the model or its adapters, and a card that says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.report import REPORT_FILE
from sparsetrain.modeling.adapters import load_adapters, merge_adapters
from sparsetrain.modeling.storage import ADAPTER_FILE, save
from sparsetrain.recipe import Recipe, load_recipe
from sparsetrain.recipe.describe import attention_facts

CARD = "README.md"


def publish(run: Path, out: Path, *, merge: bool = False) -> Path:
    """Write what a run trained into ``out``, with a model card.

    Args:
        run: the run folder.
        out: a new or empty folder.
        merge: fold LoRA adapters into the base, so that an ordinary model comes out.

    Returns:
        The model card.

    Raises:
        CheckpointError: the run has not finished, there is nothing to merge, or ``out`` cannot be written.
        ModelError: the base of the adapters cannot be loaded.
    """
    final = run / "final"
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder (no recipe.yaml); give the folder that holds final/")
    if not final.is_dir():
        raise CheckpointError(
            f"{run} has no final/: the run has not finished, or checkpoint.export was off; continue it with --resume"
        )
    recipe = load_recipe(run / "recipe.yaml").recipe
    adapters = (final / ADAPTER_FILE).is_file()
    if merge and not adapters:
        raise CheckpointError(f"{final} holds a whole model, so there is nothing to merge; leave --merge out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already and is not an empty folder; give another name")
    try:
        if merge:
            _merged(final, out)
        else:
            shutil.copytree(final, out, dirs_exist_ok=True)
        if (run / "report.png").is_file():
            shutil.copyfile(run / "report.png", out / "report.png")
        (out / CARD).write_text(_card(recipe, run, adapters and not merge), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    return out / CARD


def _merged(final: Path, out: Path) -> None:
    import transformers
    from transformers import AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    model = merge_adapters(load_adapters(final))
    save(model, out, AutoTokenizer.from_pretrained(final))


def _card(recipe: Recipe, run: Path, adapters: bool) -> str:
    """The model card in the Hub's format: YAML, then Markdown."""
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
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
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
        f"model = sparsetrain.load(folder)  # {what}",
        "```",
        "",
        *_evaluation(run),
        "## Recipe",
        "",
        f"Trained by this recipe, with Python {environment['python']}, {versions}.",
        "",
        "```yaml",
        (run / "recipe.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ]
    return "\n".join(parts)


def _evaluation(run: Path) -> list[str]:
    """What the run measured, from its report."""
    report = run / REPORT_FILE
    if not report.is_file():
        return ["## Evaluation", "", "Nothing was measured in the run.", ""]
    _, *lines = report.read_text(encoding="utf-8").rstrip().splitlines()
    return ["## Evaluation", *(f"#{line}" if line.startswith("#") else line for line in lines), ""]
