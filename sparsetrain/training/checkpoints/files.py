"""The tensor files of a checkpoint: safetensors, written in one pass with a checksum, and read in slices.

Every tensor is one-dimensional and named ``kind/start/parameter``: elements ``start``, ``start + 1``, ... of a
flattened parameter, or of one of its optimizer moments. The files of all ranks together hold each element once, so any
number of ranks can read them, and so can any program that reads safetensors.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparsetrain.durable import write_whole
from sparsetrain.errors import CheckpointError

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ELEMENTWISE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")
"""State of an optimizer with an element for each element of the parameter."""
FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")
"""Adafactor's: an element for each row and each column."""
BLOCKWISE = ("absmax1", "absmax2")
"""Of 8-bit states: their division over ranks, and an element for each 256 elements of a rank."""
KINDS = ("weight", *ELEMENTWISE, *FACTORS, *BLOCKWISE, "step", "buffer")
STORED = {"weight": ("F32", "BF16"), **dict.fromkeys(ELEMENTWISE, ("F32", "BF16")), "state1": ("F32", "U8")}
STORED["state2"] = STORED["state1"]
"""The dtypes of a kind, other than F32 alone; buffers have any."""
CHUNK = 1 << 26
"""Bytes that are written or checksummed at once."""


@dataclass(frozen=True)
class Slice:
    """A slice of a block, and the name under which it is saved."""

    kind: str
    """One of :data:`KINDS`."""
    name: str
    """The name of the parameter."""
    start: int
    """The index of its first element in the flattened parameter."""
    offset: int
    """The index of its first element in the block."""
    numel: int
    """Its elements."""

    @property
    def key(self) -> str:
        """The name of the tensor in the file."""
        return f"{self.kind}/{self.start}/{self.name}"


@dataclass(frozen=True)
class Block:
    """A flat tensor of this rank on any device, and its slices to save."""

    tensor: torch.Tensor
    slices: tuple[Slice, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    def copied(self) -> Block:
        """A copy in host memory, which training does not change."""
        return Block(self.tensor.detach().to("cpu", copy=True), self.slices)


def write_blocks(path: Path, blocks: Sequence[Block], on_progress: Callable[[], None]) -> dict[str, Any]:
    """Write the slices of ``blocks`` as a safetensors file, flushed to the disk.

    The writer of safetensors needs all tensors in host memory and computes no checksum; this one copies them from the
    device in chunks.

    Args:
        on_progress: Called after each chunk.

    Returns:
        ``bytes`` and ``crc32`` of the file.
    """
    header: dict[str, Any] = {}
    position = 0
    for block in blocks:
        for each in block.slices:
            size = each.numel * block.tensor.element_size()
            dtype = DTYPES[block.tensor.dtype]
            header[each.key] = {"dtype": dtype, "shape": [each.numel], "data_offsets": [position, position + size]}
            position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        total, checksum = 0, 0
        for data in _stream(struct.pack("<Q", len(text)) + text, blocks):
            file.write(data)
            total += len(data)
            checksum = zlib.crc32(data, checksum)
            on_progress()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": total, "crc32": f"{checksum:08x}"}


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a text file atomically and flush it to the disk; returns its ``bytes`` and ``crc32``."""
    data = text.encode()
    write_whole(path, data)
    return {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def checksum_of(path: Path, on_progress: Callable[[], None] = lambda: None) -> str:
    """CRC-32 of a file in hexadecimal; ``on_progress`` is called after each chunk."""
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            checksum = zlib.crc32(data, checksum)
            on_progress()
    return f"{checksum:08x}"


def _stream(header: bytes, blocks: Iterable[Block]) -> Iterator[memoryview]:
    yield memoryview(header)
    for block in blocks:
        elements, count = block.tensor.detach(), CHUNK // block.tensor.element_size()
        for each in block.slices:
            for part in elements[each.offset : each.offset + each.numel].split(count):
                yield memoryview(part.cpu().view(torch.uint8).numpy())


class PieceReader:
    """Reads slices of parameters from the tensor files of all ranks.

    Args:
        files: The tensor files of one complete checkpoint.

    Raises:
        OSError, SafetensorError: A file cannot be read.
        ValueError: A tensor does not belong in a checkpoint, or the slices do not hold each element exactly once.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._checkpoint = files[0].parent
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._dtypes: dict[tuple[str, str], str] = {}
        for file in files:
            handle = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
                self._add(file, handle, key)
        for (kind, name), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            if kind in BLOCKWISE:
                continue
            position = 0
            for start, numel, _, _ in pieces:
                if start != position:
                    fault = "is missing" if start > position else "appears twice"
                    raise ValueError(f"element {min(start, position)} of {kind} of {name} {fault}")
                position += numel

    def _add(self, file: Path, handle: Any, key: str) -> None:
        kind, _, rest = key.partition("/")
        start, _, name = rest.partition("/")
        piece = handle.get_slice(key)
        shape, dtype = piece.get_shape(), piece.get_dtype()
        if kind not in KINDS or not (start.isascii() and start.isdecimal()) or not name or len(shape) != 1:
            raise ValueError(f"{file.name} holds {key!r:.80} of shape {shape}, which is not a tensor of a checkpoint")
        expected = tuple(DTYPES.values()) if kind == "buffer" else STORED.get(kind, ("F32",))
        if dtype not in expected:
            raise ValueError(f"{file.name} holds {kind} of {name} in {dtype}; checkpoints keep it in {expected[0]}")
        if self._dtypes.setdefault((kind, name), dtype) != dtype:
            raise ValueError(f"{kind} of {name} is kept in {self._dtypes[kind, name]} and in {dtype}")
        self._pieces.setdefault((kind, name), []).append((int(start), shape[0], handle, key))

    def names(self, kind: str) -> set[str]:
        """The names of the parameters with data of ``kind``."""
        return {name for found, name in self._pieces if found == kind}

    def numel(self, kind: str, name: str) -> int:
        """The number of elements of a parameter."""
        return max(start + numel for start, numel, _, _ in self._pieces[kind, name])

    def dtype(self, kind: str, name: str) -> str:
        """The dtype of a parameter, as safetensors names it."""
        return self._dtypes[kind, name]

    def torch_dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype of a parameter, as torch names it."""
        return next(each for each, text in DTYPES.items() if text == self.dtype(kind, name))

    def piece(self, kind: str, name: str, start: int) -> torch.Tensor | None:
        """The slice ``[n]`` that was saved with this start; None if there is none."""
        found = (each for each in self._pieces.get((kind, name), ()) if each[0] == start)
        return next((handle.get_tensor(key) for _, _, handle, key in found), None)

    def read_into(self, out: torch.Tensor, kind: str, name: str, start: int) -> None:
        """Fill ``out`` ``[n]`` (any device) with the elements of a flattened parameter from ``start`` on.

        Raises:
            CheckpointError: The checkpoint does not hold all of them.
        """
        position, end = start, start + out.numel()
        for first, numel, handle, key in self._pieces.get((kind, name), ()):
            last = min(first + numel, end)
            if first <= position < last:
                piece = handle.get_slice(key)[position - first : last - first]
                out[position - start : last - start].copy_(piece)
                position = last
        if position < end:
            raise CheckpointError(
                f"{self._checkpoint} lacks elements {position} to {end - 1} of {kind} of {name}: it belongs to "
                "another model or recipe"
            )

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """All elements of a parameter, flattened ``[n]``, in its stored dtype and in host memory."""
        first = self._pieces[kind, name][0]
        out = torch.empty(self.numel(kind, name), dtype=first[2].get_slice(first[3])[:0].dtype)
        self.read_into(out, kind, name, 0)
        return out
