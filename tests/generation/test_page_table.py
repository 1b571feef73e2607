"""Page tables keep what is read again and no more, in as few slots as can be."""

from __future__ import annotations

import pytest

from sparsetrain.generation.page_table import NOT_KEPT, most_pages_read, page_table
from sparsetrain.methods.registry import parse_attention
from sparsetrain.methods.ruler import RulerPattern
from sparsetrain.patterns import (
    DilatedPattern,
    DistancePattern,
    FullPattern,
    HeadDistancePattern,
    LongNetPattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)

PATTERNS = {
    "full": FullPattern(256),
    "power": PowerPattern(256, 5, 1),
    "sliding": SlidingPattern(256, 9, 1),
    "stride": StridePattern(256, 5, 1, 64),
    "dilated": DilatedPattern(256, 12, 8),
    "longnet": LongNetPattern(256),
    "distances": DistancePattern(256, (0, 3, 7), 2),
    "heads": HeadDistancePattern(256, ((0, 3), (0, 1, 9)), 0),
    "ruler": RulerPattern(256, 5, 1, 2, 9),
}


@pytest.mark.parametrize(
    ("prompt", "generated", "slots"),
    [
        (128, 4, {"full": 132, "power": 25, "sliding": 10, "stride": 13, "dilated": 45, "longnet": 4}),
        (512, 4, {"full": 516, "power": 33, "sliding": 10, "stride": 37, "dilated": 45, "longnet": 4}),
        (512, 16, {"full": 528, "power": 97, "sliding": 10, "stride": 133, "dilated": 89, "longnet": 11}),
        (0, 512, {"full": 512, "power": 258, "sliding": 10, "stride": 449, "dilated": 89, "longnet": 19}),
    ],
)
def test_the_slots_of_a_known_horizon(prompt: int, generated: int, slots: dict[str, int]) -> None:
    pages = prompt + generated
    found = {name: page_table(PATTERNS[name], pages, prompt=prompt, horizon=pages).needed for name in slots}
    assert found == slots


def test_pages_of_two_neighbouring_blocks() -> None:
    def found(name: str) -> list[int]:
        return [most_pages_read(PATTERNS[name], horizon) for horizon in (128, 512, 4096)]

    assert found("power") == [15, 19, 25]
    assert found("stride") == [9, 21, 133]
    assert found("dilated") == [24, 24, 24]
    assert found("longnet") == [19, 19, 19]
    assert most_pages_read(PATTERNS["full"], 512) == 512


@pytest.mark.parametrize(
    ("section", "endless", "behind_a_prompt"),
    [
        ({"method": "power", "base": 4}, [2000], [45]),
        ({"method": "power", "split": "layers", "farthest": 256}, [10, 18, 34, 66, 130, 258], [10] * 6),
        ({"method": "power", "split": "heads", "farthest": 256}, [10, 10, 18, 34, 66, 66, 130, 258], [10] * 8),
        ({"method": "ruler"}, [12], [12]),
    ],
)
def test_the_variants_of_power_keep_what_the_documentation_says(section, endless, behind_a_prompt) -> None:
    pattern = parse_attention(section).pattern(8)
    kept = [part for layer in pattern.by_layer for part in (layer.by_head or (layer,))]
    assert [page_table(part, 2000).needed for part in kept] == endless
    assert [page_table(part, 516, prompt=512, horizon=516).needed for part in kept] == behind_a_prompt


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize(("prompt", "horizon"), [(0, 60), (37, 60), (0, None)])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_page_lies_in_its_slot_whenever_it_is_read(pattern, prompt: int, horizon: int | None, slack: int) -> None:
    pages = 60
    table = page_table(pattern, pages, prompt=prompt, horizon=horizon, slack=slack)
    most = 0
    for block in range(prompt, pages):
        owned, read = table.owned(block + 1), set()
        # With slack the text may be taken back to an earlier block and go on from there.
        for query_block in range(max(block - slack, prompt), block + 1):
            for head in pattern.heads:
                listed = pattern.key_blocks(query_block, head)
                assert all(owned[page] for page in listed)
                read |= set(listed)
        most = max(most, len({slot for slot in table.slots[: block + 1] if slot != NOT_KEPT}))
    assert table.needed == most
    assert {slot for slot in table.slots if slot != NOT_KEPT} == set(range(table.needed))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_without_a_horizon_more_pages_change_nothing_before_them(pattern) -> None:
    assert page_table(pattern, 90).slots[:40] == page_table(pattern, 40).slots


def test_windows_are_rings_and_far_readers_keep_all() -> None:
    counts = {name: page_table(pattern, 1000).needed for name, pattern in PATTERNS.items()}
    assert counts["sliding"] == 10
    assert counts["dilated"] == 89
    assert counts["longnet"] == 19
    assert counts["distances"] == 10
    assert counts["heads"] == 10
    assert counts["full"] == counts["power"] == counts["stride"] == 1000


def test_the_last_reader_is_the_last_of_the_transposed_list() -> None:
    for pattern in PATTERNS.values():
        for key_block in range(50):
            want = max(pattern.query_blocks(key_block, 50, head)[-1] for head in pattern.heads)
            assert pattern.last_query_block(key_block, 50) == want
            endless = pattern.last_query_block(key_block, None)
            far = max(pattern.query_blocks(key_block, 2000, head)[-1] for head in pattern.heads)
            assert endless == far or (endless is None and far > 900)
