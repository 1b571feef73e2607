"""How the tokens of a batch are dealt to the ranks that share it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsetrain.data import collate
from sparsetrain.data.batch import IGNORE, Row
from sparsetrain.data.sequence_part import sequence_part


@pytest.fixture
def batch():
    """Two rows, three documents, 11 tokens; the middle document has no loss on its second token."""
    rows = [
        Row(np.arange(10, 17), np.array([IGNORE, 11, 12, IGNORE, IGNORE, 15, 16]), [3, 4], ["a", "b"]),
        Row(np.arange(20, 24), np.array([IGNORE, 21, 22, 23]), [4], ["c"]),
    ]
    return collate(rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 11])
def test_the_parts_are_the_batch(batch, ranks):
    parts = [sequence_part(batch, rank, ranks) for rank in range(ranks)]
    assert {part.input_ids.shape[1] for part in parts} == {-(-11 // ranks)}
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1)[:, :11], getattr(batch, name))
    assert sum(part.num_tokens for part in parts) == 11
    assert sum(part.num_target_tokens for part in parts) == batch.num_target_tokens


@pytest.mark.parametrize("ranks", [2, 3, 4, 11])
def test_every_target_is_predicted_by_the_token_before_it_and_once(batch, ranks):
    wanted = [(int(batch.input_ids[0, i]), int(batch.labels[0, i + 1])) for i in range(10)]
    found = []
    for part in (sequence_part(batch, rank, ranks) for rank in range(ranks)):
        assert part.labels.shape[1] == part.input_ids.shape[1] + 1
        found += zip(part.input_ids[0].tolist(), part.labels[0, 1:].tolist(), strict=True)
    assert [pair for pair in found if pair[1] != IGNORE] == [pair for pair in wanted if pair[1] != IGNORE]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_fills_up_is_a_document_of_its_own(batch, ranks):
    total = -(-11 // ranks) * ranks
    for part in (sequence_part(batch, rank, ranks) for rank in range(ranks)):
        assert part.cu_seqlens.tolist() == [0, 3, 7, 11, *([total] if total > 11 else [])]
        assert part.cu_seqlens.dtype == torch.int32
        if part.padding:
            assert part.position_ids[0, -part.padding :].max() < total - 11


def test_with_more_ranks_than_tokens_some_hold_only_what_fills_up(batch):
    parts = [sequence_part(batch, rank, 16) for rank in range(16)]
    assert [part.num_tokens for part in parts] == [1] * 11 + [0] * 5
    assert [part.padding for part in parts] == [0] * 11 + [1] * 5
