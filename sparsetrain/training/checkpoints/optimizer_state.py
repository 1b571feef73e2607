"""What an optimizer keeps beside the master weights, as slices of parameters.

================  ==========================  ======================================================
optimizer         of each parameter           shape
================  ==========================  ======================================================
AdamW             ``exp_avg, exp_avg_sq``     an element a weight, fp32 or bf16
8-bit AdamW       ``state1, state2``          a byte a weight, and ``absmax1, absmax2``: fp32 for each 256 weights of
                                              this rank's flat tensor (small tensors: fp32 elements)
Muon              ``momentum_buffer``         an element a weight; AdamW's of what Muon does not train
Adafactor         ``exp_avg_sq_row, ..._col``  a row and a column of a matrix, or ``exp_avg_sq`` of a vector
================  ==========================  ======================================================

Each also has a count of its ``step``, but for Muon's momentum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsetrain.training.checkpoints.files import BLOCKWISE, ELEMENTWISE, FACTORS, Block, PieceReader, Slice


class OtherDivision(Exception):
    """8-bit states belong to another division of the weights over ranks."""


@dataclass(frozen=True)
class Piece:
    """A contiguous slice of one parameter within a flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A flat tensor of master weights on this rank."""

    master: torch.Tensor
    """A parameter of any shape; the optimizer's state is keyed by it."""
    pieces: tuple[Piece, ...]
    whole: tuple[Piece, ...] | None = None
    """Where Muon's momentum of ZeRO 1 and 2 lies: whole matrices one after the other, also those that another rank
    has a part of. None if it lies as the master weights do."""


def state_blocks(optimizer: Any, flat: Flat) -> Iterator[tuple[str, Block]]:
    """The tensors and the step count of a flat tensor's state, with the slices to save."""
    state = optimizer.state.get(flat.master, {})
    for kind in ELEMENTWISE:
        if (tensor := state.get(kind)) is not None:
            pieces = flat.pieces
            if kind == "momentum_buffer" and flat.whole is not None:
                # A matrix on several ranks is saved by the one that has its first element.
                begun = {piece.name for piece in flat.pieces if piece.start == 0}
                pieces = tuple(piece for piece in flat.whole if piece.name in begun)
            slices = tuple(Slice(kind, each.name, each.start, each.offset, each.numel) for each in pieces)
            yield kind, Block(tensor.detach().view(-1), slices)
    for kind in FACTORS:
        if (tensor := state.get(kind)) is not None:
            yield kind, Block(tensor.detach().view(-1), (Slice(kind, flat.pieces[0].name, 0, 0, tensor.numel()),))
    for kind in BLOCKWISE:
        if (tensor := state.get(kind)) is not None and flat.pieces:
            marked = torch.cat([_fingerprint(flat).to(tensor), tensor])
            first = flat.pieces[0]
            yield kind, Block(marked, (Slice(kind, first.name, first.start, 0, marked.numel()),))
    if "step" in state:
        firsts = tuple(Slice("step", piece.name, 0, 0, 1) for piece in flat.pieces if piece.start == 0)
        yield "step", Block(torch.tensor([float(state["step"])]), firsts)


def fill_state(optimizer: Any, flat: Flat, reader: PieceReader) -> None:
    """Load the state of a flat tensor, in the form that the optimizer keeps it in.

    Raises:
        OtherDivision: It holds 8-bit states of another division over ranks.
    """
    if not flat.pieces:
        return
    name = flat.pieces[0].name
    state: dict[str, Any] = {}
    for kind in ELEMENTWISE:
        if name in reader.names(kind):
            pieces = flat.whole if kind == "momentum_buffer" and flat.whole is not None else flat.pieces
            numel = sum(piece.numel for piece in pieces) if pieces is flat.whole else flat.master.numel()
            out = torch.zeros(numel, dtype=reader.torch_dtype(kind, name), device=flat.master.device)
            for piece in pieces:
                reader.read_into(out[piece.offset : piece.offset + piece.numel], kind, piece.name, piece.start)
            state[kind] = out if pieces is flat.whole else out.view(flat.master.shape)
    for kind in FACTORS:
        if name in reader.names(kind):
            shape = flat.master.shape[:-1] if kind.endswith("row") else flat.master.shape[:-2] + flat.master.shape[-1:]
            state[kind] = reader.whole(kind, name).view(shape).to(flat.master.device)
    if state and state.get("state1", flat.master).dtype == torch.uint8:
        state |= _scales(optimizer, flat, reader)
    if name in reader.names("step"):
        step = torch.zeros(1)
        reader.read_into(step, "step", name, 0)
        state["step"] = _step_as_kept_by(optimizer, step, flat.master)
    if "exp_avg_sq_row" in state or ("exp_avg_sq" in state and "exp_avg" not in state):
        state["RMS"] = 0  # Adafactor computes it in each step
    if state:
        optimizer.state[flat.master] = state


def _scales(optimizer: Any, flat: Flat, reader: PieceReader) -> dict[str, Any]:
    """The scales of 8-bit states, and bitsandbytes' tables of what its bytes mean."""
    if "dynamic" not in optimizer.name2qmap:
        optimizer.fill_qmap()
    device, first = flat.master.device, flat.pieces[0]
    found: dict[str, Any] = {}
    for number, table in (("1", "dynamic"), ("2", "udynamic")):
        optimizer.name2qmap[table] = found[f"qmap{number}"] = optimizer.name2qmap[table].to(device)
        marked = reader.piece(f"absmax{number}", first.name, first.start)
        if marked is None or marked[0] != _fingerprint(flat)[0]:
            raise OtherDivision
        found[f"absmax{number}"] = marked[1:].to(device)
    return found


def _fingerprint(flat: Flat) -> torch.Tensor:
    """A number of a flat tensor's division into parameters, exact in fp32."""
    text = ";".join(f"{each.name},{each.start},{each.offset},{each.numel}" for each in flat.pieces)
    return torch.tensor([float(zlib.crc32(text.encode()) & 0xFFFFFF)])


def _step_as_kept_by(optimizer: Any, step: torch.Tensor, master: torch.Tensor) -> torch.Tensor | int:
    """The step count in the optimizer's own form: a tensor for torch's AdamW (on the device if fused), also beside
    Muon, and an int for others."""
    inner = getattr(optimizer, "aux_optimizer", None) or optimizer
    if not isinstance(inner, torch.optim.AdamW):
        return int(step)
    return step[0].to(master.device if inner.defaults["fused"] else "cpu")
