"""Merge adapters into their base, write an ordinary model, and verify it by loading it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import GENERATION_CONFIG_NAME

from sparsetrain.durable import copy_files
from sparsetrain.errors import CheckpointError
from sparsetrain.modeling import load, save
from sparsetrain.modeling.adapter_folder import WEIGHTS_FILE, load_adapters
from sparsetrain.modeling.adapters import merge_adapters
from sparsetrain.modeling.places import ADAPTER_FILE
from sparsetrain.modeling.records import RECORD_FILE
from sparsetrain.modeling.reread import checksums, logits, relative_error, rounding

TOKENS = 32
"""Number of tokens for comparing logits."""

OF_ADAPTERS = frozenset({ADAPTER_FILE, WEIGHTS_FILE, RECORD_FILE, GENERATION_CONFIG_NAME})
"""The files of an adapter folder besides the tokenizer."""


def write_merged(adapters: Path, target: Path, base: str | None, *, trust_remote_code: bool = False) -> None:
    """Merge the adapters of a folder into their base, write the model to ``target``, and compare the logits of three
    models: with separate adapters, merged, and merged and reloaded. Only one of them is in memory at a time.

    Args:
        base: The location of the base, if it is not the recorded one.
        trust_remote_code: Load the base's own code.

    Raises:
        ModelError: The base cannot be loaded, or does not match the adapters.
        CheckpointError: The written model differs from the trained one.
    """
    transformers.utils.logging.disable_progress_bar()
    model: Any = load_adapters(adapters, base=base, trust_remote_code=trust_remote_code)
    dtype, beside = model.dtype, some_logits(model)
    model = merge_adapters(model)
    merged = some_logits(model)
    instead = "load the adapters without merging (sparsetrain.load) instead"
    check_logits("merged, the model's logits", merged, beside, dtype, instead)
    save(model, target)
    written = checksums(model)
    del model
    again: Any = load(target, dtype=dtype, trust_remote_code=trust_remote_code)
    check_same(written, checksums(again), "merged model")
    check_logits("loaded again, the merged model's logits", some_logits(again), merged, dtype, instead)
    copy_files(adapters, target, leave_out=OF_ADAPTERS)


def some_logits(model: Any) -> torch.Tensor:
    """The logits ``[1, T, vocabulary]`` of tokens spread over the vocabulary."""
    tokens = torch.linspace(0, model.config.get_text_config().vocab_size - 1, TOKENS).long()[None]
    return logits(model, tokens, model.device)


def check_logits(what: str, found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, instead: str) -> None:
    """Compare logits ``[1, T, vocabulary]`` with those of the model before it was changed.

    Args:
        instead: What the user may do.

    Raises:
        CheckpointError: They differ by more than rounding in ``dtype`` explains.
    """
    error, limit = relative_error(found, right), rounding(dtype)
    if not error <= limit:
        raise CheckpointError(
            f"{what} differ by {error:.3g} (relative RMS, limit {limit:g}) from those of the model before; {instead}"
        )


def check_same(written: dict[str, str], found: dict[str, str], what: str) -> None:
    """Compare the checksums of a model's tensors with those of the model loaded again.

    Raises:
        CheckpointError: They differ; names the first tensor.
    """
    if faults := sorted(_differences(written, found)):
        raise CheckpointError(f"the reloaded {what} differs from the saved one: {faults[0]}")


def _differences(written: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in written.keys() - found.keys())
    yield from (f"{name} was not there" for name in found.keys() - written.keys())
    yield from (f"{name} is different" for name in written.keys() & found.keys() if written[name] != found[name])
