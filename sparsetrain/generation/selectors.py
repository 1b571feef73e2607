"""How a step finds its candidates: all keys, or those that a cheaper look at them promises the largest logits.

What a selector looks at is kept beside the pages of a memory, by page, so that it grows and moves with them. Candidates
are lists of positions in the cache; keys are never copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparsetrain_kernels import append_codes, estimate_scores, page_scores, top_k_lists
from sparsetrain_kernels.key_mirror import KeyMirror, PageBounds
from torch import Tensor

from sparsetrain.errors import ModelError
from sparsetrain.generation.candidates import GRANULE, AllPages, Always, Candidates, Pages, Tokens
from sparsetrain.generation.settings import Decode


class Places(NamedTuple):
    """Where the keys of each row are, and what is kept beside them."""

    lengths: Tensor
    """int32 ``[B]``: tokens of each row."""
    block_table: Tensor
    """int32 ``[B, pages]``: the page of each block of a row."""
    max_length: int
    """Tokens that a row's pages have room for."""
    beside: dict[str, Tensor]
    """Further tensors by page."""
    prompt: int
    """Tokens of the longest prompt."""
    due: Tensor | None = None
    """bool ``[B]``: the rows that are asked for; None for all."""

    @property
    def arguments(self) -> dict[str, Any]:
        """As operations take them."""
        places = {"lengths": self.lengths, "block_table": self.block_table, "max_length": self.max_length}
        return {**places, "due": self.due}


