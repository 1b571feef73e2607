"""Pages on the host give what attention over the whole text gives; the device holds what is read now and next."""

from __future__ import annotations

import pytest
import torch
from page_reading import (
    CLOSE,
    PATTERNS,
    STARTS,
    TOKENS,
    alone,
    attend_by,
    make_text,
    read,
    read_padded,
)
from sparsetrain_kernels import block_pattern_attention

from sparsetrain.generation.offloaded import OffloadedMemory
from sparsetrain.generation.page_table import most_pages_read, pages_read


@pytest.fixture(params=PATTERNS)
def pattern(request):
    return PATTERNS[request.param]


@pytest.fixture
def text():
    return make_text()


class Poisoned(OffloadedMemory):
    """After every call, NaN in each page of the device that the table does not name."""

    def attend(self, *args, **options):
        out = super().attend(*args, **options)
        dead = torch.ones(len(self.keys), dtype=torch.bool)
        dead[self.table[self.table >= 0].long()] = False
        for tensor in (self.keys, self.values):
            tensor[dead] = float("nan")
        return out


def offloaded(pattern, max_length=TOKENS):
    return Poisoned(pattern, attend_by(pattern), max_length=max_length)


@pytest.mark.parametrize("chunks", [[70] + [1] * 50, [50, 3, 1, 1, 17, 1, 2, 45], [1] * 120, [64, 4, 4, 48]], ids=str)
def test_any_chunks_equal_one_pass_with_dead_pages_poisoned(pattern, text, chunks) -> None:
    memory, at, out = offloaded(pattern, 130), 0, []
    for tokens in chunks:
        out.append(read(memory, text, at, at + tokens))
        at += tokens
    torch.testing.assert_close(torch.cat(out, 2), block_pattern_attention(*text, pattern), **CLOSE)


def test_rows_that_start_later_are_read_as_if_alone(pattern, text) -> None:
    want = alone(pattern, text)
    for chunks in ([60], [9, 30, 21]):
        got = read_padded(offloaded(pattern), text, chunks)
        for row, start in enumerate(STARTS):
            torch.testing.assert_close(got[row, None, :, start:], want[row], **CLOSE)


def test_any_number_of_tokens_is_taken_back(pattern, text) -> None:
    want, wrong = block_pattern_attention(*text, pattern), [tensor.flip(2) for tensor in text]
    memory, at = offloaded(pattern), 90
    read(memory, text, 0, at)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        if at > 100:
            back = int(torch.randint(1, at, (), generator=generator))
            memory.rollback(back)
            at -= back
        drafted = int(torch.randint(1, 19, (), generator=generator))
        right = int(torch.randint(1, drafted + 1, (), generator=generator))
        draft = [
            torch.cat([ours[:, :, at : at + right], other[:, :, at + right : at + drafted]], 2)
            for ours, other in zip(text, wrong, strict=True)
        ]
        out = memory.attend(None, *draft, starts=None)
        memory.rollback(drafted - right)
        torch.testing.assert_close(out[:, :, :right], want[:, :, at : at + right], **CLOSE)
        at += right
        assert memory.lengths.tolist() == [at, at]


def test_rows_are_repeated_and_reordered_and_another_text_follows(pattern, text) -> None:
    want = block_pattern_attention(*text, pattern)
    memory = offloaded(pattern)
    read(memory, text, 0, 50)
    for order in ([0, 1, 1], [2, 0, 2], [1, 0, 1]):
        memory.select_rows(torch.tensor(order))
    rows = [0, 1, 0]  # what those three make of [0, 1]
    for at in range(50, 80):
        out = memory.attend(None, *(tensor[rows, :, at : at + 1] for tensor in text), starts=None)
        torch.testing.assert_close(out, want[rows, :, at : at + 1], **CLOSE)
    memory.reset()
    assert not memory.started
    again = [read(memory, text, 0, 90), *(read(memory, text, at, at + 1) for at in range(90, TOKENS))]
    torch.testing.assert_close(torch.cat(again, 2), want, **CLOSE)


def test_the_device_holds_what_two_blocks_read_and_the_host_the_rest(pattern, text) -> None:
    memory = offloaded(pattern)
    read(memory, text, 0, 61)
    now, later = pages_read(pattern, 15), pages_read(pattern, 16)
    assert {page for page, slot in enumerate(memory.tables[0].slots) if slot >= 0} == now | later
    assert memory.slots == most_pages_read(pattern, 30) < 30
    page = 2 * 4 * 8 * 4  # of a row: two KV heads, four tokens, eight channels, fp32
    assert memory.nbytes() == 2 * (2 * memory.slots * page) + memory.table.nbytes + memory.lengths.nbytes
    assert memory.host_nbytes() == 2 * (2 * 16 * page)  # 15 whole blocks, and room for one more


def test_no_step_waits_for_a_page(pattern, text, monkeypatch) -> None:
    """All that a step reads has been brought before it, but for the first step behind a prompt."""
    memory, brought = offloaded(pattern), []
    read(memory, text, 0, 40)
    monkeypatch.setattr(memory, "_bring", lambda pages: brought.append(pages) or OffloadedMemory._bring(memory, pages))
    for at in range(40, TOKENS):
        brought.clear()
        read(memory, text, at, at + 1)
        assert len(brought) <= 1  # nothing awaited: only what the next block reads
        ahead = {page for pages in brought for _, page in pages}
        assert not ahead & pages_read(pattern, at // 4)
