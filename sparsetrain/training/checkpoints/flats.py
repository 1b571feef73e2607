"""Where a DeepSpeed engine keeps its master weights: flat tensors, and the parameters whose elements they hold.

Every ZeRO stage partitions them differently: whole parameters (stage 0), this rank's part of a group's concatenated
parameters (1, 2), or this rank's part of each parameter (3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import nn

from sparsetrain.errors import CheckpointError
from sparsetrain.training.checkpoints.optimizer_state import Flat, Piece


def flats(engine: Any) -> Iterator[Flat]:
    """The flat tensors of master weights on this rank."""
    optimizer, names = engine.optimizer, engine.param_names
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _of_each_parameter(optimizer, names)
    elif stage > 0:
        yield from _of_groups(optimizer, names)
    elif hasattr(optimizer, "fp32_groups"):  # 16-bit weights with masters beside them
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield Flat(master, (Piece(names[parameter], 0, 0, parameter.numel()),))
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield Flat(parameter, (Piece(names[parameter], 0, 0, parameter.numel()),))


def _of_groups(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Flat]:
    """ZeRO 1 and 2: this rank's part of each group's parameters, one after the other."""
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
    groups = optimizer.bit16_groups if masters is not None else optimizer.bf16_groups
    for index, (master, group) in enumerate(zip(masters or optimizer.fp32_groups_flat_partition, groups, strict=True)):
        # The overlap of a parameter with this rank's part; both addresses count elements.
        pieces = []
        for parameter in group:
            if (met := parameter._hp_mapping) is not None:
                there, here = met.lp_fragment_address, met.hp_fragment_address
                pieces.append(Piece(names[parameter], there.start, here.start, there.numel))
        whole = None if masters is None else _in_a_row(optimizer.params_in_partition[index], names)
        yield Flat(master, tuple(pieces), whole)


def _in_a_row(parameters: Sequence[nn.Parameter], names: dict[nn.Parameter, str]) -> tuple[Piece, ...]:
    """Whole parameters, one after the other."""
    ends = list(accumulate(parameter.numel() for parameter in parameters))
    return tuple(
        Piece(names[parameter], 0, end - parameter.numel(), parameter.numel())
        for parameter, end in zip(parameters, ends)
    )


def _of_each_parameter(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Flat]:
    """ZeRO 3: equal parts of each parameter, the last ones padded or empty."""
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
                pieces.append(Piece(names[parameter], start, offset, numel))
        yield Flat(master, tuple(pieces))


def round_masters(engine: Any) -> None:
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
