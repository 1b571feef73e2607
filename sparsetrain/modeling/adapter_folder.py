"""Save a model's adapters as a peft folder, and load them with their base model, or into a model that is there.

Modules that are fully trained beside the adapters are peft's ``modules_to_save`` on disk, and plain
``PeftModel.from_pretrained`` reads them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from sparsetrain.errors import ModelError, first_line
from sparsetrain.modeling.adapter_expressions import bound_expressions
from sparsetrain.modeling.adapters import config_of, inject
from sparsetrain.modeling.attention.name import check_attends
from sparsetrain.modeling.boundary import explained, is_fault, words
from sparsetrain.modeling.configs import load_config
from sparsetrain.modeling.foreign import check_adapter_config, check_adapter_files
from sparsetrain.modeling.layers import sparsify
from sparsetrain.modeling.places import ADAPTER_FILE
from sparsetrain.modeling.records import adapters_record, check_same_base, identity
from sparsetrain.modeling.side_files import check_adapter_values, check_side_files
from sparsetrain.modeling.storage import load_model, write_record
from sparsetrain.modeling.token_rows import ON_DISK, ROWS, own_rows, share_token_rows

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import ModelSection

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""The dtypes that a base model may be loaded in."""

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft's prefix of every name: a ``PeftModel`` holds the model as ``base_model.model``."""


def adapter_tensors(model: PreTrainedModel) -> dict[str, str]:
    """The tensors that an adapter folder holds: a mapping from the name in the model to peft's name."""
    config = config_of(model)
    whole = tuple(f"{name}." for name in config.modules_to_save or ())
    if config.ensure_weight_tying:
        # peft expects a trained embedding under both of its names.
        whole += tuple(f"{name}." for name, layer in model.named_modules() if layer is model.get_output_embeddings())
    names = [name for name in model.state_dict() if ".lora_" in name or name.startswith(whole)]
    return {name: PREFIX + _without_adapter_name(name) for name in [*names, *own_rows(model)]}


def save_adapters(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    base: ModelSection,
    state_dict: Mapping[str, torch.Tensor],
) -> None:
    """Write a peft adapter folder with a record of the base model and attention method, and the tokenizer if given.

    Args:
        base: The recipe's ``model`` section, from which :func:`load_adapters` finds the base model.
        state_dict: The tensors ``[...]``, by their names in the folder (:func:`adapter_tensors`).

    Raises:
        ModelError: A tensor is missing, or empty as the shards of ZeRO-3 are; or the model uses another method than the
            recorded one.
    """
    check_attends(model)
    wanted = set(adapter_tensors(model).values())
    empty = [name for name, tensor in state_dict.items() if tensor.numel() == 0]
    if empty or wanted != state_dict.keys():
        fault = f"{empty[0]} is empty" if empty else f"{min(wanted ^ state_dict.keys())} is missing or unexpected"
        raise ModelError(f"the adapter would not be saved completely: {fault}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()},
        path / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    config = copy(config_of(model))
    config.inference_mode = True
    config.base_model_name_or_path = _from_anywhere(str(config.base_model_name_or_path))
    config.save_pretrained(str(path))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    if model.generation_config is not None:
        model.generation_config.to_json_file(path / GENERATION_CONFIG_NAME)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}
    section = base.model_dump(mode="json")
    section["path"] = _from_anywhere(section["path"])
    # The base has as many rows as it had before tokens were added.
    base_config = {**identity(model.config), **({"vocab_size": None} if base.add_tokens else {})}
    known = {"base": section["path"], "base_config": base_config, "model": section, "versions": versions}
    write_record(path, {**model.config.sparsetrain, **known})


def _from_anywhere(base: str) -> str:
    """A folder's absolute path; the id of a model on the Hub as it is."""
    folder = Path(os.path.expanduser(base))
    return str(folder.resolve()) if os.path.isdir(folder) else base


def load_adapters(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the base model of an adapter folder with the recorded attention method and the adapters, not merged.

    Args:
        path: A local folder.
        base: A Hub id or folder, if the base model is not at the recorded location.
        dtype: The dtype of the weights; by default, and with ``"auto"``, the dtype used in training.

    Raises:
        ModelError: The folder or its base model cannot be read, or they do not match.
    """
    path = Path(path)
    check_side_files(str(path))
    section, attention, trained_on = adapters_record(path)
    changed: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (path / "tokenizer_config.json").is_file():
        changed |= {"tokenizer": str(path), "chat_template": None}  # it was saved with its template
    if base is not None:
        changed |= {"path": str(base), "revision": None}
    if dtype not in (None, "auto"):
        changed["dtype"] = str(dtype).removeprefix("torch.")
        if changed["dtype"] not in DTYPES:
            raise ModelError(f"dtype={dtype}: the base model of adapters loads in auto, {', '.join(DTYPES)}")
    section = section.model_copy(update=changed)
    with of_adapters(path):
        check_same_base(trained_on, identity(load_config(section)), str(section.path))
        model, _ = load_model(section, attention, seed=0)
    read_adapters(model, path)
    load_end_tokens(model, path)
    return model.eval()


@contextmanager
def of_adapters(path: Path) -> Iterator[None]:
    """Let errors of a base model name the folder of its adapters.

    Raises:
        ModelError: in the place of one inside.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapters in {path}: {error} "
            "(if it has moved, give base=... in Python, --base ... to sparsetrain export)"
        ) from error


