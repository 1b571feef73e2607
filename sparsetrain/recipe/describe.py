"""Descriptions of recipes: one-line facts, a listing with a comment on every field, and the JSON Schema for editors."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sparsetrain.methods.base import DenseLayerRule
from sparsetrain.recipe.batch import batch_shape, plan_batch
from sparsetrain.recipe.heads import attention_heads
from sparsetrain.recipe.local_model import num_layers
from sparsetrain.recipe.schema import Recipe
from sparsetrain.recipe.yaml_source import dump_yaml


def batch_facts(recipe: Recipe, ranks: int) -> str:
    """The batch arithmetic in one line; with ``train.epochs`` without the steps, which depend on the data.

    Raises:
        RecipeError: The global batch is not possible on this number of ranks.
    """
    if recipe.train.epochs is not None:
        epochs = "1 epoch" if recipe.train.epochs == 1 else f"{recipe.train.epochs:g} epochs"
        return f"{batch_shape(recipe, ranks).describe()}; {epochs}"
    return plan_batch(recipe, ranks).describe()


def attention_facts(recipe: Recipe) -> str:
    """The method, the fraction of causal pairs that its layers compute at the training length, and the dense layers."""
    attention, length = recipe.attention, recipe.sequence.length
    parts = [f"{attention.method} attention"]
    heads = attention_heads(recipe.model)
    pattern = attention.pattern(1 if heads is None else heads[1])
    if pattern is not None and (heads is not None or not pattern.per_head):
        share = pattern.mean_density(length)
        within = " in its layers" if attention.dense_layers else ""
        parts.append(f"{share:.1%} of causal pairs{within} at {length:,} tokens in blocks of {pattern.block}")
    dense, layers = attention.dense_layers, num_layers(recipe.model)
    if layers is not None and attention.method != "full":
        parts.append(f"{len(attention.resolve_dense_layers(layers))} of {layers} layers dense")
    elif isinstance(dense, DenseLayerRule):
        parts.append(f"{dense.count} in every {dense.every} layers dense")
    elif dense:
        parts.append(f"layers {', '.join(map(str, dense))} dense")
    return ", ".join(parts)


def summary(file: Path) -> str:
    """The summary of a recipe file: the first sentence of its opening comment."""
    comment = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#") or not text:
            break
        comment.append(text)
    sentence, _, _ = " ".join(comment).partition(". ")
    return sentence.removesuffix(".")


def explained(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with its description as a comment above each field."""
    return "\n".join(_explain(recipe, "")) + "\n"


def _explain(section: BaseModel, indent: str, comments: bool = True) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        about = " ".join((field.description or "").split()) if comments else ""
        if isinstance(value, BaseModel) and not indent:
            yield ""
        mark = f"{indent}# "
        yield from textwrap.wrap(about, 110, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _explain(value, indent + "  ", comments)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield f"{indent}{name}:"
            for position, item in enumerate(value):
                known = any(type(item) is type(earlier) for earlier in value[:position])
                lines = list(_explain(item, indent + "    ", comments=not known))
                yield f"{indent}  - {lines[0].lstrip()}"
                yield from lines[1:]
        else:
            text = dump_yaml({name: section.model_dump(mode="json", include={name})[name]})
            yield from textwrap.indent(text, indent).rstrip("\n").split("\n")


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe *file*, for completion and checks in editors.

    A file may inherit required fields from its ``base``, so nothing is required here; `sparsetrain recipe validate`
    checks that a recipe is complete.
    """
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    schema["properties"]["base"] = {
        "type": "string",
        "title": "Base",
        "description": "Recipe to inherit from: a path relative to this file, or the name of a shipped recipe. "
        "Mappings merge, lists and scalars replace.",
    }
    _relax(schema)
    return schema


def _relax(node: Any) -> None:
    if isinstance(node, list):
        for item in node:
            _relax(item)
    elif isinstance(node, dict):
        if isinstance(node.get("required"), list):
            del node["required"]
        # Without required fields a section can match several methods, so oneOf would fail.
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
            node.pop("discriminator", None)
        for value in node.values():
            _relax(value)
