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
from sparsetrain.modeling.adapters import WEIGHTS_FILE, load_adapters, merge_adapters
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
    tokens = _tokens(model.config.get_text_config().vocab_size)
    dtype, beside = model.dtype, _logits(model, tokens)
    model = merge_adapters(model)
    merged = _logits(model, tokens)
    _check("merged, the model's logits", merged, beside, dtype)
    save(model, target)
    written = checksums(model)
    del model
    again: Any = load(target, dtype=dtype, trust_remote_code=trust_remote_code)
    if faults := sorted(_differences(written, checksums(again))):
        raise CheckpointError(f"the reloaded merged model differs from the saved one: {faults[0]}")
    _check("loaded again, the merged model's logits", _logits(again, tokens), merged, dtype)
    copy_files(adapters, target, leave_out=OF_ADAPTERS)


def _tokens(vocabulary: int) -> torch.Tensor:
    """Tokens spread over the vocabulary, int64 ``[1, T]``."""
    return torch.linspace(0, vocabulary - 1, TOKENS).long()[None]


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return logits(model, tokens, model.device)


def _check(what: str, found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    error, limit = relative_error(found, right), rounding(dtype)
    if not error <= limit:
        raise CheckpointError(
            f"{what} differ by {error:.3g} (relative RMS, limit {limit:g}) from those of the base with separate "
            "adapters; load the adapters without merging (sparsetrain.load) instead"
        )


def _differences(written: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in written.keys() - found.keys())
    yield from (f"{name} was not there" for name in found.keys() - written.keys())
    yield from (f"{name} is different" for name in written.keys() & found.keys() if written[name] != found[name])
