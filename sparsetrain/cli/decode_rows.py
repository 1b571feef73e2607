"""The rows of ``sparsetrain compare-decode``: settings with fields of their own, and other models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sparsetrain.errors import ModelError
from sparsetrain.evaluation.decode_answers import Answerer
from sparsetrain.evaluation.decode_settings import Asked
from sparsetrain.generation.setting_text import read_value, split_setting
from sparsetrain.inference.models import Source, find_model
from sparsetrain.modeling.layers import attention_density
from sparsetrain.modeling.positions import position_limit


def read_setting(text: str) -> Asked:
    """What ``--setting`` was given.

    Raises:
        ModelError, RecipeError: it has no name, or a part is no field.
    """
    name, fields = split_setting("--setting", text)
    if name is None:
        raise ModelError(f"--setting {text} has no name; write one before its fields, as in twilight,prune.p=0.9")
    return Asked(text, name, {field: read_value(f"--setting {name},{field}", value) for field, value in fields.items()})


def models_beside(
    places: list[str], first: Source, tokens: int, load: Callable[[Source], Answerer]
) -> dict[str, Callable[[], Answerer]]:
    """Other models by the name of their row; each is loaded when its row is measured.

    Args:
        places: runs or models, as ``--beside`` was given.
        first: the model whose settings are compared.
        tokens: of the longest document with its answer.
        load: loads a model that answers the questions.

    Raises:
        ModelError: one cannot answer the same questions, attends fully, or is given twice.
    """
    models: dict[str, Callable[[], Answerer]] = {}
    for place in places:
        found = find_model(place)
        label = label_beside(place, found, first, tokens)
        if label in models:
            raise ModelError(f"--beside {place}: there is a row {label} already; give it once")
        models[label] = partial(load, found)
    return models


def label_beside(place: str, found: Source, first: Source, tokens: int) -> str:
    """The row of another model, which can answer the same questions.

    Args:
        tokens: of the longest document with its answer.

    Raises:
        ModelError: it cannot, or it attends fully.
    """
    if found.tokenizer.get_vocab() != first.tokenizer.get_vocab():
        raise ModelError(f"--beside {place} has other tokens than {first.path}; give a model of the same tokenizer")
    limit = position_limit(found.outline)
    if limit is not None and tokens > limit:
        raise ModelError(f"--beside {place} has {limit} positions, but a document and its answer are {tokens} tokens")
    if min(attention_density(found.outline, tokens)) == 1.0:
        raise ModelError(
            f"--beside {place} reads all of {tokens} tokens; give a model whose attention leaves some out, or longer "
            "documents"
        )
    record: Any = found.outline.config.sparsetrain
    folder = Path(place)
    name = folder.parent.name if folder.name == "final" else folder.name
    return f"{name} ({record['attention']['method']})"
