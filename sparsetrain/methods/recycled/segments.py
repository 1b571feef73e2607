"""The segments of packed documents: which rows attend fully, which of them choose keys, and for which rows.

A document has a prompt of ``P`` tokens and then segments of ``S`` tokens. The last token of the prompt, and every
``S``-th token after it, chooses keys for the tokens up to the next choice. These rows and all of the prompt's attend to
every earlier token. Without a prompt the first token chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsetrain.methods.base import PassDocuments


@dataclass(frozen=True)
class Segments:
    """The segments of a packed row, on one device, in ascending order. A segment may have no rows besides its first."""

    starts: Tensor
    """int32 ``[G]``: the row that chooses."""
    documents: Tensor
    """int32 ``[G]``: the first row of the document."""
    prompts: Tensor
    """int32 ``[P]``, ascending: the rows of prompts before the one that chooses, which attend fully too."""
    bounds: Tensor
    """int32 ``[G + 1]``: the first row of each segment, which for the first of a document is the document's, and the
    length of the row."""
    prompt_bounds: Tensor
    """int32 ``[D + 1]``: where each prompt begins among :attr:`prompts`, and their number. It stays on the CPU, where
    dense attention reads it."""
    _elsewhere: dict[torch.device, Segments] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Segments:
        """The same on a device; copied once for all layers of a pass."""
        if device == self.starts.device:
            return self
        if device not in self._elsewhere:
            moved: dict[str, Any] = {
                name: tensor if name == "prompt_bounds" else on_device(tensor, device)
                for name, tensor in vars(self).items()
                if isinstance(tensor, Tensor)
            }
            self._elsewhere[device] = Segments(**moved)
        return self._elsewhere[device]

    def keep(self, chosen: Tensor) -> Segments:
        """Only some of the segments; the rows of the others join the segment before them.

        Args:
            chosen: bool ``[G]`` on the device of the segments, True for the first segment of each document.
        """
        kept = chosen.nonzero()[:, 0]
        bounds = torch.cat([self.bounds[kept], self.bounds[-1:]])
        return replace(self, starts=self.starts[kept], documents=self.documents[kept], bounds=bounds, _elsewhere={})


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, ``[...]``, on a device, without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def make_segments(bounds: Sequence[int], prompts: Sequence[int], every: Sequence[int]) -> Segments:
    """The segments of a packed row, on the CPU.

    Args:
        bounds: The start of each document, and the tokens of the row.
        prompts: Tokens of each document's prompt, from 0 to all.
        every: Tokens of each document's segments.
    """
    starts, documents, before, begins, ends = [], [], [], [], [0]
    for first, after, prompt, size in zip(bounds[:-1], bounds[1:], prompts, every, strict=True):
        chooses = first + min(max(prompt - 1, 0), after - first - 1)
        own = np.arange(chooses, after, size, dtype=np.int32)
        starts.append(own)
        begins.append(np.append(np.int32(first), own[1:]))
        documents.append(np.full(len(own), first, dtype=np.int32))
        before.append(np.arange(first, chooses, dtype=np.int32))
        if chooses > first:
            ends.append(ends[-1] + chooses - first)
    begins.append(np.full(1, bounds[-1], dtype=np.int32))
    lists = (starts, documents, before, begins)
    choosing, of, full, begin = (torch.from_numpy(np.concatenate(each)) for each in lists)
    return Segments(choosing, of, full, begin, torch.tensor(ends, dtype=torch.int32))


def drawn_segments(documents: PassDocuments, every: Sequence[int], *, text_prefix: str, fixed: int) -> Segments:
    """The segments of a pass of training or evaluation.

    In training each document has a length of ``every``, drawn by seed, step and name: it does not depend on how a batch
    is divided among ranks, and a resumed run draws the same. In evaluation all have ``fixed``.

    Args:
        every: The lengths to draw from.
        text_prefix: ``uniform`` draws the prompt of plain text, whose second token is a target, in training; ``none``
            makes its first token choose.
    """
    from sparsetrain.randomness import uniform

    seed, count = documents.seed, len(documents.bounds) - 1
    prompts, sizes = list(documents.prompts), [fixed] * count
    if seed is not None:
        for index in range(count):
            name = documents.names[index] if index < len(documents.names) else ""
            if len(every) > 0:
                sizes[index] = every[int(uniform(seed, "segments", documents.step, name) * len(every))]
            if text_prefix == "uniform" and prompts[index] <= 1:
                tokens = documents.bounds[index + 1] - documents.bounds[index]
                prompts[index] = int(uniform(seed, "prefix", documents.step, name) * (tokens + 1))
    return make_segments(documents.bounds, prompts, sizes)


_KNOWN = WeakIdKeyDictionary()
"""Results of :func:`plain_segments` for the passes in progress."""


def plain_segments(cu_seqlens: Tensor, every: int) -> Segments:
    """The segments of documents without prompts, on the CPU. Every layer of a pass asks with the same tensor.

    Args:
        cu_seqlens: int32 ``[documents + 1]``; read on the host once.
    """
    state = None if cu_seqlens.is_inference() else (cu_seqlens._version, every)
    known, found = _KNOWN.get(cu_seqlens, (None, None))
    if state is None or state != known:
        bounds = cu_seqlens.tolist()
        found = make_segments(bounds, [0] * (len(bounds) - 1), [every] * (len(bounds) - 1))
        _KNOWN[cu_seqlens] = state, found
    assert found is not None
    return found
