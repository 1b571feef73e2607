"""A model without its weights, from the small files of its folder: for checks that need not wait for the weights."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling.adapter_folder import load_end_tokens, of_adapters
from sparsetrain.modeling.boundary import explained
from sparsetrain.modeling.configs import config_source, saved_source
from sparsetrain.modeling.decode_section import restore_decode
from sparsetrain.modeling.layers import sparsify
from sparsetrain.modeling.places import ADAPTER_FILE, resolve
from sparsetrain.modeling.records import RECORD_FILE, adapters_record, recorded_attention, recorded_decode
from sparsetrain.modeling.side_files import check_side_files, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsetrain.modeling.configs import ConfigSource


def outline(path: str, field: str) -> PreTrainedModel:
    """The model of a folder or Hub id on the meta device, with its attention method, decode section and generation
    config. A model that records no method attends fully.

    Args:
        path: of a model or of adapters, whose base is taken.
        field: the name of the model in error messages.

    Raises:
        ModelError: a file is damaged, the base of adapters is not found, or the model cannot take the method.
    """
    folder = Path(path)
    check_side_files(path)
    if (folder / ADAPTER_FILE).is_file():
        section, attention, _ = adapters_record(folder)
        decode = recorded_decode(read_object(folder / RECORD_FILE), path)
        with of_adapters(folder):
            base = None if section.path is None else resolve(section.path, "model.path")
            model = _without_weights(config_source(section), base)
        load_end_tokens(model, folder)
    else:
        source = saved_source(path, field)
        record: Any = source.values.get("sparsetrain")
        attention = parse_attention({"method": "full"}) if record is None else recorded_attention(record, path)
        decode = None if record is None else recorded_decode(record, path)
        model = _without_weights(source, path)
    # Modules that a method adds have no weights either, and it does not take those of the model for offloaded.
    with torch.device("meta"):
        sparsify(model, attention)
    return restore_decode(model, decode)


def _without_weights(source: ConfigSource, path: str | None) -> PreTrainedModel:
    """The model of a config, with the generation config that stands beside it."""
    model = source.skeleton(source.config())
    if path is not None:
        # Without such a file, transformers goes by the config, and so does the skeleton.
        with explained(f"the generation config of {path}"), suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model
