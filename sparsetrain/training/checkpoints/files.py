"""The tensor files of a checkpoint: safetensors written in one pass, with a checksum, and read piece by piece.

Every tensor is one-dimensional and named ``kind/start/parameter``: elements ``start``, ``start + 1``, ... of a
parameter laid out flat, or of one of its optimizer moments. Together the files of all ranks hold each element once, so
they can be read by any number of ranks, and by any program that reads safetensors.
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
KINDS = ("weight", "exp_avg", "exp_avg_sq", "step", "buffer")
CHUNK = 1 << 26
"""Bytes that are written, or read to be summed, at a time."""


@dataclass(frozen=True)
class Slice:
    """A part of a block under the name it is saved by."""

    kind: str
    """One of :data:`KINDS`."""
    name: str
    """Of the parameter."""
    start: int
    """Its first element, within the parameter laid out flat."""
    offset: int
    """Its first element, within the block."""
    numel: int
    """Its elements."""

    @property
    def key(self) -> str:
        """Name of the tensor in the file."""
        return f"{self.kind}/{self.start}/{self.name}"


@dataclass(frozen=True)
class Block:
    """A flat tensor of this rank, on any device, of which slices are saved."""

    tensor: torch.Tensor
    slices: tuple[Slice, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.element_size()

    def copied(self) -> Block:
        """The same in host memory of its own, which training does not change."""
        return Block(self.tensor.detach().to("cpu", copy=True), self.slices)


def write_blocks(path: Path, blocks: Sequence[Block], on_progress: Callable[[], None]) -> dict[str, Any]:
    """Write the slices of ``blocks`` as a safetensors file, flushed to the disk.

    safetensors' own writer wants all tensors in host memory at once and knows no checksum; this one copies a chunk at a
    time from the device.

    Args:
        on_progress: called after each part that was written.

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
    """Write a text file, flushed to the disk; returns its ``bytes`` and ``crc32``. It appears whole or not at all."""
    data = text.encode()
    write_whole(path, data)
    return {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def checksum_of(path: Path, on_progress: Callable[[], None] = lambda: None) -> str:
    """CRC-32 of a file, in hexadecimal; ``on_progress`` is called after each part that was read."""
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
    """Reads runs of elements from the tensor files of all ranks, wherever they lie.

    Args:
        files: those of one complete checkpoint.

    Raises:
        OSError, SafetensorError: a file cannot be read.
        ValueError: a tensor is none of a checkpoint, or the pieces do not hold each element once.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._checkpoint = files[0].parent
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._dtypes: dict[tuple[str, str], str] = {}
        for file in files:
            handle = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                self._add(file, handle, key)
        for (kind, name), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            position = 0
            for start, numel, _, _ in pieces:
                if start != position:
                    fault = "is missing" if start > position else "is there twice"
                    raise ValueError(f"element {min(start, position)} of {kind} of {name} {fault}")
                position += numel

    def _add(self, file: Path, handle: Any, key: str) -> None:
        kind, _, rest = key.partition("/")
        start, _, name = rest.partition("/")
        piece = handle.get_slice(key)
        shape, dtype = piece.get_shape(), piece.get_dtype()
        if kind not in KINDS or not (start.isascii() and start.isdecimal()) or not name or len(shape) != 1:
            raise ValueError(f"{file.name} holds {key!r:.80} of shape {shape}, which is no tensor of a checkpoint")
        if dtype not in DTYPES.values() or (kind != "buffer" and dtype != "F32"):
            raise ValueError(f"{file.name} holds {kind} of {name} in {dtype}; checkpoints keep it in F32")
        if self._dtypes.setdefault((kind, name), dtype) != dtype:
            raise ValueError(f"{kind} of {name} is kept in {self._dtypes[kind, name]} and in {dtype}")
        self._pieces.setdefault((kind, name), []).append((int(start), shape[0], handle, key))

    def names(self, kind: str) -> set[str]:
        """Of the parameters that have anything of ``kind``."""
        return {name for found, name in self._pieces if found == kind}

    def numel(self, kind: str, name: str) -> int:
        """Elements of a parameter, laid out flat."""
        return max(start + numel for start, numel, _, _ in self._pieces[kind, name])

    def dtype(self, kind: str, name: str) -> str:
        """Of a parameter, as safetensors names it."""
        return self._dtypes[kind, name]

    def read_into(self, out: torch.Tensor, kind: str, name: str, start: int) -> None:
        """Fill ``out`` (one-dimensional, any device) with the elements of a parameter from ``start`` on.

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
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
        """All elements of a parameter, one-dimensional, in host memory."""
        first = self._pieces[kind, name][0]
        out = torch.empty(self.numel(kind, name), dtype=first[2].get_slice(first[3])[:0].dtype)
        self.read_into(out, kind, name, 0)
        return out
