"""The reference's log-likelihoods of pairs, measured before (:mod:`sparsetrain.training.preference.measure`)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from sparsetrain.data.batch import Batch
from sparsetrain.data.document import IGNORE
from sparsetrain.errors import DataError


class Reference:
    """Log-likelihoods of both answers by pair.

    Args:
        known: Those of the preferred and the rejected answer, by :func:`pair_keys`.
    """

    def __init__(self, known: dict[str, list[float]]) -> None:
        self._known = known

    def of(self, batch: Batch) -> torch.Tensor:
        """Log-likelihoods of the documents of a batch, fp64 ``[2 pairs]``.

        Raises:
            DataError: A pair was not measured: the data has changed since.
        """
        bounds = batch.cu_seqlens.numpy()
        keys = pair_keys(batch.input_ids[0].numpy(), batch.labels[0].numpy(), bounds)
        for key, name in zip(keys, batch.origin[::2]):
            if key not in self._known:
                raise DataError(
                    f"the reference of {name} was not measured before training; the data has changed since the run "
                    "began: restore it, or start a new run"
                )
        return torch.tensor([value for key in keys for value in self._known[key]], dtype=torch.float64)


def pair_keys(input_ids: np.ndarray, labels: np.ndarray, bounds: np.ndarray) -> list[str]:
    """A digest of the tokens and targets of each pair of neighbouring documents.

    Args:
        input_ids, labels: int64 ``[T]``.
        bounds: Integers ``[documents + 1]``.
    """
    keys = []
    for start, middle, stop in zip(bounds[:-2:2], bounds[1:-1:2], bounds[2::2]):
        found = hashlib.blake2b(int(middle - start).to_bytes(8, "little"), digest_size=12)
        found.update(np.ascontiguousarray(input_ids[start:stop], dtype=np.int64).tobytes())
        found.update(np.ascontiguousarray(labels[start:stop] != IGNORE).tobytes())
        keys.append(found.hexdigest())
    return keys
