"""Export a finished run as a folder to publish: the model or its adapters, and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparsetrain.durable import copy_files, flush, flush_all, read_bytes, remove_path
from sparsetrain.errors import CheckpointError, ModelError
from sparsetrain.modeling.adapter_folder import WEIGHTS_FILE
from sparsetrain.modeling.places import ADAPTER_FILE
from sparsetrain.modeling.records import RECORD_FILE
from sparsetrain.modeling.weight_files import weight_files
from sparsetrain.recipe import Recipe, load_recipe
from sparsetrain.training.output.convert import convert
from sparsetrain.training.output.folder_contents import MARK, PARTIAL, check_finished
from sparsetrain.training.output.merge import write_merged
from sparsetrain.training.output.model_card import model_card
from sparsetrain.training.output.public_recipe import lies_here, name_base

CARD = "README.md"
ALSO_DESCRIBED = ("tokenizer.json", "generation_config.json")
"""Optional files of a model."""


@dataclass(frozen=True)
class Export:
    """What is exported, and how."""

    merge: bool = False
    """Merge LoRA adapters into the base, which gives an ordinary model."""
    base: str | None = None
    """A Hub id or folder of the adapters' base instead of the recorded one, to merge into or to record."""
    dtype: str | None = None
    """Of the weights: ``float32``, ``bfloat16`` or ``float16``; None leaves them as they were trained."""
    license: str | None = None
    """Its identifier on the Hub; None for that of the base, where it is known."""
    repository: str | None = None
    """``ORG/NAME`` of the Hub that the folder is for."""


def publish(run: Path, out: Path, export: Export = Export()) -> Path:
    """Write the trained model of a run with a model card into ``out``, completely or not at all.

    A run that ended before its last evaluation may be published; the card then has a note.

    Args:
        run: The run folder.
        out: A new or empty folder.

    Returns:
        The path of the model card.

    Raises:
        CheckpointError: The run has not finished, something asked for has no effect, or ``out`` cannot be written.
        ModelError: The base of the adapters cannot be loaded, or merging changes the model's logits.
    """
    recipe = check_export(run, out, export)
    final, adapters = run / "final", recipe.lora is not None and not export.merge
    card = model_card(recipe, run, export.base, adapters=adapters, license=export.license, repository=export.repository)
    code = {"trust_remote_code": recipe.model.trust_remote_code}
    with _whole(out) as partial:
        if export.merge:
            write_merged(final, partial, export.base, **code)
        else:
            copy_files(final, partial)
        if export.dtype is not None:
            convert(partial, getattr(torch, export.dtype), **code)
        name_base(partial, export.base)
        if (run / "report.png").is_file():
            shutil.copyfile(run / "report.png", partial / "report.png")
        (partial / CARD).write_text(card, encoding="utf-8")
    return out / CARD


def check_export(run: Path, out: Path, export: Export) -> Recipe:
    """Refuse an export that cannot be made, before anything is written; returns the recipe of the run.

    Raises:
        CheckpointError: Names what is wrong.
    """
    final = run / "final"
    check_finished(run, out)
    recipe = load_recipe(run / "recipe.yaml").recipe
    adapters, kept = recipe.lora is not None, recipe.lora is not None and not export.merge
    if (fault := _fault(final, adapters)) is not None:
        raise CheckpointError(f"{final} is incomplete: {fault}; continue the run with --resume, which writes it again")
    if export.merge and not adapters:
        raise CheckpointError(f"{final} holds a full model, so there is nothing to merge; leave --merge out")
    if export.base == "":
        raise CheckpointError("--base is empty; give a Hub id or a folder, or leave it out")
    if export.base is not None and not adapters:
        raise CheckpointError(f"{final} holds a full model, which needs no base; leave --base {export.base} out")
    if export.dtype is not None and kept:
        raise CheckpointError(
            f"--dtype {export.dtype} is for the weights of a whole model; adapters stay as they were trained: add "
            "--merge, or leave it out"
        )
    base = export.base or str(recipe.model.path)
    if kept and export.repository is not None and lies_here(base):
        raise CheckpointError(
            f"--push {export.repository}: the adapters need their base {base}, a folder of this machine; give its Hub "
            "id with --base, or add --merge"
        )
    return recipe


def _fault(final: Path, adapters: bool) -> str | None:
    """A missing or incomplete file in the folder of a trained model; None if it is complete."""
    try:
        weights = [WEIGHTS_FILE] if adapters else weight_files(str(final), {}) or [SAFE_WEIGHTS_NAME]
    except ModelError as error:
        return f"{SAFE_WEIGHTS_INDEX_NAME} cannot be read ({error})"
    described = (ADAPTER_FILE if adapters else "config.json", "tokenizer_config.json", RECORD_FILE)
    for name in (*described, *weights):
        if not (final / name).is_file():
            return f"{name} is missing"
    for name in (*described, *(name for name in ALSO_DESCRIBED if (final / name).exists())):
        try:
            if not isinstance(json.loads(read_bytes(final / name)), dict):
                return f"{name} has unexpected content"
        except (OSError, ValueError, RecursionError) as error:
            return f"{name} cannot be read ({error})"
    for name in weights:
        try:
            with safe_open(final / name, framework="pt"):
                pass  # opening checks the file size against the header
        except (OSError, SafetensorError) as error:
            return f"{name} cannot be read ({error})"
    return None


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a subfolder of ``out`` to fill; its content moves up to ``out`` when complete, or else is removed."""
    partial, new = out / PARTIAL, not out.exists()
    moved: list[Path] = []
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / MARK).touch()
        yield partial
        flush_all(partial)
        for path in sorted(partial.iterdir()):
            if path.name != MARK:
                moved.append(path.rename(out / path.name))
        (partial / MARK).unlink()
        partial.rmdir()
        flush(out)
    except BaseException as error:
        for path in (*moved, out if new else partial):
            remove_path(path)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"cannot write {out}: {error}; nothing was left there: use a writable folder with enough free space"
            ) from error
        raise
