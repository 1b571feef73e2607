"""Options that the benchmarks share, checked and completed for the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sparsetrain.errors import BenchError

LENGTHS = {"cuda": "8192,32768,131072", "cpu": "1024,4096"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Shape(NamedTuple):
    """What suits the machine: long sequences in bfloat16 on CUDA, short ones in float32 on a CPU."""

    device: torch.device
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dtype: torch.dtype


def resolve_shape(
    device: str | None,
    lengths: str | None,
    heads: int | None,
    kv_heads: int | None,
    dtype: str | None,
    defaults: Mapping[str, str] = LENGTHS,
) -> Shape:
    """Check the shape and fill in what was not given; the lengths are those of the device in ``defaults``.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"
    heads = heads or (32 if cuda else 4)
    kv_heads = kv_heads or min(8 if cuda else 2, heads)
    dtype = dtype or ("bfloat16" if cuda else "float32")
    if heads % kv_heads:
        raise BenchError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}; every KV head serves as many heads")
    if dtype not in DTYPES:
        raise BenchError(f"--dtype {dtype} is not known; choose one of {', '.join(DTYPES)}")
    sizes = parse_lengths(lengths or defaults[device])
    return Shape(torch.device(device), sizes, heads, kv_heads, DTYPES[dtype])


def parse_lengths(text: str) -> tuple[int, ...]:
    """``--lengths``, without repeats."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise BenchError(f"--lengths {text} must be whole numbers of tokens with commas between, such as 8192,32768")
    return tuple(dict.fromkeys(map(int, words)))


def check_output(output: Path | None) -> None:
    """``--output`` is where a folder may be."""
    if output is not None and output.exists() and not output.is_dir():
        raise BenchError(f"--output {output} is a file; name a folder")
