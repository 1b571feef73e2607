"""A ``model.path`` that is a folder of adapters: the recipe means its base model, and training begins with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sparsetrain.recipe.yaml_source import Source


def begin_with_adapters(source: Source) -> list[str]:
    """Replace a ``model.path`` that is a run's folder of adapters by its base, and add ``train.start``; returns notes.

    Any other folder stays as it is: loading it reports what is wrong with it.
    """
    model, train = source.data.get("model"), source.data.get("train")
    path = model.get("path") if isinstance(model, dict) else None
    if not isinstance(path, str) or not isinstance(train, dict):
        return []
    folder = Path(os.path.expanduser(path))
    base = _recorded_base(folder)
    if base is None:
        return []
    model |= {"path": base["path"], "revision": base.get("revision")}
    model["config_overrides"] = {**(base.get("config_overrides") or {}), **(model.get("config_overrides") or {})}
    if base.get("add_tokens") and not model.get("add_tokens"):
        model["add_tokens"] = base["add_tokens"]
    if model.get("tokenizer") is None:
        model["tokenizer"] = str(folder) if (folder / "tokenizer_config.json").is_file() else base.get("tokenizer")
    train["start"] = str(folder)
    use = "merged into it first" if source.data.get("lora") is None else "trained further"
    return [
        f"model.path={path} holds adapters: model.path is their base, {base['path']}, and train.start the adapters, "
        f"which are {use}"
    ]


def _recorded_base(folder: Path) -> dict[str, Any] | None:
    """The ``model`` section in the record of an adapter folder; None of any other folder."""
    try:
        if not (folder / "adapter_config.json").is_file():
            return None
        model = json.loads((folder / "sparsetrain.json").read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return model if isinstance(model, dict) and isinstance(model.get("path"), str) else None
