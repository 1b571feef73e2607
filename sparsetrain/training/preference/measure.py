"""Measure the reference's log-likelihoods of all pairs of a run before training, and keep them in the run folder.

They are those of the model that the run starts from, with the attention method, as in evaluation. A pair is known by
its tokens, so that it is measured once however often it is drawn, and found again on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparsetrain.activity import activity
from sparsetrain.counted import counted
from sparsetrain.data.batch import Row, collate
from sparsetrain.durable import write_whole
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.passes import planned_arguments
from sparsetrain.modeling.modes import in_evaluation_mode
from sparsetrain.training.job import Job, Loaded
from sparsetrain.training.loss import pass_tensors
from sparsetrain.training.memory.chunks import chunks_of
from sparsetrain.training.preference.model import PreferenceLoss
from sparsetrain.training.preference.reference import Reference, pair_keys

REFERENCE_FILE = "reference.json"
"""In the run folder: the log-likelihoods by pair, and what they were measured with."""


def measure_reference(job: Job, loaded: Loaded, loss: PreferenceLoss) -> Reference:
    """The log-likelihoods of all pairs of the run; those that the run folder does not hold yet are measured.

    The ranks share the rows. A resumed run measures nothing, unless it has become longer.

    Args:
        loss: The engine's module, with the weights that the run starts from: before a checkpoint is read.
    """
    world, path, origin = job.world, job.output / REFERENCE_FILE, _origin(job)
    known: dict[str, list[float]] = world.on_main(lambda: _read(path, origin))
    mine: dict[str, list[float]] = {}
    before = len(known)
    activity.at("measuring the reference")
    with job.progress.counting("measuring the reference") as on_progress, in_evaluation_mode(loss):
        for rows, done, total in _unknown(job, loaded, known):
            # All ranks make equally many passes, as ZeRO-3 needs.
            mine |= _log_likelihoods(job, loaded, loss, rows[world.rank % len(rows)])
            activity.moved()
            on_progress(done, total)
            job.signals.pause(world.largest)
    if len(known) > before:
        parts: list[Any] = [None] * world.size
        dist.all_gather_object(parts, mine)
        for part in parts:
            known |= part
        world.on_main(lambda: write_whole(path, json.dumps({"of": origin, "pairs": known})))
    job.say(f"reference: {counted(len(known) - before, 'pair')} measured, {before:,} known from before; {path}")
    return Reference(known)


def _unknown(job: Job, loaded: Loaded, known: dict[str, list[float]]) -> Iterator[tuple[list[Row], int, int]]:
    """The rows of the run with a pair that is not known, a row for each rank at a time, and how many rows of all were
    read. All ranks read the same rows, and each leaves an empty place for a pair that one of them measures."""
    position = loaded.rows.state_dict()
    total = loaded.plan.steps * loaded.plan.global_batch_sequences
    waiting: list[Row] = []
    for number in range(1, total + 1):
        row = next(loaded.rows)
        unknown = [key for key in _keys(row) if key not in known]
        if unknown:
            known |= {key: [] for key in unknown}
            waiting.append(row)
        if waiting and (len(waiting) == job.world.size or number == total):
            yield waiting, number, total
            waiting = []
    loaded.rows.load_state_dict(position)


def _keys(row: Row) -> list[str]:
    return pair_keys(row.input_ids, row.labels, np.cumsum([0, *row.lengths]))


def _log_likelihoods(job: Job, loaded: Loaded, loss: PreferenceLoss, row: Row) -> dict[str, list[float]]:
    """The log-likelihoods of both answers of each pair in a row."""
    batch = collate([row])
    tensors = {**pass_tensors(batch), **loss.answer_tokens(batch)}
    inputs: dict[str, Any] = {name: tensor.to(job.world.device) for name, tensor in tensors.items()}
    methods = {id(method): method for _, _, method in sparse_layers(loaded.model) if method is not None}
    inputs["num_chunks"] = chunks_of(loaded.plan.sequence_length, job.recipe.train.loss_chunk)
    with torch.no_grad():
        found = loss.log_likelihoods(**inputs, planned=planned_arguments(methods.values(), batch))
    return dict(zip(_keys(row), found.reshape(-1, 2).tolist(), strict=True))


def _origin(job: Job) -> dict[str, Any]:
    """What the log-likelihoods depend on besides the tokens, as JSON."""
    recipe = job.recipe.model_dump(mode="json")
    beside = {"start": job.recipe.train.start, "quantize_base": job.recipe.base_bits}
    return {"model": recipe["model"], "attention": recipe["attention"], **beside}


def _read(path: Path, origin: dict[str, Any]) -> dict[str, list[float]]:
    """What an earlier attempt of this run has measured; empty where it does not fit."""
    try:
        found = json.loads(path.read_text())
        pairs = found["pairs"] if found["of"] == origin else {}
        return {str(key): [float(value) for value in values] for key, values in pairs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
