"""The candidates of a block pattern: the blocks that it lists for the newest token, of each KV head its own."""

from __future__ import annotations

from typing import Any

import torch
from sparsetrain_kernels.block_pattern.pattern import UNBOUNDED, BlockLists, block_lists
from torch import Tensor

from sparsetrain.generation.candidates import GRANULE, Always, Candidates, Pages
from sparsetrain.generation.selectors import Places, Selector
from sparsetrain.generation.settings import Decode
from sparsetrain.patterns import Pattern


class OwnBlocks(Selector):
    """The blocks of a pattern, as pages of 16 tokens.

    The lists of a step are worked out where the lengths are, without reading them on the host. Blocks whose page has
    gone are listed by no later token (``page_table.py``), so no other token is met in their place.

    Args:
        decode: the section.
        pattern: of blocks of a multiple of 16 tokens.
    """

    def __init__(self, decode: Decode, pattern: Pattern) -> None:
        super().__init__(decode)
        self._pattern = pattern
        self._lists: BlockLists | None = None
        self._blocks = 0  # that the far distances are listed for
        self._kv_heads = 0
        self._far: Tensor | None = None
        """int32 ``[heads, period, far blocks]``: distances, the farthest first."""

    def make_beside(self, key: Tensor, pages: int, block: int) -> dict[str, Tensor]:
        """See :meth:`Selector.make_beside`."""
        self._blocks = 0
        return {}

    def append(self, key: Tensor, places: Places) -> None:
        """See :meth:`Selector.append`."""
        blocks = places.block_table.shape[1]
        if blocks <= self._blocks:
            return
        # As many as a growing table will have for a while.
        self._blocks, self._kv_heads = 2 * blocks, key.shape[1]
        lists = block_lists(self._pattern, self._blocks, key.shape[1])
        far = torch.tensor(lists.far, dtype=torch.int32).view(lists.heads, lists.period, lists.width)
        reached = int((far < self._blocks).sum(-1).max())
        self._lists, self._far = lists, far[:, :, :reached].flip(-1).to(key.device)

    def always(self, places: Places) -> Always:
        """See :meth:`Selector.always`: of the first and last tokens those that every head's pattern has."""
        block, lists = self._pattern.block, self._known()
        in_own = (places.lengths - 1).clamp_min(0) % block + 1
        near = in_own + block * (min(lists.window, places.block_table.shape[1]) - 1)
        sinks = min(self._decode.sinks, lists.num_sinks * block)
        return Always(places.lengths, sinks, near.clamp_max(self._decode.recent))

    def visible(self, places: Places) -> Tensor:
        """See :meth:`Selector.visible`."""
        block = self._pattern.block
        _, counts = self._listed(places)
        return counts * block - (block - 1 - (places.lengths - 1) % block)[:, None]

    def candidates(self, query: Tensor, places: Places, **factors: Any) -> Candidates:
        """See :meth:`Selector.candidates`."""
        blocks, counts = self._listed(places)
        each = self._pattern.block // GRANULE
        within = torch.arange(each, dtype=torch.int32, device=blocks.device)
        pages = (blocks[..., None] * each + within).flatten(2)
        return Pages(pages, counts * each)

    def _listed(self, places: Places) -> tuple[Tensor, Tensor]:
        """The blocks of each KV head, ascending, int32 ``[B, Hkv, blocks]``, and how many they are."""
        lists, far, table = self._known(), self._far, places.block_table
        assert far is not None
        blocks, device = table.shape[1], table.device
        own = ((places.lengths - 1).clamp_min(0) // self._pattern.block)[:, None, None]
        first = torch.arange(lists.num_sinks, dtype=torch.int32, device=device).expand(len(own), 1, -1)
        first = torch.where(first <= own, first, UNBOUNDED)
        window = torch.arange(1 - min(lists.window, blocks), 1, dtype=torch.int32, device=device)
        distant = own - far[:, own[:, 0, 0] % lists.period].transpose(0, 1)
        behind = torch.cat([distant, (own + window).expand(-1, distant.shape[1], -1)], dim=2)
        behind = torch.where(behind >= lists.num_sinks, behind, UNBOUNDED)
        found = torch.cat([first.expand(-1, distant.shape[1], -1), behind], dim=2).sort().values
        counts = (found < UNBOUNDED).sum(-1, dtype=torch.int32)
        found = found.clamp_max(blocks).int()
        return found.expand(-1, self._kv_heads, -1).contiguous(), counts.expand(-1, self._kv_heads).contiguous()

    def _known(self) -> BlockLists:
        assert self._lists is not None
        return self._lists