class Selector:
    """How the candidates of a step are found: all keys, unless a subclass knows better.

    Args:
        decode: the section.
    """

    centred = False
    """It wants to know the mean and the spread of the prompt's keys (:meth:`keep_moments`)."""
    shared = False
    """What it keeps beside the pages is of several keys together, and so changes with each of them."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    def make_beside(self, key: Tensor, pages: int, block: int) -> dict[str, Tensor]:
        """What is kept beside ``pages`` pages of ``block`` keys like ``[B, Hkv, N, D]``."""
        return {}

    def keep_moments(self, center: Tensor, spread: Tensor) -> None:
        """Take the mean and the spread of the keys of each row, fp32 ``[B, Hkv, D]``, before they are written."""

    def written(self, beside: dict[str, Tensor]) -> dict[str, Any]:
        """What :func:`~sparsetrain_kernels.append_tokens` writes beside the keys, as its arguments, of ``beside`` by
        page, ``[pages, ...]``."""
        return {}

    def append(self, key: Tensor, places: Places) -> None:
        """Write what else is kept of the newest keys, ``[B, Hkv, N, D]``."""

    def held(self) -> list[Tensor]:
        """Tensors of its own, ``[B, ...]``."""
        return []

    def always(self, places: Places) -> Always:
        """What a step reads in any case."""
        return Always(places.lengths, self._decode.sinks, self._decode.recent)

    def visible(self, places: Places) -> Tensor:
        """How many keys the layer attends to where none is left out, int32 ``[B, Hkv]`` or ``[B, 1]``."""
        return places.lengths[:, None]

    def candidates(self, query: Tensor, places: Places, **factors: Any) -> Candidates:
        """Of a step with ``query [B, Hq, 1, D]`` and the factors ``scale`` and ``softcap`` of its logits."""
        return Candidates()


class QuestPages(Selector):
    """Pages of 16 tokens by the minima and maxima of their keys (Quest, 2406.10774)."""

    shared = True

    def make_beside(self, key: Tensor, pages: int, block: int) -> dict[str, Tensor]:
        """See :meth:`Selector.make_beside`."""
        return {"bounds": key.new_zeros(pages, key.shape[1], block // GRANULE, 2, key.shape[3])}

    def written(self, beside: dict[str, Tensor]) -> dict[str, Any]:
        """See :meth:`Selector.written`."""
        return {"bounds": PageBounds(beside["bounds"])}

    def candidates(self, query: Tensor, places: Places, **factors: Any) -> Candidates:
        """See :meth:`Selector.candidates`."""
        pages, heads = -(-places.max_length // GRANULE), places.beside["bounds"].shape[1]
        wanted = min(-(-self._decode.candidate_tokens(places.prompt) // GRANULE), pages)
        if wanted == pages:
            return AllPages(places.lengths, heads, pages)
        values = PageBounds(places.beside["bounds"])
        bounds = page_scores(query, values, scale=factors.get("scale"), dtype=torch.float16, **places.arguments)
        # A row has no more pages than tokens, and where there is none the bound is -inf.
        best = top_k_lists(bounds, None, wanted, lengths=places.lengths, num_kv_heads=heads, width=1, due=places.due)
        return Pages(best.lists, best.counts)


class HeavyChannels(Selector):
    """Tokens by the logits that few channels of their keys make (Double Sparsity, 2408.07092).

    These channels of each key are its label, which is kept in 4 bits. They are the ones that a calibration found, or
    those of each row and KV head whose keys differ most in the prompt: what all keys share changes no softmax.

    Args:
        decode: the section.
        index: of the layer.
    """

    centred = True

    def __init__(self, decode: Decode, index: int) -> None:
        super().__init__(decode)
        self._index = index
        self._channels: Tensor | None = None
        """int64 ``[B, Hkv, channels]``, ascending."""
        self._center: Tensor | None = None
        self._spread: Tensor | None = None

    def make_beside(self, key: Tensor, pages: int, block: int) -> dict[str, Tensor]:
        """See :meth:`Selector.make_beside`."""
        _, heads, _, width = key.shape
        wanted = self._decode.channels
        if wanted > width:
            raise ModelError(f"decode.channels={wanted}: the keys of layer {self._index} have {width}; lower it")
        codes = torch.zeros(pages, heads, block, wanted // 2, dtype=torch.uint8, device=key.device)
        scale_low = torch.zeros(pages, heads, block, 2, dtype=torch.float16, device=key.device)
        return {"label_codes": codes, "label_scale_low": scale_low}

    def keep_moments(self, center: Tensor, spread: Tensor) -> None:
        """See :meth:`Selector.keep_moments`."""
        channels = self._heavy(spread)
        found = (channels, center.gather(2, channels), spread.gather(2, channels))
        held = self.held()
        if held and held[0].shape == channels.shape:
            for old, new in zip(held, found, strict=True):
                old.copy_(new)
        else:
            self._channels, self._center, self._spread = found

    def append(self, key: Tensor, places: Places) -> None:
        """See :meth:`Selector.append`."""
        append_codes(self._labels(key), self._mirror(places), lengths=places.lengths, block_table=places.block_table)

    def held(self) -> list[Tensor]:
        """See :meth:`Selector.held`."""
        return [each for each in (self._channels, self._center, self._spread) if each is not None]

    def candidates(self, query: Tensor, places: Places, **factors: Any) -> Candidates:
        """See :meth:`Selector.candidates`."""
        channels, mirror = self._of_rows(), self._mirror(places)
        heads, width = channels.shape[1], query.shape[3]
        grouped = query.unflatten(1, (heads, -1))[:, :, :, 0]
        label = grouped.gather(3, channels[:, :, None].expand(-1, -1, grouped.shape[2], -1)).flatten(1, 2)[:, :, None]
        scale = factors.get("scale")
        # Of the whole keys: a label has fewer channels.
        scores, lse = estimate_scores(label, mirror, scale=width**-0.5 if scale is None else scale, **places.arguments)
        always = self.always(places)
        wanted = min(self._decode.candidate_tokens(places.prompt), places.max_length)
        found = top_k_lists(scores, lse, wanted, num_kv_heads=heads, width=1, due=places.due, **always._asdict())
        return Tokens(found.lists, found.counts, always)

    def _heavy(self, spread: Tensor) -> Tensor:
        """The channels of labels, int64 ``[B, Hkv, channels]``, ascending."""
        known, (_, heads, width) = self._decode.heavy_channels, spread.shape
        if known is None:
            return spread.topk(self._decode.channels).indices.sort().values
        own = known[self._index]
        if len(own) != heads or max(map(max, own)) >= width:
            raise ModelError(
                f"decode.heavy_channels names {len(own)} KV heads in layer {self._index}, and channels up to "
                f"{max(map(max, own))}: this layer has {heads} KV heads of {width} channels; calibrate on this model"
            )
        return torch.tensor(own, device=spread.device).expand(len(spread), -1, -1).contiguous()

    def _labels(self, key: Tensor) -> Tensor:
        """``[B, Hkv, N, channels]`` of keys ``[B, Hkv, N, D]``."""
        return key.gather(3, self._of_rows()[:, :, None].expand(-1, -1, key.shape[2], -1))

    def _mirror(self, places: Places) -> KeyMirror:
        """The labels."""
        assert self._center is not None
        assert self._spread is not None
        beside = places.beside
        return KeyMirror(beside["label_codes"], beside["label_scale_low"], self._center, self._spread)

    def _of_rows(self) -> Tensor:
        assert self._channels is not None
        return self._channels
