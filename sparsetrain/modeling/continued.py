"""Begin a training with adapters that another run trained: train them further, or merge them into the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.modeling.adapter_folder import fill_adapters, load_end_tokens, read_adapters, read_config
from sparsetrain.modeling.adapters import merge_adapters
from sparsetrain.modeling.records import adapters_record, check_same_base, identity
from sparsetrain.modeling.side_files import check_side_files

if TYPE_CHECKING:
    from sparsetrain.recipe.lora_section import LoraSection

FIELD = "train.start"


def start_folder(start: str, model: PreTrainedModel) -> Path:
    """The folder of adapters that ``train.start`` names.

    Raises:
        ModelError: It is no folder of adapters, or they were trained beside another model.
    """
    folder = Path(os.path.expanduser(start))
    if not folder.is_dir():
        raise ModelError(f"{FIELD}={start!r}: there is no such folder")
    check_side_files(str(folder))
    _, _, trained_on = adapters_record(folder)
    check_same_base(trained_on, identity(model.config), str(model.config._name_or_path))
    return folder


def merge_start(model: PreTrainedModel, start: str) -> None:
    """Merge the adapters of a folder into a sparsified model, whose parameters are trained as before.

    Raises:
        ModelError: They do not fit the model.
    """
    folder = start_folder(start, model)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    read_adapters(model, folder)
    if model.device.type != "meta":  # of a model without storage, only the fit is checked
        merge_adapters(model)
        load_end_tokens(model, folder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def continue_start(model: PreTrainedModel, start: str, lora: LoraSection) -> None:
    """Load the adapters of a folder into those that ``lora`` has added.

    Raises:
        ModelError: The folder cannot be read.
        RecipeError: Its adapters are of another kind than ``lora`` describes.
    """
    folder = start_folder(start, model)
    config = read_config(folder)
    recorded = {"rank": config.r, "alpha": config.lora_alpha, "dora": config.use_dora, "rslora": config.use_rslora}
    wanted = {"rank": lora.rank, "alpha": lora.scale_numerator, "dora": lora.dora, "rslora": lora.rslora}
    for name, value in recorded.items():
        if value != wanted[name]:
            raise RecipeError(
                f"{FIELD}: the adapters in {folder} have {name}={value}, and lora.{name} is {wanted[name]}; set it to "
                "theirs, or merge them first (`sparsetrain export RUN OUT --merge`, model.path: OUT)"
            )
    try:
        fill_adapters(model, folder)
    except ModelError as error:
        raise RecipeError(f"{FIELD}: {error}; lora.targets, train_embeddings and train_norms must be theirs") from error
