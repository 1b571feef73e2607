"""Load the weights of a checkpoint and check that they are exactly those of the model; none are initialised instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from sparsetrain.errors import ModelError
from sparsetrain.methods.registry import METHODS, config_or_none
from sparsetrain.modeling.boundary import explained
from sparsetrain.modeling.foreign import check_weight_files
from sparsetrain.modeling.places import HUB_ARGUMENTS, remedy
from sparsetrain.modeling.quantized import check_packed, finish_unpacking, unpack_when_loaded, without_scales
from sparsetrain.modeling.weight_files import WEIGHTS_FIELD, locate, stored_shapes, weight_files

NAMED = 3
"""The number of tensors that a message names."""

ROWS = 8192
"""Number of elements of two tensors compared at once."""


def load_weights(path: str, field: str, *, cut: bool = False, **options: Any) -> PreTrainedModel:
    """Load a model with all weights of its checkpoint; missing weights are an error.

    Args:
        field: The name of the setting in error messages.
        cut: Whether the model is meant to have fewer layers than its checkpoint.
        options: Options of ``AutoModelForCausalLM.from_pretrained``, including the config.

    Raises:
        ModelError: A file cannot be read or is not safetensors; a tensor is missing, has another shape or is not
            finite; the config ties embeddings that the checkpoint stores twice; or packed weights cannot be unpacked.
    """
    what = f"{field}={path!r}"
    options = {"trust_remote_code": False, "use_safetensors": True, **options}
    if not options["use_safetensors"]:
        raise ModelError("use_safetensors=False: weights are read only from safetensors; leave it out")
    config = options["config"] = copy.deepcopy(options["config"])
    hub = {name: options[name] for name in HUB_ARGUMENTS & options.keys()}
    with explained(f"{what} cannot be loaded", remedy(field, path)):
        files = check_weight_files(path, getattr(config, WEIGHTS_FIELD, None), options.get("variant"), **hub)
        packed = options.get("quantization_config") is None and unpack_when_loaded(config, what)
        if packed:
            check_packed(config, stored_shapes(_located(path, files, hub)), what)
    with explained(f"{what} cannot be loaded", remedy(field, path)), _expecting_new_modules(config):
        # Mismatches are reported below: the error of transformers names no tensor.
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    model, info = loaded
    _check_complete(model, info, what, cut=cut)
    if packed:
        with explained(f"{what} cannot be unpacked"):
            model = finish_unpacking(model, what)
    if _has_own_head(model):
        raise ModelError(_not_tied(what))
    if broken := [tensor for tensor, weights in model.named_parameters() if not _finite(weights)]:
        raise ModelError(f"{what} holds weights that are not finite (NaN or infinity): {_some(broken)}")
    return model


def check_headers(path: str, field: str, kind: type[PreTrainedModel], config: Any, *, cut: bool = False) -> None:
    """Compare the tensors in a local folder's files with those that the config's model needs.

    Only headers are read, and an output head next to an embedding to which it should be tied.

    Args:
        field: The name of the setting in error messages.
        kind: The class of the model.
        cut: Whether the model is meant to have fewer layers than its checkpoint.

    Raises:
        ModelError: A file is incomplete or not safetensors; a tensor is missing or has another shape; or packing or
            tying differs from the config.
    """
    what, config = f"{field}={path!r}", copy.deepcopy(config)
    with explained(f"{what} cannot be loaded", remedy(field, path)):
        files = [Path(path) / file for file in check_weight_files(path, getattr(config, WEIGHTS_FIELD, None))]
        packed = unpack_when_loaded(config, what)
        if not files:
            raise ModelError(f"{what} holds no weights ({SAFE_WEIGHTS_NAME}, or an index of several files)")
    shapes = stored_shapes(files)
    if packed:
        check_packed(config, shapes, what)
        return  # packed weights have other shapes
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with explained(f"{what} cannot be loaded", remedy(field, path)), _expecting_new_modules(config), _no_reports():
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True, "device_map": "meta"}
        loaded: Any = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    model, info = loaded
    _check_complete(model, info, what, cut=cut)
    if _has_own_head(model) and _differ(files, *_tied_names(model, shapes)):
        raise ModelError(_not_tied(what))


def _located(path: str, files: Iterable[str], hub: Mapping[str, Any]) -> list[Path]:
    found = (locate(path, file, hub) for file in files)
    return [file for file in found if file is not None]


def _check_complete(model: PreTrainedModel, info: Mapping[str, Any], what: str, *, cut: bool) -> None:
    """Refuse a model if weights were missing in its checkpoint, had other shapes or were unexpected."""
    name = type(model).__name__
    unexpected = without_scales(info["unexpected_keys"], what)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{what} lacks {len(missing)} weights that {name} needs: {_some(missing)}")
    if misfits := sorted(info["mismatched_keys"]):
        shapes = [f"{tensor} is {list(found)} instead of {list(wanted)}" for tensor, found, wanted in misfits]
        raise ModelError(
            f"{what} holds {len(misfits)} weights of another shape than its config (or "
            f"model.config_overrides) makes {name}: {_some(shapes)}"
        )
    if not cut and (left := _of_more_layers(model, unexpected)):
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        raise ModelError(
            f"{what} holds {len(left)} weights of layers that {name} with num_hidden_layers={layers} does "
            f"not have: {_some(left)}"
        )
    if left := _beside_weights(model, unexpected):
        raise ModelError(f"{what} holds {len(left)} weights that {name} with this config does not have: {_some(left)}")


def read_tensors(
    path: str, names: Collection[str], hub: Mapping[str, Any], weights: object = None
) -> dict[str, torch.Tensor]:
    """Read those of the named tensors that a checkpoint (a local folder or a Hub id) holds.

    Args:
        weights: The config's ``transformers_weights``, if it has this field.

    Returns:
        The tensors by name, each in the shape ``[...]`` and dtype in which it is stored.

    Raises:
        ModelError: A file cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    with explained(f"cannot read the weights in {path}"):
        for file in _located(path, weight_files(path, hub, weights) or () if names else (), hub):
            with safe_open(file, framework="pt") as stored:
                found |= {name: stored.get_tensor(name) for name in set(names) & set(stored.keys())}
    return found


