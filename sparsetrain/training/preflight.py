"""The checks between loading a recipe and starting a run, in order.

==========================  ==============================  =====================================
check                       needs                           called by
==========================  ==============================  =====================================
:func:`check_machine`       the recipe and the device       ``doctor``, ``run``
``data.check.check_data``   the recipe and local files      ``validate``, ``plan``, ``doctor``, ``run``
:func:`check_model`         the recipe and local files      ``validate``, ``plan``, ``doctor``
:func:`check_loaded`        the model, sparsified           ``run``, and :func:`check_model` without weights
==========================  ==============================  =====================================

The self-check on the first batch follows: :mod:`sparsetrain.training.selfcheck.forward`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from sparsetrain.errors import ModelError
from sparsetrain.evaluation.row_model import as_row
from sparsetrain.modeling import balance_factor, check_dropout, check_learned_positions, check_positions, sparsify
from sparsetrain.modeling.configs import config_source, take_special_tokens
from sparsetrain.modeling.continued import merge_start
from sparsetrain.modeling.head import BALANCE_FACTORS
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.side_files import check_side_files
from sparsetrain.modeling.tokenizers import check_vocabulary, tokenizer_and_new_tokens
from sparsetrain.modeling.vocabulary import fit_vocabulary
from sparsetrain.modeling.weights import check_headers
from sparsetrain.recipe.batch import batch_shape
from sparsetrain.recipe.local_model import model_folder
from sparsetrain.recipe.schema import ModelSection, Recipe
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config
from sparsetrain.training.distributed.engine import check_config, check_offload
from sparsetrain.training.distributed.optimizers import check_optimizer
from sparsetrain.training.memory.activations import check_memory_options
from sparsetrain.training.memory.quantize import check_quantization
from sparsetrain.training.output.board import check_board
from sparsetrain.training.trainable import choose_trainable


def check_machine(recipe: Recipe, device: torch.device, ranks: int) -> None:
    """Refuse settings that the device does not support, a batch that does not divide evenly, and a DeepSpeed JSON that
    contradicts the recipe.

    Raises:
        RecipeError: A setting is refused; names it.
    """
    # The number of steps, which with ``train.epochs`` is known only after reading the data, does not matter here.
    check_config(deepspeed_config(recipe, batch_shape(recipe, ranks).with_steps(1)))
    check_quantization(recipe.base_bits, device)
    check_memory_options(recipe.train, device)
    check_offload(recipe, device)
    check_optimizer(recipe)
    check_board(recipe)


def check_model(recipe: Recipe) -> None:
    """Build a recipe's model without storage, install its method and adapters, and open its files.

    Nothing is read from the Hub: a model that is not in a local folder is not checked.

    Raises:
        SparsetrainError: The run would fail.
    """
    logging.disable_progress_bar()  # it would show weights that are not read
    section = recipe.model
    for field in ("path", "tokenizer"):
        if (name := getattr(section, field)) is not None:
            resolve(name, f"model.{field}")
    folder = model_folder(section)
    if folder is None and section.architecture is None:
        return
    if folder is not None:
        check_side_files(str(folder))
    source = config_source(section)
    config = source.config()
    tokenizer = None
    new: list[str] = []
    if section.tokenizer is None or model_folder(section.model_copy(update={"path": section.tokenizer})) is not None:
        tokenizer, new = tokenizer_and_new_tokens(section)
        check_vocabulary(tokenizer, config, section.add_tokens)
        if folder is None:
            take_special_tokens(config, tokenizer, section.architecture or {})
    if recipe.sequence.parallel > 1:
        from sparsetrain.training.distributed import sequence_parallel  # imports DeepSpeed, which takes seconds

        sequence_parallel.check_config(config, recipe.sequence.parallel, recipe.attention)
    model = source.skeleton(config, trust_remote_code=section.trust_remote_code)
    if folder is not None:
        check_headers(
            str(folder), "model.path", type(model), config, cut="num_hidden_layers" in section.config_overrides
        )
    with torch.device("meta"):
        if tokenizer is not None:
            fit_vocabulary(model, tokenizer, section, new)
        sparsify(model, recipe.attention)
        check_loaded(model, recipe)
        with torch.random.fork_rng(devices=[]):
            choose_trainable(model, recipe)
            if recipe.train.start is not None and recipe.lora is None:
                merge_start(model, recipe.train.start)


def check_loaded(model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse a sparsified model that does not support the recipe's training rows or evaluations.

    Raises:
        ModelError: Its positions are too few, it cannot be measured in a way of ``eval.rows``, it has attention dropout
            or a factor of a loss that it does not add, or it mixes tokens in a way that sequence parallelism does not
            support.
    """
    check_positions(model, recipe.sequence.length)
    for task in recipe.eval.tasks:
        check_learned_positions(model, {task.path(name): lengths for name, lengths in task.lengths_by_field().items()})
        task.check_model(model)
    for index, asked in enumerate(recipe.eval.rows):
        try:
            with as_row(model, asked.read()):
                for task in recipe.eval.tasks:
                    task.check_model(model)
        except ModelError as error:
            raise ModelError(f"eval.rows.{index}: {error}") from error
    check_dropout(model)
    check_balance(model, recipe.model)
    if recipe.sequence.parallel > 1:
        from sparsetrain.training.distributed import sequence_parallel

        sequence_parallel.check_shareable(model, recipe.sequence.parallel)


def check_balance(model: PreTrainedModel, section: ModelSection) -> None:
    """Refuse a factor of the routers' balance loss in a recipe that does not enable the loss.

    Raises:
        ModelError: The recipe does this; names the factor and the switch.
    """
    given = {**(section.architecture or {}), **section.config_overrides}
    for name in BALANCE_FACTORS:
        if given.get(name) and not balance_factor(model):
            raise ModelError(
                f"{name}={given[name]} has no effect: {type(model).__name__} adds the balance loss of its routers only "
                "with output_router_logits: true beside it"
            )
