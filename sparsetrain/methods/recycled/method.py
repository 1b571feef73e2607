"""Recycled attention (2411.05787, section 6): rows read the keys that an earlier row has chosen, and those since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Unpack

from pydantic import Field, model_validator

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Expected, Method, MethodConfig, PassDocuments
from sparsetrain.methods.costs import AttentionCosts, LayerShape
from sparsetrain.methods.recycled.costs import layer_costs, share_of_pairs
from sparsetrain.methods.recycled.rules import Rules
from sparsetrain.section import MOST_LISTED, Tokens, TokensOrNone

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from torch import nn

    from sparsetrain.methods.recycled.segments import Segments


class RecycledConfig(MethodConfig):
    """Every few tokens one token attends to all earlier ones and chooses the keys of the highest weight. The tokens up
    to the next choice read these keys, those since the choice, a window before it and the sinks.

    The tokens of a prompt attend fully, and the last of them makes the first choice. So a pass of training computes
    what generation does step by step (RefreshKV), each token by the same keys.
    """

    method: Literal["recycled"] = "recycled"
    """Recycled attention."""
    every: Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)] = 16
    """Tokens between two choices. Of a list such as [8, 16, 32, 64], each document draws one in each step, by
    ``train.seed``, the step and its name."""
    generate_every: Tokens | None = None
    """Tokens between two choices in generation and evaluation, where nothing is drawn; null: ``every``, of a list its
    lower median."""
    similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Choose again only where the cosine similarity of the layer's mean query to that of the last choice has fallen to
    this or below; null chooses every time."""
    keep: Tokens = 1024
    """Keys of a choice, at most: those of the largest weight, of all query heads of a KV head and of 7 neighbouring
    positions (2411.05787, section 3)."""
    p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep only as many of them as hold this share of the softmax weight of each query head; null keeps ``keep``."""
    sinks: TokensOrNone = 4
    """First tokens of a document, which every token reads. They do not compete in a choice."""
    recent: TokensOrNone = 64
    """Last tokens at a choice, the one that chooses among them, which are read until the next. They do not compete."""
    text_prefix: Literal["none", "uniform"] = "none"
    """The prompt of plain text, which has none of its own: ``none``, the first token makes the first choice;
    ``uniform`` draws its length in each step. In chats and in prompts with completions, the prompt is all that stands
    before the first target token."""

    @model_validator(mode="after")
    def _without_contradictions(self) -> RecycledConfig:
        if isinstance(self.every, list) and len(set(self.every)) < len(self.every):
            twice = next(each for each in self.every if self.every.count(each) > 1)
            raise ValueError(f"every={self.every} lists {twice} twice; each length is drawn alike, so list it once")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of segments in training, ascending."""
        return tuple(sorted(self.every)) if isinstance(self.every, list) else (self.every,)

    @property
    def fixed(self) -> int:
        """The length of segments where nothing is drawn."""
        lengths = self.lengths
        return self.generate_every or lengths[(len(lengths) - 1) // 2]

    def pattern(self, num_kv_heads: int = 1) -> None:
        """None: the choice depends on the text."""
        return None

    def build(self, num_kv_heads: int = 1) -> RecycledMethod:
        """The method object for this config."""
        return RecycledMethod(self)

    def costs(self, shape: LayerShape) -> AttentionCosts:
        """The costs of the rows that attend fully, of choices, and of attention over them."""
        return layer_costs(shape, lengths=self.lengths, keep=self.keep)

    def decode_section(self) -> Mapping[str, Any]:
        """RefreshKV as the rows of training have it."""
        refresh = {
            "every": self.fixed,
            "similarity": self.similarity,
            "keep": self.keep,
            "staggered": False,
            "choose": "full",
        }
        prune = None if self.p is None else {"p": self.p, "group": "union", "min_keys": 1}
        return {"refresh": refresh, "prune": prune, "sinks": self.sinks, "recent": self.recent}

    def heads_fault(self, num_kv_heads: int, parallel: int) -> str | None:
        """See :meth:`MethodConfig.heads_fault`."""
        if self.similarity is None:
            if parallel <= num_kv_heads:
                return None
            return (
                f"attention.method=recycled chooses keys by all query heads of a key/value head, of which there are "
                f"{num_kv_heads}, and more ranks than that divide them; set it to {num_kv_heads} or less"
            )
        return (
            f"attention.similarity={self.similarity:g} compares the mean query of all heads of a layer, which no rank "
            "has; set it to 1, or attention.similarity: null"
        )


class RecycledMethod(Method):
    """Attends fully in some rows, and in the others to the keys that one of those has chosen."""

    pass_input = "segments"
    decodes_all = True
    selection_operations: ClassVar[frozenset[str]] = frozenset(
        {"sparsetrain::key_choice", "sparsetrain::recycled_gate"}
    )

    def __init__(self, config: RecycledConfig) -> None:
        self.config = config
        self.rules = Rules(**{name: getattr(config, name) for name in Rules._fields})
        self._seen: list[dict[str, torch.Tensor]] = []

    def density(self, length: int) -> float:
        """The fraction of the causal pairs of ``length`` tokens of text that is attended, averaged over the lengths of
        segments."""
        config = self.config
        reused = config.keep + config.sinks + config.recent
        return sum(share_of_pairs(length, every, reused) for every in config.lengths) / len(config.lengths)

    def plan_pass(self, documents: PassDocuments) -> Segments:
        """The segments of a row of training or evaluation, on the CPU."""
        from sparsetrain.methods.recycled.segments import drawn_segments

        config = self.config
        return drawn_segments(documents, config.lengths, text_prefix=config.text_prefix, fixed=config.fixed)

    def attach(self, layer: nn.Module, layer_index: int) -> None:
        """Check that the layer's attention has no part that the method does not support.

        Raises:
            ModelError: It has.
        """
        from sparsetrain.methods.recycled.layer import check_layer

        check_layer(layer, layer_index)

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        segments: Segments | None = None,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.attend`; ``query`` ``[B, Hq, N, D]``; ``key``, ``value`` ``[B, Hkv, N, D]``.

        Args:
            segments: Of a row with ``cu_seqlens``; None: documents without prompts, and the fixed length.
        """
        import torch

        from sparsetrain.methods.recycled.layer import check_options
        from sparsetrain.methods.recycled.rows import attend_rows

        check_options(options)
        if key.shape[2] != query.shape[2]:
            raise ModelError(
                f"recycled attention got a cache of {key.shape[2]} keys for {query.shape[2]} queries, but no choice of "
                "an earlier token; let the model create its own cache, or pass an empty transformers.DynamicCache()"
            )
        rows = [
            attend_rows(self.rules, *each, self._segments(segments, query, options), options, self._observer(layer))
            for each in zip(query.split(1), key.split(1), value.split(1), strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def keys_read(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rows: torch.Tensor,
        segments: Segments | None = None,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.keys_read`, bool ``[Hkv, R, N]``: all keys, or the last choice and those since."""
        from sparsetrain.methods.recycled.rows import keys_of_rows

        return keys_of_rows(self.rules, query, key, value, rows, self._segments(segments, query, options), options)

    def expected(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        document: slice,
        segments: Segments | None = None,
        **options: Unpack[AttentionOptions],
    ) -> Expected:
        """See :meth:`Method.expected`: at some positions of the document.

        ``query`` ``[1, Hq, N, D]``; ``key``, ``value`` ``[1, Hkv, N, D]``; fp64 output ``[1, Hq, R, D]``.
        """
        from sparsetrain.methods.recycled.oracle import expected_rows

        found = self._segments(segments, query, options)
        return expected_rows(self.rules, query, key, value, document, found, options)

    def observations(self) -> dict[str, float]:
        """The share of the softmax weight of all keys that the keys read by a token hold, in sampled tokens: for each
        layer, and for each age of the choice (tokens since it) in steps of powers of two."""
        from sparsetrain.methods.recycled.telemetry import means

        seen, self._seen = self._seen, []
        return means(seen)

    def _observer(self, layer: Any) -> Any:
        if not self.observing:
            return None
        from sparsetrain.methods.recycled.telemetry import observer

        return observer(self._seen, layer.layer_idx, max(*self.config.lengths, self.config.fixed))

    def _segments(self, given: Segments | None, query: torch.Tensor, options: Mapping[str, Any]) -> Segments:
        from sparsetrain.methods.recycled.segments import make_segments, plain_segments

        if given is None:
            cu_seqlens, every = options.get("cu_seqlens"), self.config.fixed
            if cu_seqlens is None:
                given = make_segments([0, query.shape[2]], [0], [every])
            else:
                given = plain_segments(cu_seqlens, every)
        return given.to(query.device)