def load_end_tokens(model: PreTrainedModel, path: Path) -> None:
    """Use the end tokens that the adapters were trained with; older folders do not record them.

    Raises:
        ModelError: their file cannot be read.
    """
    if model.generation_config is None or not (path / GENERATION_CONFIG_NAME).is_file():
        return
    try:
        model.generation_config.eos_token_id = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path / GENERATION_CONFIG_NAME} cannot be read: {first_line(error)}") from error


def load_alone(path: str | Path, adapted: PreTrainedModel) -> PreTrainedModel:
    """Load a folder's adapters into a copy of the model whose other weights have no storage.

    Raises:
        ModelError: As in :func:`read_adapters`.
    """
    with torch.device("meta"):
        model = type(adapted)(deepcopy(adapted.config))
        sparsify(model, model.config.sparsetrain["attention"])
        read_adapters(model, path)
    return model


def read_adapters(model: PreTrainedModel, path: str | Path) -> None:
    """Load the adapters of a folder into a sparsified model.

    Raises:
        ModelError: The folder's tensors are not exactly those that the model expects. (peft would silently drop the
            others.)
    """
    path = Path(path)
    config = read_config(path)
    bound_expressions(config, [name for name, _ in model.named_modules()], path)
    with explained(f"the adapters in {path} do not fit {type(model).__name__}"):
        inject(model, config)
    fill_adapters(model, path)


def read_config(path: Path) -> LoraConfig:
    """The config of a folder's adapters.

    Raises:
        ModelError: It cannot be read, or needs more than the tensors of LoRA.
    """
    from peft import LoraConfig

    check_adapter_values(path / ADAPTER_FILE)
    try:
        config = LoraConfig.from_pretrained(str(path))
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelError(f"cannot read the adapters in {path}: {words(error)}") from error
    if type(config) is not LoraConfig:
        raise ModelError(f"{path}/{ADAPTER_FILE} is a {type(config).__name__} of peft; sparsetrain loads only LoRA")
    check_adapter_config(config, path)
    return config


def fill_adapters(model: PreTrainedModel, path: Path) -> None:
    """Load a folder's tensors into the adapters of a model.

    Raises:
        ModelError: The folder's tensors are not exactly those that the model expects.
    """
    try:
        check_adapter_files(path)
        tensors = load_file(path / WEIGHTS_FILE)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelError(f"cannot read the adapters in {path}: {words(error)}") from error
    places = {key: model.get_parameter_or_buffer(name) for name, key in adapter_tensors(model).items()}
    shapes = ({key: tuple(tensor.shape) for key, tensor in each.items()} for each in (tensors, places))
    given, wanted = shapes
    if given != wanted:
        faults = [
            *(f"the model has no {key.removeprefix(PREFIX)}" for key in sorted(given.keys() - wanted.keys())),
            *(f"the folder lacks {key.removeprefix(PREFIX)}" for key in sorted(wanted.keys() - given.keys())),
            *(
                f"{key.removeprefix(PREFIX)} is {list(given[key])} in the folder and {list(wanted[key])} in the model"
                for key in sorted(given.keys() & wanted.keys())
                if given[key] != wanted[key]
            ),
        ]
        raise ModelError(
            f"the adapters in {path} ({len(given)} tensors) were not made for this model ({len(wanted)}): "
            f"{'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}"
        )
    # By load_state_dict, not by copying: modules have hooks that run when their weights are loaded.
    found = {name: tensors[key] for name, key in adapter_tensors(model).items()}
    model.load_state_dict(found, strict=False, assign=model.device.type == "meta")
    share_token_rows(model)


def _without_adapter_name(name: str) -> str:
    """``q_proj.lora_A.default.weight`` is ``q_proj.lora_A.weight`` on disk, and DoRA's magnitude has no ``.weight``."""
    name = re.sub(r"\.(lora_\w+)\.default\b", r".\1", name)
    if name.endswith(f".{ROWS}"):
        return f"{name.removesuffix(ROWS)}{ON_DISK}"
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name
