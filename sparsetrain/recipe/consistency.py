"""Contradictions between values of different sections of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sparsetrain.counted import counted
from sparsetrain.errors import ModelError
from sparsetrain.evaluation.base import without_steps
from sparsetrain.recipe.expressions import matching
from sparsetrain.recipe.heads import attention_heads, heads_fault, positions_fault
from sparsetrain.recipe.local_model import decoder_config, num_layers
from sparsetrain.recipe.schema import EvalSection, Recipe
from sparsetrain.recipe.sizes import too_large
from sparsetrain.recipe.yaml_source import KeyPath
from sparsetrain.source_section import DataSource

_USUAL_NAMES = tuple(
    f"model.layers.{layer}.{part}"
    for layer in (0, 31)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.experts.127.down_proj")
)
"""Typical names of linear layers, to test whether an expression terminates before the model's names are known."""


def contradictions(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the contradictions of a recipe: the field to change, and a sentence that names both settings."""
    profile, steps = recipe.train.profile, recipe.train.steps
    if profile is not None and steps is not None and profile.steps[1] > steps:
        yield ("train", "profile", "steps"), f"step {profile.steps[1]} is not in a run of train.steps={steps}"
    oversized = list(too_large(recipe))
    if oversized:  # the other rules would take too long with these sizes
        yield from oversized
        return
    yield from _lengths(recipe)
    yield from _batch(recipe)
    yield from _layers(recipe)
    yield from _shared_sequence(recipe)
    yield from _trained(recipe)
    yield from _held_out(recipe)
    if recipe.model.add_tokens and recipe.train.parameters == "new_modules" and recipe.lora is None:
        yield (
            ("model", "add_tokens"),
            "with train.parameters: new_modules the rows of added tokens would never be trained; train all parameters, "
            "or use lora",
        )
    yield from _optimizer(recipe)
    if recipe.train.offload_activations and recipe.train.activation_checkpointing == "none":
        yield (
            ("train", "offload_activations"),
            "offloads the inputs of checkpointed layers, and train.activation_checkpointing is none; set that to layer "
            "or selective",
        )
    yield from _preference(recipe)
    yield from _evaluation(recipe)


def without_effect(recipe: Recipe) -> list[str]:
    """Settings that are valid but have no effect in this run, one sentence each."""
    steps, notes = recipe.train.steps, []
    if steps is not None:
        for name, every in (("checkpoint.every", recipe.checkpoint.every), ("eval.every", recipe.eval.every)):
            if every is not None and every > steps:
                notes.append(f"{name}={every} has no effect in a run of {counted(steps, 'step')}")
    tokens = math.ceil(recipe.sequence.length * recipe.train.micro_batch / recipe.sequence.parallel)
    if recipe.train.mlp_chunk is not None and recipe.train.mlp_chunk >= tokens:
        notes.append(
            f"train.mlp_chunk={recipe.train.mlp_chunk} has no effect: a pass of a rank has {counted(tokens, 'token')}"
        )
    evaluated = {source.path for task in recipe.eval.tasks for source in task.sources().values()}
    for index, source in enumerate(recipe.data.sources):
        if source.validation is not None and source.path not in evaluated:
            notes.append(
                f"data.sources.{index}.validation={source.validation:g} holds out rows that no task of eval.tasks "
                "reads; give one a source with the same path and validation, and split: validation"
            )
    evaluation = recipe.eval
    if not (evaluation.empty or evaluation.at_start or evaluation.at_end or evaluation.every):
        names = " and ".join(f"eval.tasks.{name}" for name in evaluation.by_name)
        notes.append(f"{names}: never measured, as eval.at_start, at_end and every are off")
    if not any(task.writes for task in evaluation.tasks):
        for index, row in enumerate(evaluation.rows):
            if not row.read().decoding.recorded:
                same = without_steps(evaluation.tasks)
                notes.append(f"eval.rows.{index}.decode={row.decode} has no effect on {same}")
    pattern, length = recipe.attention.pattern(), recipe.sequence.length
    if pattern is not None and not pattern.per_head:
        last = (length - 1) // pattern.block
        if all(part.listed(last + 1) - part.listed(last) == last + 1 for part in pattern.by_layer):
            notes.append(
                f"sequence.length={length} is {last + 1} blocks of {pattern.block}, which the pattern covers: "
                "every row is trained densely"
            )
    return notes


def _held_out(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Rows held out for an evaluation that are trained on."""
    for index, task in enumerate(recipe.eval.tasks):
        for field, source in task.sources().items():
            if source.validation is None or source.split != "validation":
                continue
            for number, trained in enumerate(recipe.data.sources):
                if trained.path != source.path or _splits_alike(trained, source):
                    continue
                yield (
                    ("eval", "tasks", index, *field.split(".")),
                    f"its rows are held out of {source.path} by validation={source.validation:g}, and "
                    f"data.sources.{number} trains on some of them; give that source split: train and the same "
                    "validation and max_rows",
                )


def _splits_alike(trained: DataSource, held_out: DataSource) -> bool:
    names = ("validation", "max_rows")
    return trained.split == "train" and all(getattr(trained, name) == getattr(held_out, name) for name in names)


def _preference(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions of ``preference``."""
    section = recipe.preference
    for index, source in enumerate(recipe.data.sources):
        place = ("data", "sources", index)
        if section is None and source.form == "preference":
            yield (*place, "form"), "preference needs the section preference, such as preference: {loss: dpo}"
        if section is not None and source.synthetic is not None:
            yield (*place, "synthetic"), f"{source.synthetic} makes no pairs of answers, which preference learns from"
    if section is None:
        return
    if recipe.data.long_documents != "drop":
        yield (
            ("data", "long_documents"),
            f"{recipe.data.long_documents} would cut the answers that preference compares; set it to drop, and "
            "sequence.length so that a pair fits, both answers with their prompts",
        )
    if recipe.sequence.parallel > 1:
        yield (
            ("sequence", "parallel"),
            f"{recipe.sequence.parallel} ranks that share a row are not supported with preference; set it to 1",
        )
    if section.has_reference and section.reference == "adapters_off":
        if recipe.lora is None:
            yield ("preference", "reference"), "adapters_off needs lora; set it to precomputed"
        elif recipe.beside_adapters is not None:
            yield (
                ("preference", "reference"),
                f"adapters_off is not the model that the run starts from with {recipe.beside_adapters}; set it to "
                "precomputed",
            )
    if recipe.reference == "adapters_off" and recipe.train.neftune is not None:
        yield (
            ("train", "neftune"),
            f"{recipe.train.neftune:g} would add noise to the reference as well, which is the same model without its "
            "adapters; set it to null, or preference.reference: precomputed",
        )


def _evaluation(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions of evaluations and ``checkpoint.keep_best``."""
    evaluation, best = recipe.eval, recipe.checkpoint.keep_best
    named = f"eval.tasks has {', '.join(evaluation.by_name)}" if evaluation.tasks else "eval.tasks is empty"
    if evaluation.every is not None and evaluation.empty:
        yield ("eval", "every"), f"every {counted(evaluation.every, 'step')} nothing would be measured: give eval.tasks"
    yield from _rows(recipe)
    if best is not None and evaluation.every is None:
        yield ("checkpoint", "keep_best"), f"{best} is not measured during training: give eval.every, or set it to null"
    if best is not None and best not in evaluation.by_name:
        yield (
            ("checkpoint", "keep_best"),
            f"nothing measures {best}, and {named}; give eval.tasks one of that name, or set it to null",
        )
    stopping = evaluation.early_stopping
    if stopping is not None and evaluation.every is None:
        yield ("eval", "early_stopping"), f"{stopping.task} is not measured during training: give eval.every"
    if stopping is not None and stopping.task not in evaluation.by_name:
        yield ("eval", "early_stopping", "task"), f"nothing measures {stopping.task}, and {named}"
    yield from task_faults(evaluation)


def _rows(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Rows of the trained model that would not be measured, or cannot be in a run."""
    evaluation = recipe.eval
    if evaluation.rows and (evaluation.empty or not evaluation.at_end):
        lacks = "eval.tasks is empty" if evaluation.empty else "eval.at_end is false"
        yield (
            ("eval", "rows"),
            f"rows are measured at the end of a run, and {lacks}; give tasks with at_end, or no rows",
        )
        return
    for index, asked in enumerate(evaluation.rows):
        config = asked.read().attention.config
        if config is None:
            continue
        if config == recipe.attention:
            yield ("eval", "rows", index, "attention"), "is what the model is trained with; leave it out"
        elif config.new_modules:
            yield (
                ("eval", "rows", index, "attention"),
                f"{config.method} adds modules, which were not trained here; measure it with sparsetrain eval",
            )
        elif recipe.sequence.parallel > 1 and config.method != "full":
            yield (
                ("eval", "rows", index, "attention"),
                f"{config.method} cannot be put on a model whose rows are shared by sequence.parallel="
                f"{recipe.sequence.parallel} ranks; measure it with sparsetrain eval",
            )


def task_faults(evaluation: EvalSection) -> Iterator[tuple[KeyPath, str]]:
    """Values of evaluation tasks that contradict one another."""
    for index, task in enumerate(evaluation.tasks):
        for field, fault in task.faults():
            yield ("eval", "tasks", index, *field.split(".")), fault


def _optimizer(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions of the optimizer, the schedule and the dtype of gradients."""
    train, section = recipe.train, recipe.deepspeed
    offloaded = section.offload_optimizer != "none"
    for field, fault in train.optimizer.faults(stage=section.stage, offloaded=offloaded, dtype=recipe.model.dtype):
        yield ("train", "optimizer", field), fault
    for name in ("cooldown", "cooldown_shape"):
        default = type(train).model_fields[name].default
        if train.schedule != "wsd" and getattr(train, name) != default:
            yield (
                ("train", name),
                f"{name}={getattr(train, name)} belongs to train.schedule: wsd, and that is {train.schedule}",
            )
    if section.gradient_dtype == "float32" and recipe.model.dtype == "float16":
        yield (
            ("deepspeed", "gradient_dtype"),
            "float32 sums are for model.dtype=bfloat16, and it is float16; set this to auto",
        )
    if section.gradient_dtype == "float32" and train.optimizer.states == "bfloat16" and section.stage == 1:
        yield (
            ("deepspeed", "gradient_dtype"),
            "with float32 sums ZeRO 1 always keeps float32 states, and train.optimizer.states=bfloat16; use "
            "deepspeed.stage=2",
        )


def _lengths(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    length, block = recipe.sequence.length, getattr(recipe.attention, "block", None)
    if block is not None and block > length:
        yield (
            ("attention", "block"),
            f"a block of {block} tokens is longer than sequence.length={length}; lower the one or raise the other",
        )
    beyond = positions_fault(length, decoder_config(recipe.model).get("max_position_embeddings"))
    if beyond is not None:
        yield ("sequence", "length"), beyond
    for index, source in enumerate(recipe.data.sources):
        too_long = [tokens for tokens in source.lengths if tokens > length]
        if too_long:
            yield (
                ("data", "sources", index, "lengths"),
                f"synthetic documents of {max(too_long)} tokens do not fit sequence.length={length}",
            )


def _batch(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    train, length = recipe.train, recipe.sequence.length
    tokens, rows = train.global_batch_tokens, train.global_batch_sequences
    if tokens is not None and tokens % length:
        nearest = [multiple * length for multiple in (tokens // length, tokens // length + 1) if multiple]
        yield (
            ("train", "global_batch_tokens"),
            f"{tokens} is not a whole number of rows of sequence.length={length}; "
            f"{' or '.join(str(value) for value in nearest)} is",
        )
    elif tokens is not None:
        rows = tokens // length
    if rows is not None and rows % train.micro_batch:
        yield (
            ("train", "micro_batch"),
            f"the global batch of {rows} rows is not a multiple of train.micro_batch={train.micro_batch}, on any ranks",
        )
    if train.steps is not None and train.warmup > train.steps:
        yield (
            ("train", "warmup"),
            f"{train.warmup:g} steps of warmup in a run of train.steps={train.steps}; lower it or give a "
            "fraction below 1",
        )
    for index, source in enumerate(recipe.data.sources):
        if train.epochs is not None and (source.streaming or source.synthetic):
            kind = "is streamed" if source.streaming else "is generated without end"
            yield (
                ("train", "epochs"),
                f"data.sources.{index} ({source.label}) {kind}, so epochs have no length; give train.steps or tokens",
            )


def _layers(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    layers = num_layers(recipe.model)
    if layers is None:
        return
    if layers < 1:
        section = "config_overrides" if "num_hidden_layers" in recipe.model.config_overrides else "architecture"
        yield ("model", section, "num_hidden_layers"), f"a model has at least one layer, not {layers}"
        return
    try:
        dense = recipe.attention.resolve_dense_layers(layers)
    except ModelError as error:
        yield ("attention", "dense_layers"), str(error).removeprefix("attention.dense_layers ")
        return
    if len(dense) == layers and recipe.attention.method != "full":
        yield (
            ("attention", "dense_layers"),
            f"all {layers} layers stay dense, so attention.method={recipe.attention.method} has no effect",
        )


def _shared_sequence(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions of ``sequence.parallel``."""
    parallel, attention = recipe.sequence.parallel, recipe.attention
    if parallel == 1:
        return
    heads = attention_heads(recipe.model)
    fault = None if heads is None else heads_fault(parallel, *heads)
    if fault is not None:
        yield ("sequence", "parallel"), fault
    fault = attention.heads_fault(heads[1] if heads else parallel, parallel)
    if fault is not None:
        yield ("sequence", "parallel"), f"{parallel} ranks share out the heads, but {fault}"


def _trained(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions of the trained parameters."""
    train, lora, method = recipe.train, recipe.lora, recipe.attention.method
    if not recipe.attention.new_modules:
        for name, default in (("parameters", "all"), ("new_modules_lr", None)):
            if getattr(train, name) != default:
                yield (
                    ("train", name),
                    f"{name}={getattr(train, name)} is about modules that the attention method adds, and "
                    f"attention.method={method} adds none; set it to {'null' if default is None else default}",
                )
    if train.start is not None and recipe.model.architecture is not None:
        yield (
            ("train", "start"),
            "adapters belong to a pretrained model, and model.architecture is random; give model.path",
        )
    if train.freeze and (lora is not None or train.parameters == "new_modules"):
        other = "lora" if lora is not None else "train.parameters: new_modules"
        yield ("train", "freeze"), f"{other} freezes all of the model already; leave freeze out"
    if train.neftune is not None and recipe.sequence.parallel > 1:
        yield (
            ("train", "neftune"),
            "the noise is scaled by whole rows, and sequence.parallel splits them; set it to null",
        )
    fault = recipe.attention.training_fault()
    if train.parameters == "new_modules" and fault is not None:
        yield ("train", "parameters"), fault
    if lora is not None and train.parameters == "new_modules":
        yield (
            ("train", "parameters"),
            "new_modules freezes everything else, so lora's adapters would never change; set lora: null, or "
            "parameters: all (lora trains the new modules as well)",
        )
    if recipe.model.architecture is not None and (lora is not None or train.parameters == "new_modules"):
        yield (
            ("lora",) if lora is not None else ("train", "parameters"),
            "freezes the model, but model.architecture starts it from random weights, which would not be trained; give "
            "model.path",
        )
    if lora is not None and isinstance(lora.targets, str) and lora.targets not in ("attention", "linear"):
        try:
            matching(lora.targets, _USUAL_NAMES)
        except ValueError as error:
            yield ("lora", "targets"), str(error)
    if lora is not None and lora.quantize_base != "none" and recipe.deepspeed.stage == 3:
        yield (
            ("lora", "quantize_base"),
            f"{lora.quantize_base} weights cannot be sharded by deepspeed.stage=3; use stage 0, 1 or 2",
        )
