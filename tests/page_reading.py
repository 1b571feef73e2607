"""Texts that memories of pages read call by call, the patterns they read by, and what attention over all gives."""

from __future__ import annotations

from typing import Any

import torch
from sparsetrain_kernels import block_pattern_attention

from sparsetrain.patterns import DilatedPattern, LongNetPattern, PowerPattern, StridePattern

PATTERNS: dict[str, Any] = {
    "power": PowerPattern(4, 2, 1),
    "stride": StridePattern(4, 2, 0, 3),
    "dilated": DilatedPattern(4, 3, 2),
    "longnet": LongNetPattern(4, ((2, 1), (8, 2)), head_shift=True, num_heads=2),
}
TOKENS = 120
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STARTS = (0, 13)
"""Where the rows of :func:`read_padded` begin."""


def make_text() -> list[torch.Tensor]:
    """Query, key and value of two rows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, TOKENS, 8, generator=generator) for heads in (4, 2, 2)]


def attend_by(pattern: Any) -> Any:
    """What a memory calls for a prompt."""

    def attend(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        return block_pattern_attention(query, key, value, pattern, **options)

    return attend


def read(memory: Any, text: list[torch.Tensor], start: int, stop: int, starts: Any = None) -> torch.Tensor:
    """The next tokens of a text."""
    return memory.attend(None, *(tensor[:, :, start:stop] for tensor in text), starts=starts)


def read_padded(memory: Any, text: list[torch.Tensor], chunks: list[int]) -> torch.Tensor:
    """The text in chunks and then 60 steps, with the first tokens of the second row hidden as padding."""
    at, out = 0, []
    for tokens in [*chunks, *[1] * 60]:
        hidden = [min(max(start - at, 0), tokens) for start in STARTS]
        out.append(read(memory, text, at, at + tokens, hidden if any(hidden) else None))
        at += tokens
    return torch.cat(out, 2)


def alone(pattern: Any, text: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each of those rows by itself."""
    return [
        block_pattern_attention(*(tensor[row, None, :, start:] for tensor in text), pattern)
        for row, start in enumerate(STARTS)
    ]