@contextmanager
def _expecting_new_modules(model_config: Any) -> Iterator[None]:
    """Keep transformers from reporting the weights of added modules as unexpected: they are read afterwards."""
    record: Any = getattr(model_config, "sparsetrain", None)
    section = record.get("attention") if isinstance(record, dict) else None
    recorded = config_or_none(section.get("method")) if isinstance(section, dict) else None
    configs = [*METHODS.values(), *([] if recorded is None else [recorded])]
    names = {name for config in configs for name in config.new_modules}
    former = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [rf"\.{name}\." for name in sorted(names)]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = former


@contextmanager
def _no_reports() -> Iterator[None]:
    """Keep transformers from printing its table of mismatches: no weights are read yet, and it names no file."""
    former = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(former)


def _of_more_layers(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Unexpected weights of layers beyond the model's last: a sign that the config belongs to another model."""
    layers = {re.sub(r"\.\d+\.", ".N.", name, count=1) for name in model.state_dict() if re.search(r"\.\d+\.", name)}
    return sorted(name for name in unexpected if re.sub(r"\.\d+\.", ".N.", name, count=1) in layers)


def _beside_weights(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Unexpected tensors of modules that have weights, such as a bias that the config switches off."""
    owners = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    return sorted(name for name in unexpected if name.rpartition(".")[0] in owners)


def _has_own_head(model: PreTrainedModel) -> bool:
    """Whether a checkpoint has a separate output head although the config ties it to the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if not tied or not model._tied_weights_keys or head is None or embedding is None:
        return False
    return head.weight is not embedding.weight


def _not_tied(what: str) -> str:
    return (
        f"{what}: its config says tie_word_embeddings=true, but its weights hold an output head that differs from "
        "the embedding; set tie_word_embeddings=false (model.config_overrides, or config.json)"
    )


def _tied_names(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """The names of the embedding and the output head in a checkpoint, which may add a prefix."""
    wanted = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    names = [name for name, weights in model.named_parameters() if any(weights is each for each in wanted)]
    endings = [".".join(name.split(".")[-2:]) for name in names]
    return [name for name in stored if name.endswith(tuple(endings))]


def _differ(files: Iterable[Path], *names: str) -> bool:
    """Whether two tensors in safetensors files differ; False unless both exist. They are read row by row."""
    found: dict[str, Any] = {}
    with ExitStack() as opened:
        for file in files:
            stored = opened.enter_context(safe_open(file, framework="pt"))
            found |= {name: stored.get_slice(name) for name in set(names) & set(stored.keys())}
        if len(found) != 2:
            return False
        first, second = found.values()
        rows = first.get_shape()[0]
        return any(not torch.equal(first[i : i + ROWS], second[i : i + ROWS]) for i in range(0, rows, ROWS))


def _finite(weights: torch.Tensor) -> bool:
    if weights.is_meta or weights.numel() == 0 or not weights.is_floating_point() or weights.element_size() == 1:
        return True
    low, high = weights.detach().aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
