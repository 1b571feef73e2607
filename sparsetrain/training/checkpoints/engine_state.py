"""The training state of a DeepSpeed engine as flat slices of parameters, which do not depend on the ZeRO stage.

Every ZeRO stage partitions master weights and the optimizer's state differently (:mod:`.flats`). Here they become
elements of parameters, so that any stage on any number of ranks can load a checkpoint. The 16-bit weights are not
saved: they are the rounded master weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparsetrain.errors import CheckpointError
from sparsetrain.training.checkpoints.files import DTYPES, Block, PieceReader, Slice
from sparsetrain.training.checkpoints.flats import flats, round_masters
from sparsetrain.training.checkpoints.optimizer_state import Flat, fill_state, state_blocks
from sparsetrain.training.checkpoints.schema import EngineCounters, LossScale

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def blocks(engine: Any) -> list[Block]:
    """The blocks that this rank saves: its part of master weights, optimizer state and step counts; on rank 0 also
    buffers.

    The tensors are views of the engine's tensors.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    replicated = engine.zero_optimization_stage() == 0
    found: list[Block] = []
    for flat in flats(engine):
        weights = Block(
            flat.master.detach().view(-1),
            tuple(Slice("weight", piece.name, piece.start, piece.offset, piece.numel) for piece in flat.pieces),
        )
        for kind, block in (("weight", weights), *state_blocks(engine.basic_optimizer, flat)):
            if not replicated:
                found.append(block)
            elif kind != "step":
                # Without ZeRO every rank holds everything, and saves an equal part.
                found.append(_share(block.tensor, block.slices[0], rank, size))
            elif rank == 0:
                found.append(block)
    if rank == 0:
        for name, buffer in _buffers(engine.module):
            found.append(Block(buffer.detach().reshape(-1), (Slice("buffer", name, 0, 0, buffer.numel()),)))
    return [block for block in found if block.slices]


def fill(engine: Any, reader: PieceReader) -> None:
    """Load the master weights, optimizer state, step counts and buffers of a checkpoint into a new engine.

    Raises:
        CheckpointError: The checkpoint has other parameters than the engine trains.
        ValueError: The checkpoint holds invalid numbers.
    """
    _check_same_parameters(engine, reader)
    _check_same_buffers(engine, reader)
    for flat in flats(engine):
        _read_masters(flat, reader)
        if not bool(flat.master.detach().isfinite().all()):
            raise ValueError("weights are not finite")
        fill_state(engine.basic_optimizer, flat, reader)
    round_masters(engine)
    for name, buffer in _buffers(engine.module):
        reader.read_into(buffer.view(-1), "buffer", name, 0)


def counters(engine: Any) -> dict[str, Any]:
    """Step counts of the engine, and the state of its loss scaler under fp16."""
    scaler = _scaler(engine)
    return {
        "engine": {name: getattr(engine, name) for name in COUNTERS},
        "loss_scale": {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)},
    }


def set_counters(engine: Any, counts: EngineCounters, loss_scale: LossScale) -> None:
    """Undo :func:`counters`."""
    for name in COUNTERS:
        setattr(engine, name, getattr(counts, name))
    scaler = _scaler(engine)
    for name in SCALER:
        value = getattr(loss_scale, name)
        if value is not None and hasattr(scaler, name):
            setattr(scaler, name, value)


def describe_optimizer(engine: Any) -> str:
    """``AdamW, master weights in float32, gradients summed in float32``, as the engine does it."""
    masters = {str(flat.master.dtype).removeprefix("torch.") for flat in flats(engine)}
    summed = str(engine.get_data_types()[1]).removeprefix("torch.")
    kind = type(engine.basic_optimizer).__name__
    return f"{kind}, master weights in {' and '.join(sorted(masters))}, gradients summed in {summed}"


def trained_elements(engine: Any) -> int:
    """The total number of elements of all trained parameters, on all ranks."""
    shapes = (getattr(p, "ds_shape", p.shape) for p in engine.module.parameters() if p.requires_grad)
    return sum(shape.numel() for shape in shapes)


def _share(elements: torch.Tensor, whole: Slice, rank: int, size: int) -> Block:
    part = -(-whole.numel // size)
    start = min(part * rank, whole.numel)
    mine = elements[start : start + part]
    if mine.numel() == 0:
        return Block(mine, ())
    return Block(mine, (Slice(whole.kind, whole.name, start, 0, mine.numel()),))


def _read_masters(flat: Flat, reader: PieceReader) -> None:
    elements = flat.master.detach().view(-1)
    for piece in flat.pieces:
        reader.read_into(elements[piece.offset : piece.offset + piece.numel], "weight", piece.name, piece.start)


def _buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The persistent buffers, as in a state dict."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _check_same_parameters(engine: Any, reader: PieceReader) -> None:
    shapes = {
        name: getattr(parameter, "ds_shape", parameter.shape).numel()
        for parameter, name in engine.param_names.items()
        if parameter.requires_grad
    }
    there = {name: reader.numel("weight", name) for name in reader.names("weight")}
    for name in sorted(shapes.keys() ^ there.keys()):
        side = "is trained, but the checkpoint lacks it" if name in shapes else "is in the checkpoint, but not trained"
        raise CheckpointError(f"the checkpoint belongs to another model or recipe: {name} {side}")
    for name, numel in shapes.items():
        if there[name] != numel:
            raise CheckpointError(
                f"the checkpoint belongs to another model: {name} has {there[name]:,} elements there and {numel:,} here"
            )


def _check_same_buffers(engine: Any, reader: PieceReader) -> None:
    here = {name: (buffer.numel(), DTYPES.get(buffer.dtype)) for name, buffer in _buffers(engine.module)}
    there = {name: (reader.numel("buffer", name), reader.dtype("buffer", name)) for name in reader.names("buffer")}
    if changed := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        name = changed[0]
        raise CheckpointError(
            f"the checkpoint belongs to another model: its buffer {name} is {there.get(name)}, here {here.get(name)}"
        )
