"""Save sparsified models, and build the model of a recipe."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling.attention.name import check_attends
from sparsetrain.modeling.boundary import explained
from sparsetrain.modeling.configs import config_source, take_special_tokens
from sparsetrain.modeling.layers import new_modules, sparsify
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.records import RECORD_FILE
from sparsetrain.modeling.side_files import check_side_files
from sparsetrain.modeling.tokenizers import check_vocabulary, tokenizer_and_new_tokens
from sparsetrain.modeling.vocabulary import fit_vocabulary
from sparsetrain.modeling.weight_files import WEIGHTS_FIELD
from sparsetrain.modeling.weights import load_weights, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import ModelSection


def save(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a transformers folder: weights, config with the method, tokenizer if given, and ``sparsetrain.json``.

    Args:
        state_dict: The weights ``[...]`` by name, if the model itself holds only shards of them (ZeRO-3).

    Raises:
        ModelError: The model is not sparsified, contains LoRA adapters, or uses another method than the recorded one.
    """
    record = getattr(model.config, "sparsetrain", None)
    if record is None:
        raise ModelError("this model has no attention method to save; call sparsetrain.sparsify(model, ...) first")
    check_attends(model)
    if getattr(model, "peft_config", None) is not None:
        raise ModelError(
            "this model has LoRA adapters, which an ordinary folder cannot hold; merge them into the weights first "
            "(sparsetrain.modeling.adapters.merge_adapters, or merge_and_unload of a PeftModel), or save only the "
            "adapters (sparsetrain.modeling.adapter_folder.save_adapters)"
        )
    path = Path(path)
    model.save_pretrained(path, state_dict=None if state_dict is None else dict(state_dict))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    about = {**record, "base": model.config._name_or_path, "versions": versions}
    write_record(path, about)


def write_record(path: Path, about: Mapping[str, Any]) -> None:
    """Write ``sparsetrain.json`` as the last file of a folder, and set its file mode on the weights.

    safetensors creates files that only the owner can read; ``sparsetrain.json`` follows the user's umask.
    """
    record = path / RECORD_FILE
    record.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for weights in path.glob("*.safetensors"):
        with suppress(OSError):  # some file systems have no modes
            weights.chmod(record.stat().st_mode & 0o777)


def load_model(
    section: ModelSection, attention: Mapping[str, Any] | MethodConfig, *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a recipe, and install its attention method.

    ``attention`` replaces a method that the checkpoint records. If both are the same method, the modules it adds keep
    the checkpoint's weights.

    Args:
        section: The recipe's ``model`` section.
        attention: The recipe's ``attention`` section.
        seed: Seed of random weights (``model.architecture``).

    Raises:
        ModelError: The model or tokenizer cannot be loaded, they do not match, or the model does not support the
            method.
    """
    path = None if section.path is None else resolve(section.path, "model.path")
    if path:
        check_side_files(path)
    source = config_source(section)
    config = source.config()
    tokenizer, new = tokenizer_and_new_tokens(section)
    check_vocabulary(tokenizer, config, section.add_tokens)
    dtype, code = getattr(torch, section.dtype), {"trust_remote_code": section.trust_remote_code}
    if not path:
        take_special_tokens(config, tokenizer, section.architecture or {})
    skeleton = source.skeleton(config, **code)
    if path:
        options = {"revision": section.revision, **code}
        cut = "num_hidden_layers" in section.config_overrides
        model = load_weights(path, "model.path", cut=cut, config=config, dtype=dtype, **options)
    else:
        _check_memory(skeleton, dtype)
        with torch.random.fork_rng(devices=[]), explained("model.architecture"):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fit_vocabulary(model, tokenizer, section, new)
    attention, recorded = parse_attention(attention), getattr(config, "sparsetrain", None)
    sparsify(model, attention)
    if path and _names(recorded, attention):
        restore_new_modules(model, attention, path, {"revision": section.revision})
    return model, tokenizer


def _check_memory(skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse random weights that exceed the host's memory: the system would kill the process without a message."""
    needed = skeleton.num_parameters() * dtype.itemsize
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        raise ModelError(
            f"model.architecture: {skeleton.num_parameters():,} random weights take {needed / 2**30:,.0f} GiB, and "
            f"this host has {held / 2**30:,.0f} GiB of memory; make the model smaller"
        )


def restore_new_modules(model: PreTrainedModel, attention: MethodConfig, path: str, hub: dict[str, Any]) -> bool:
    """Load the weights of the modules that the method adds from a checkpoint, because transformers drops them.

    Returns:
        False if the checkpoint holds none of them.

    Raises:
        ModelError: The checkpoint holds only some of them, or some of another shape.
    """
    added = new_modules(model, attention)
    wanted = {f"{name}.{key}": tensor for name, module in added.items() for key, tensor in module.state_dict().items()}
    weights = getattr(model.config, WEIGHTS_FIELD, None)
    places = {place: name for name, tensor in wanted.items() for place in _names_on_disk(model, name, tensor)}
    saved = {places[place]: tensor for place, tensor in read_tensors(path, places.keys(), hub, weights).items()}
    if not saved:
        return not wanted
    for name, tensor in wanted.items():
        if name not in saved or saved[name].shape != tensor.shape:
            found = f"a tensor of shape {tuple(saved[name].shape)}" if name in saved else "nothing"
            raise ModelError(
                f"{path} holds {found} for {name}, where attention.method={attention.method} needs one of shape "
                f"{tuple(tensor.shape)}; use the attention section that the checkpoint was trained with"
            )
    for name, module in added.items():
        module.load_state_dict({key: saved[f"{name}.{key}"] for key in module.state_dict()})
    return True


def _names_on_disk(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> set[str]:
    """The possible names of a tensor in a checkpoint: as in the model, and as transformers renames it in saving."""
    return {name, *revert_weight_conversion(model, {name: tensor})}


def _names(record: Any, attention: MethodConfig) -> bool:
    """Whether a record (of any type) names the same method."""
    section = record.get("attention") if isinstance(record, dict) else None
    return isinstance(section, dict) and section.get("method") == attention.method
