"""Pages give what attention over the whole text gives, and read and keep no more than their table says."""

from __future__ import annotations

import pytest
import torch
from page_reading import CLOSE, STARTS, TOKENS, alone, attend_by, make_text, read, read_padded
from page_reading import PATTERNS as OTHERS
from sparsetrain_kernels import block_pattern_attention, causal_attention

from sparsetrain.errors import ModelError
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.pages import PagedMemory
from sparsetrain.patterns import FullPattern, SlidingPattern

PATTERNS = {"full": FullPattern(4), "sliding": SlidingPattern(4, 2, 1), **OTHERS}


@pytest.fixture(params=PATTERNS)
def pattern(request):
    return PATTERNS[request.param]


@pytest.fixture
def text():
    return make_text()


def paged(pattern, **room):
    return PagedMemory(pattern, attend_by(pattern), **room)


def whole(pattern, text):
    return block_pattern_attention(*text, pattern)


def poison(memory):
    """NaN in every page that no row's table calls alive, and behind the last token of each."""
    alive = torch.zeros(memory.keys.shape[0], dtype=torch.bool)
    for row, table in enumerate(memory.tables):
        length = int(memory.lengths[row])
        owned = table.owned(-(-length // memory.pattern.block))[: -(-length // memory.pattern.block)]
        for page, kept in enumerate(owned):
            horizon = memory._horizon(row)
            last = memory.pattern.last_query_block(page, horizon)
            if kept and (last is None or last >= length // memory.pattern.block):
                alive[memory.table[row, page]] = True
    for tensor in (memory.keys, memory.values):
        tensor[~alive] = float("nan")
    return alive


@pytest.mark.parametrize(
    ("chunks", "room"),
    [
        ([1] * 120, {}),
        ([50, 3, 1, 1, 17, 1, 2, 45], {}),
        ([50, 3, 1, 1, 17, 1, 2, 45], {"max_length": TOKENS, "rollback": 0}),
        ([70] + [1] * 50, {"max_length": TOKENS}),
        ([70] + [1] * 50, {"max_length": TOKENS, "rollback": 0}),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else f"{len(given)} chunks",
)
def test_any_chunks_equal_one_pass_with_dead_pages_poisoned(pattern, text, chunks, room) -> None:
    memory, at, out = paged(pattern, **room), 0, []
    for tokens in chunks:
        out.append(read(memory, text, at, at + tokens))
        at += tokens
        poison(memory)
    torch.testing.assert_close(torch.cat(out, 2), whole(pattern, text), **CLOSE)


def test_rows_that_start_later_are_read_as_if_alone(pattern, text) -> None:
    want = alone(pattern, text)
    for chunks in ([60], [9, 30, 21]):
        got = read_padded(paged(pattern), text, chunks)
        for row, start in enumerate(STARTS):
            torch.testing.assert_close(got[row, None, :, start:], want[row], **CLOSE)
            assert (got[row, :, :start] == 0).all()


def test_each_page_that_is_kept_for_a_step_is_needed(pattern, text) -> None:
    """One more page evicted, and the rest of the text is no longer what it should be."""
    want = whole(pattern, text)
    memory = paged(pattern, max_length=100, rollback=0)
    read(memory, text, 0, 80)
    alive = poison(memory)
    for page in alive.nonzero()[:, 0].tolist():
        memory = paged(pattern, max_length=100, rollback=0)
        read(memory, text, 0, 80)
        poison(memory)
        # The page that is written next is not read before.
        if (memory.table[:, 20] == page).any():
            continue
        memory.values[page] += 1.0
        later = torch.cat([read(memory, text, at, at + 1) for at in range(80, 100)], 2)
        assert not torch.allclose(later, want[:, :, 80:100], **CLOSE)


@pytest.mark.parametrize("room", [{}, {"max_length": TOKENS}], ids=str)
def test_tokens_taken_back_leave_no_trace(pattern, text, room) -> None:
    want, wrong = whole(pattern, text), [tensor.flip(2) for tensor in text]
    memory, at = paged(pattern, **room), 41
    read(memory, text, 0, at)
    generator = torch.Generator().manual_seed(1)
    while at < 100:
        drafted, right = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
        right = min(right, drafted)
        draft = [
            torch.cat([ours[:, :, at : at + right], other[:, :, at + right : at + drafted]], 2)
            for ours, other in zip(text, wrong, strict=True)
        ]
        memory.begin_round()
        if drafted % 2:
            out = memory.attend(None, *draft, starts=None)
        else:  # as a draft model reads: token by token
            out = torch.cat(
                [memory.attend(None, *(t[:, :, i : i + 1] for t in draft), starts=None) for i in range(drafted)], 2
            )
        memory.rollback(drafted - right)
        torch.testing.assert_close(out[:, :, :right], want[:, :, at : at + right], **CLOSE)
        at += right
        assert memory.lengths.tolist() == [at, at]


def test_more_than_can_be_taken_back_is_refused(text) -> None:
    memory = paged(PATTERNS["sliding"], rollback=8)
    read(memory, text, 0, 100)
    memory.rollback(8)
    with pytest.raises(ModelError, match=r"30 tokens cannot be taken back.*at most 8"):
        memory.rollback(30)
    assert memory.lengths.tolist() == [92, 92]
    everything = paged(PATTERNS["power"], rollback=8)
    read(everything, text, 0, 100)
    everything.rollback(60)
    torch.testing.assert_close(read(everything, text, 40, 41), whole(PATTERNS["power"], text)[:, :, 40:41], **CLOSE)


def test_heads_of_an_odd_width(text) -> None:
    narrow = [tensor[..., :5] for tensor in text]
    memory = paged(PATTERNS["power"])
    out = [read(memory, narrow, 0, 70), *(read(memory, narrow, at, at + 1) for at in range(70, TOKENS))]
    torch.testing.assert_close(torch.cat(out, 2), whole(PATTERNS["power"], narrow), **CLOSE)


def test_rows_are_repeated_reordered_and_kept_in_place(pattern, text) -> None:
    want = whole(pattern, text)
    memory = paged(pattern, max_length=TOKENS)
    read(memory, text, 0, 50)
    memory.select_rows(torch.tensor([1, 0, 1]))
    held = [tensor.data_ptr() for tensor in (memory.keys, memory.values, memory.table, memory.lengths)]
    memory.select_rows(torch.tensor([2, 2, 1]))
    assert held == [tensor.data_ptr() for tensor in (memory.keys, memory.values, memory.table, memory.lengths)]
    out = memory.attend(None, *(tensor[[1, 1, 0], :, 50:51] for tensor in text), starts=None)
    torch.testing.assert_close(out, want[[1, 1, 0], :, 50:51], **CLOSE)


def test_a_reset_memory_reads_another_text_in_the_same_tensors(pattern, text) -> None:
    memory = paged(pattern, max_length=TOKENS)
    read(memory, [tensor.flip(0) for tensor in text], 0, 90)
    memory.keys.fill_(float("nan"))
    held = memory.keys.data_ptr()
    memory.reset()
    assert not memory.started
    out = [read(memory, text, 0, 90), *(read(memory, text, at, at + 1) for at in range(90, TOKENS))]
    torch.testing.assert_close(torch.cat(out, 2), whole(pattern, text), **CLOSE)
    assert memory.keys.data_ptr() == held


def test_a_horizon_is_not_passed(text) -> None:
    memory = paged(PATTERNS["power"], max_length=60)
    read(memory, text, 0, 58)
    for at in (58, 59):
        read(memory, text, at, at + 1)
    with pytest.raises(ModelError, match=r"grows to 61 tokens.*max_length=60.*larger max_length"):
        read(memory, text, 60, 61)
    with pytest.raises(ModelError, match="grows to 80 tokens"):
        read(memory, text, 60, 80)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 17, 70])
def test_layers_that_keep_their_window_keep_that_much(window, text) -> None:
    memory, want = make_memory(None, window), causal_attention(*text, window=window)
    out = [
        read(memory, text, 0, 20),
        *(read(memory, text, at, at + 1) for at in range(20, 90)),
        read(memory, text, 90, 120),
    ]
    torch.testing.assert_close(torch.cat(out, 2), want, **CLOSE)
    if window == 7:
        assert memory.slots <= 7
