"""The training state of a DeepSpeed engine as flat slices of parameters, which do not depend on the ZeRO stage.

Every ZeRO stage partitions fp32 master weights and moments differently: whole parameters (stage 0), this rank's part of
a group's concatenated parameters (1, 2), or this rank's part of each parameter (3). This module maps them to elements
of parameters, so that any stage on any number of ranks can load a checkpoint. The 16-bit weights are not saved: they
are the rounded master weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparsetrain.errors import CheckpointError
from sparsetrain.training.checkpoints.files import DTYPES, Block, PieceReader, Slice
from sparsetrain.training.checkpoints.schema import EngineCounters, LossScale

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Piece:
    """A contiguous slice of one parameter within a flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class _Flat:
    """A flat tensor of fp32 master weights on this rank."""

    master: torch.Tensor
    """A parameter of any shape; the optimizer's state is keyed by it."""
    pieces: tuple[_Piece, ...]


def blocks(engine: Any) -> list[Block]:
    """The blocks that this rank saves: its part of master weights, moments and step counts; on rank 0 also buffers.

    The tensors are views of the engine's tensors.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    replicated = engine.zero_optimization_stage() == 0
    found: list[Block] = []
    for flat in _flats(engine):
        state = engine.basic_optimizer.state.get(flat.master, {})
        moments = {key: value for key, value in state.items() if torch.is_tensor(value) and value.ndim > 0}
        for kind, tensor in {"weight": flat.master, **moments}.items():
            elements = tensor.detach().view(-1)
            slices = tuple(Slice(kind, piece.name, piece.start, piece.offset, piece.numel) for piece in flat.pieces)
            # Without ZeRO every rank holds everything, and saves an equal part.
            found.append(_share(elements, slices[0], rank, size) if replicated else Block(elements, slices))
        if "step" in state:
            firsts = tuple(Slice("step", piece.name, 0, 0, 1) for piece in flat.pieces if piece.start == 0)
            if not replicated or rank == 0:
                found.append(Block(torch.tensor([float(state["step"])]), firsts))
    if rank == 0:
        for name, buffer in _buffers(engine.module):
            found.append(Block(buffer.detach().reshape(-1), (Slice("buffer", name, 0, 0, buffer.numel()),)))
    return [block for block in found if block.slices]


def fill(engine: Any, reader: PieceReader) -> None:
    """Load the master weights, moments, step counts and buffers of a checkpoint into a new engine.

    Raises:
        CheckpointError: The checkpoint has other parameters than the engine trains.
        ValueError: The checkpoint holds invalid numbers.
    """
    _check_same_parameters(engine, reader)
    _check_same_buffers(engine, reader)
    optimizer = engine.basic_optimizer
    moments = [kind for kind in ("exp_avg", "exp_avg_sq") if reader.names(kind)]
    for flat in _flats(engine):
        _read_flat(flat.master, "weight", flat, reader)
        if not bool(flat.master.detach().isfinite().all()):
            raise ValueError("weights are not finite")
        if not moments or not flat.pieces:
            continue  # no step had been applied
        step = torch.zeros(1)
        reader.read_into(step, "step", flat.pieces[0].name, 0)
        state: dict[str, Any] = {"step": _step_as_kept_by(optimizer, step, flat.master)}
        for kind in moments:
            state[kind] = torch.zeros_like(flat.master, requires_grad=False)
            _read_flat(state[kind], kind, flat, reader)
        optimizer.state[flat.master] = state
    _round_masters(engine)
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


def trained_elements(engine: Any) -> int:
    """The total number of elements of all trained parameters, on all ranks."""
    shapes = (getattr(p, "ds_shape", p.shape) for p in engine.module.parameters() if p.requires_grad)
    return sum(shape.numel() for shape in shapes)


def _flats(engine: Any) -> Iterator[_Flat]:
    optimizer, names = engine.optimizer, engine.param_names
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _partitioned(optimizer, names)
    elif stage > 0:
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
        groups = optimizer.bit16_groups if masters is not None else optimizer.bf16_groups
        for master, group in zip(masters or optimizer.fp32_groups_flat_partition, groups, strict=True):
            # The overlap of a parameter with this rank's part; both addresses count elements.
            pieces = []
            for parameter in group:
                if (met := parameter._hp_mapping) is not None:
                    there, here = met.lp_fragment_address, met.hp_fragment_address
                    pieces.append(_Piece(names[parameter], there.start, here.start, there.numel))
            yield _Flat(master, tuple(pieces))
    elif hasattr(optimizer, "fp32_groups"):  # 16-bit weights with masters beside them
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield _Flat(master, (_Piece(names[parameter], 0, 0, parameter.numel()),))
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield _Flat(parameter, (_Piece(names[parameter], 0, 0, parameter.numel()),))


def _partitioned(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[_Flat]:
    """ZeRO-3: equal parts of each parameter, the last ones padded or empty."""
    for index, (group, master) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        pieces = []
        for parameter in group:
            found, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            if found != index:
                raise CheckpointError(f"ZeRO-3 keeps {names[parameter]} in an unexpected place; please report this")
            start = part * dist.get_rank(group=parameter.ds_process_group)
            numel = min(part, parameter.ds_numel - start)
            if numel > 0:
                pieces.append(_Piece(names[parameter], start, offset, numel))
        yield _Flat(master, tuple(pieces))


def _share(elements: torch.Tensor, whole: Slice, rank: int, size: int) -> Block:
    part = -(-whole.numel // size)
    start = min(part * rank, whole.numel)
    mine = elements[start : start + part]
    if mine.numel() == 0:
        return Block(mine, ())
    return Block(mine, (Slice(whole.kind, whole.name, start, 0, mine.numel()),))


def _read_flat(out: torch.Tensor, kind: str, flat: _Flat, reader: PieceReader) -> None:
    elements = out.detach().view(-1)
    for piece in flat.pieces:
        reader.read_into(elements[piece.offset : piece.offset + piece.numel], kind, piece.name, piece.start)


def _step_as_kept_by(optimizer: Any, step: torch.Tensor, master: torch.Tensor) -> torch.Tensor | int:
    """The step count in the optimizer's own form: a tensor for torch (on the device if fused), an int for
    DeepSpeedCPUAdam."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return int(step)
    return step[0].to(master.device if optimizer.defaults["fused"] else "cpu")


def _round_masters(engine: Any) -> None:
    """Update the model's weights from the master weights, on every rank."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        state = optimizer.state_dict()  # contains the master weights that were just loaded
        optimizer.load_state_dict([state] * dist.get_world_size(), load_optimizer_states=False)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                parameter.data.copy_(master)


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
