"""Ranks share one stream; the thread that prepares steps fails and stops in the open."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import pytest

from sparsetrain.data import StepLoader
from sparsetrain.errors import DataError


@dataclass
class Plan:
    micro_batch: int
    accumulation: int
    ranks: int
    parallel: int = 1


@pytest.fixture
def rows(write_jsonl, stream):
    path = write_jsonl([{"text": f"document {i} " * (i % 9)} for i in range(60)])
    return lambda: stream(
        {"path": path, "name": "mine"}, {"synthetic": "passkey", "digits": 1, "lengths": [500]}, length=512
    )


def steps(stream, plan, rank, count):
    loader = StepLoader(stream, plan, rank)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize(
    "plan", [Plan(8, 1, 1), Plan(2, 4, 1), Plan(2, 2, 2), Plan(1, 4, 2), Plan(2, 1, 4), Plan(1, 2, 4)]
)
def test_the_global_batch_depends_on_its_size_alone(plan, rows):
    direct = rows()
    by_rank = [steps(rows(), plan, rank, 3) for rank in range(plan.ranks)]
    for step in zip(*by_rank):
        micro_batches = [
            step[rank].micro_batches[accumulation]
            for accumulation in range(plan.accumulation)
            for rank in range(plan.ranks)
        ]
        expected = [next(direct) for _ in range(8)]
        assert [token for batch in micro_batches for token in batch.input_ids[0].tolist()] == [
            token for row in expected for token in row.input_ids.tolist()
        ]
        assert [name for batch in micro_batches for name in batch.origin] == [
            name for row in expected for name in row.origin
        ]
        assert all(part.state == direct.state_dict() for part in step)


def test_ranks_that_share_a_sequence_read_its_parts_in_order(rows):
    whole = [steps(rows(), Plan(2, 2, 2), rank, 2) for rank in range(2)]
    parts = [steps(rows(), Plan(2, 2, 2, parallel=3), rank, 2) for rank in range(6)]
    for group in range(2):
        for step in range(2):
            assert parts[3 * group][step].state == whole[group][step].state
            for index, batch in enumerate(whole[group][step].micro_batches):
                held = [parts[3 * group + part][step].micro_batches[index] for part in range(3)]
                joined = [token for part in held for token in part.input_ids[0].tolist()]
                assert joined[: batch.input_ids.shape[1]] == batch.input_ids[0].tolist()
                assert sum(part.num_tokens for part in held) == batch.num_tokens


def test_a_step_carries_the_state_after_it_whatever_was_prefetched(rows):
    plan = Plan(2, 2, 2)
    first = steps(rows(), plan, 1, 5)
    stream = rows()
    stream.load_state_dict(json.loads(json.dumps(first[2].state)))
    for step, expected in zip(steps(stream, plan, 1, 2), first[3:], strict=True):
        assert [batch.input_ids.tolist() for batch in step.micro_batches] == [
            batch.input_ids.tolist() for batch in expected.micro_batches
        ]
        assert step.state == expected.state


def test_a_state_resumes_on_another_number_of_ranks(rows):
    state = steps(rows(), Plan(1, 2, 4), 3, 2)[-1].state

    def next_step(plan, rank):
        stream = rows()
        stream.load_state_dict(state)
        return steps(stream, plan, rank, 1)[0].micro_batches[0].origin

    assert next_step(Plan(4, 1, 2), 0) + next_step(Plan(4, 1, 2), 1) == next_step(Plan(8, 1, 1), 0)


def test_a_malformed_row_met_while_streaming_is_raised_where_the_step_is_asked_for(write_jsonl, stream):
    path = write_jsonl([{"text": "fine " * 400}, "{"])
    loader = StepLoader(stream({"path": path, "streaming": True}, length=64), Plan(1, 1, 1), 0)
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.jsonl:2: not valid JSON"):
            [next(loader) for _ in range(100)]
    loader.close()


def test_closing_ends_the_thread_and_the_iteration(rows):
    threads = threading.active_count()
    loader = StepLoader(rows(), Plan(2, 1, 1), 0)
    assert threading.active_count() == threads + 1
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == threads
    with pytest.raises(StopIteration):
        next(loader)
