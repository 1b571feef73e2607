"""Heads that read different distances keep pages of their own: what each reads again, and no head more."""

from __future__ import annotations

import pytest
import torch
from page_reading import CLOSE, TOKENS, make_text, read
from sparsetrain_kernels import block_pattern_attention

from sparsetrain.errors import ModelError
from sparsetrain.generation.limits import Limits
from sparsetrain.generation.memories import kept_tokens, make_memory
from sparsetrain.generation.page_table import page_table
from sparsetrain.generation.pages_by_head import PagesByHead
from sparsetrain.methods.registry import parse_attention

POWER = parse_attention({"method": "power", "block": 4, "window": 2, "split": "heads", "farthest": 16})
METHOD = POWER.build(2)
"""Distances 2 and 8 for the first of two KV heads, 4 and 16 for the second."""


def make(**room):
    memory = make_memory(METHOD, None, **room)
    assert isinstance(memory, PagesByHead)
    return memory


@pytest.mark.parametrize("room", [{}, {"max_length": TOKENS}, {"max_length": TOKENS, "rollback": 0}], ids=str)
def test_each_head_keeps_a_ring_of_its_farthest_block_and_answers_as_all_keys_do(room) -> None:
    text = make_text()
    memory, want = make(**room), block_pattern_attention(*text, METHOD.pattern)
    got = torch.cat([read(memory, text, 0, 50), *(read(memory, text, at, at + 1) for at in range(50, TOKENS))], 2)
    torch.testing.assert_close(got, want, **CLOSE)
    near, far = (part.slots for part in memory.parts)
    slack = 0 if room.get("rollback") == 0 else 16
    assert far <= 16 + 1 + 1 + slack
    if slack == 0:
        assert near == page_table(METHOD.pattern.by_head[0], 30, prompt=12, horizon=30).needed < far
        assert kept_tokens(make(**room), 50, TOKENS) == 4 * (near + far) // 2


def test_heads_that_read_alike_share_their_pages() -> None:
    memory = make_memory(POWER.build(8), None)
    assert memory.heads == [2, 2, 2, 2]
    assert len(memory.parts) == 4


def test_tokens_taken_back_leave_no_trace_in_any_head_and_too_many_change_none() -> None:
    text = make_text()
    memory, want = make(rollback=8), block_pattern_attention(*text, METHOD.pattern)
    read(memory, text, 0, 90)
    memory.rollback(5)
    torch.testing.assert_close(read(memory, text, 85, 110), want[:, :, 85:110], **CLOSE)
    with pytest.raises(ModelError, match="cannot be taken back"):
        memory.rollback(70)
    assert [part.lengths.tolist() for part in memory.parts] == [[110, 110]] * 2
    torch.testing.assert_close(read(memory, text, 110, 111), want[:, :, 110:111], **CLOSE)


def test_a_budget_holds_for_every_head() -> None:
    with pytest.raises(ModelError, match=r"budget=60: behind a prompt of 80 tokens.*set budget to 64"):
        make(max_length=TOKENS, rollback=0, limits=Limits(budget=60)).check_prompts([80])
    make(max_length=TOKENS, rollback=0, limits=Limits(budget=64)).check_prompts([80])
