"""The rows of ``sparsetrain compare-decode``: settings with fields of their own, and other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsetrain.errors import ModelError
from sparsetrain.evaluation.decode_answers import Answerer, Question
from sparsetrain.evaluation.decode_settings import Asked
from sparsetrain.generation.setting_text import read_value, split_setting
from sparsetrain.inference.models import Source
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


def answer_with(
    found: Source, kind: torch.dtype | None, place: torch.device, asked: tuple[list[Question], int, int]
) -> Answerer:
    """Another model that answers the questions.

    Args:
        asked: the questions, the tokens that may follow an answer, and documents at a time.
    """
    questions, extra, batch = asked
    model = found.load(kind).eval().to(place)
    return Answerer(model, found.tokenizer, questions, extra=extra, batch=batch)
