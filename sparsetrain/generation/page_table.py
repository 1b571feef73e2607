"""The slot of each page of a text: computed on the host from the pattern alone, then constant.

Page ``b`` holds the keys and values of block ``b``. It needs a slot from its first token to the last query block that
reads it; then another page takes the slot. So a window needs a ring of slots, and where a maximum length (the horizon)
is known, a prompt keeps only the pages that a later token reads. Each page takes the lowest free slot, so the number of
slots is the largest number of pages needed at once.
"""

from __future__ import annotations

from functools import lru_cache
from heapq import heappop, heappush
from typing import NamedTuple

from sparsetrain.patterns import Pattern

NOT_KEPT = -1


class PageTable(NamedTuple):
    """The pages of one text."""

    slots: tuple[int, ...]
    """The slot of each page; :data:`NOT_KEPT` where no token after the prompt reads it."""
    needed: int
    """Slots that there must be."""

    def owned(self, pages: int) -> list[bool]:
        """For every page, whether its slot still holds it after the first ``pages`` pages have been written."""
        holders = {slot: page for page, slot in enumerate(self.slots[:pages]) if slot != NOT_KEPT}
        return [holders.get(slot) == page for page, slot in enumerate(self.slots)]


@lru_cache(maxsize=256)
def page_table(
    pattern: Pattern, pages: int, *, prompt: int = 0, horizon: int | None = None, slack: int = 0
) -> PageTable:
    """The slots of the first ``pages`` pages.

    Without a horizon, more pages leave the slots of the first ones as they are.

    Args:
        prompt: pages that the prompt fills. They are written at once, so those that only the prompt reads are not kept.
        horizon: pages that the text will have at most; None means that it has no end.
        slack: blocks for which a page keeps its slot after its last reader, so that as many can be taken back.
    """
    slots: list[int] = []
    free: list[int] = []
    dying: list[tuple[int, int]] = []
    count = 0
    for page in range(pages):
        if horizon is not None and page >= horizon:
            slots.append(NOT_KEPT)
            continue
        last = pattern.last_query_block(page, horizon)
        if last is not None and last + slack < prompt:
            slots.append(NOT_KEPT)
            continue
        while dying and dying[0][0] < max(page, prompt):
            heappush(free, heappop(dying)[1])
        if free:
            slot = heappop(free)
        else:
            slot, count = count, count + 1
        slots.append(slot)
        if last is not None:
            heappush(dying, (last + slack, slot))
    return PageTable(tuple(slots), count)


def still_read(pattern: Pattern, page: int, block: int, horizon: int | None) -> bool:
    """Whether a query in ``block`` or later reads a page."""
    last = pattern.last_query_block(page, horizon)
    return last is None or last >= block


@lru_cache(maxsize=2**14)
def pages_read(pattern: Pattern, block: int) -> frozenset[int]:
    """The pages that a query in ``block`` reads, with any head."""
    return frozenset(page for head in pattern.heads for page in pattern.key_blocks(block, head))


@lru_cache(maxsize=64)
def most_pages_read(pattern: Pattern, horizon: int) -> int:
    """The most pages that two neighbouring blocks of a text of ``horizon`` blocks read together."""
    most, before = 0, frozenset[int]()
    for block in range(horizon):
        read = pages_read(pattern, block)
        most, before = max(most, len(before | read)), read
    return most
