"""SparseK attention (2406.16747): every key competes once, by a score of its own, for a fixed number of places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Unpack

from pydantic import Field, model_validator

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Method, MethodConfig
from sparsetrain.section import MOST_STEPS, Bounds, Tokens, TokensOrNone

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from sparsetrain_kernels.sparsek import CausalSelection, Moments, Places
    from torch import nn

    from sparsetrain.methods.sparsek_state import SparseKState


STATISTICS = {"support": "support_size", "interior": "interior_size", "saturated": "saturated_share"}
"""What the statistics of a selection are called in a run's metrics, where it is not their own name."""


class SparseKConfig(MethodConfig):
    """Each token reads the sinks, its window, and the ``topk`` earlier tokens with the largest scores.

    A score depends on its own token and what came before it, never on the query, so a token that has lost its place
    never comes back: generation needs ``sinks + topk + window`` keys however long the text (2406.16747, 3).
    """

    new_modules: ClassVar[tuple[str, ...]] = ("sparsek_scorer",)

    method: Literal["sparsek"] = "sparsek"
    """SparseK."""
    topk: Tokens = 1024
    """Earlier tokens that each token reads besides its window and the sinks: those with the largest scores."""
    window: Tokens = 1024
    """Tokens in the local window, the query's own included. A token starts to compete when it leaves the window."""
    sinks: TokensOrNone = 4
    """Tokens at the start of each document that every query reads; they do not compete."""
    gate: Literal["value", "log", "straight"] = "value"
    """How the soft selection ``p = clip(score - threshold, 0, 1)`` reaches the output: ``value`` multiplies the values
    by it (the paper), ``log`` adds its logarithm to the logits, ``straight`` selects hard and only takes its
    gradient."""
    scores: Literal["head", "layer"] = "head"
    """One score and one selection for each key/value head, or one for the whole layer."""
    scorer: Literal["learned", "frozen", "detached", "random"] = "learned"
    """Where scores come from: a linear network that is trained; the same network left as it was initialised, while what
    it reads still learns from the selection (``frozen``) or does not (``detached``); or a hash of the position without
    any network (``random``). The last three are the controls a trained scorer has to beat."""
    normalize: bool = True
    """Normalise scores by the mean and variance of all scores so far in the document (timestep normalisation), with a
    learned gain: thresholds then mean the same at every length."""
    slope: Annotated[float, Field(ge=0), Bounds(1e6, "scores are fp32")] = 1e-4
    """Added to the score for every position: newer tokens win over older ones. With ``normalize`` its unit is one
    standard deviation of the scores: at 1e-4 a token must stand out by one more to live 10,000 tokens longer."""
    init: Literal["normal", "zeros", "attention"] | None = None
    """How the network starts: ``normal`` (also null) at random; ``zeros`` leaves the selection to ``slope``, a longer
    window at first; ``attention`` is fitted, in closed form and on text, to the attention that keys receive from behind
    their window: a run does so on its first rows, elsewhere ``sparsetrain.modeling.calibrate_scorers`` does."""
    topk_start: Tokens | None = None
    """Start training with this many places and shrink to ``topk`` over ``topk_steps``; null = ``topk`` throughout."""
    topk_steps: Annotated[float, Field(gt=0), Bounds(MOST_STEPS, "no run has more steps")] | None = None
    """Length of that warm-up: a number of steps if 1 or more, a share of all steps if below 1."""
    score_buffer: Tokens | None = None
    """Scores that generation remembers for each head, to place the threshold: tokens that lost their place still count
    there. null = ``4 * topk``."""

    @model_validator(mode="after")
    def _without_contradictions(self) -> SparseKConfig:
        if self.scorer == "random":
            if self.init is not None:
                raise ValueError(f"init={self.init} is for a network, but scorer=random has none; leave init out")
            if not self.normalize:
                raise ValueError("normalize=false is for a network, but scorer=random has none; leave normalize out")
        elif self.init == "zeros" and (self.slope == 0 or self.scorer != "learned"):
            raise ValueError(
                f"init=zeros with slope={self.slope:g} and scorer={self.scorer}: every token would have the same score "
                "and none would be selected for a reason; use init=normal or attention"
            )
        if (self.topk_start is None) != (self.topk_steps is None):
            raise ValueError("topk_start and topk_steps belong together; give both or neither")
        if self.topk_start is not None and self.topk_start <= self.topk:
            raise ValueError(
                f"topk_start={self.topk_start} must be above topk={self.topk}: the warm-up shrinks the selection"
            )
        if self.topk_steps is not None and self.topk_steps >= 1 and self.topk_steps != int(self.topk_steps):
            raise ValueError(
                f"topk_steps={self.topk_steps}: 1 or more counts steps and must be whole; below 1 is a share"
            )
        if self.score_buffer is not None and self.score_buffer <= self.topk:
            raise ValueError(
                f"score_buffer={self.score_buffer} must be above topk={self.topk}: the threshold lies below the last "
                "selected score"
            )
        return self

    def pattern(self, num_kv_heads: int = 1) -> None:
        """None: the selection is learned."""
        return None

    def build(self, num_kv_heads: int = 1) -> SparseKMethod:
        """The method with this selection."""
        return SparseKMethod(self, num_kv_heads)


class SparseKMethod(Method):
    """Attends to the sinks, the window and the selected tokens."""

    extra_inputs = frozenset({"sparsek_scores", "sparsek_gain"})
    selection_operations = frozenset({"sparsetrain::causal_sparsek"})

    def __init__(self, config: SparseKConfig, num_kv_heads: int) -> None:
        self.config = config
        self.score_heads = num_kv_heads if config.scores == "head" else 1
        self.training_topk = config.topk
        """``topk`` of the step in training; evaluation and generation always use the config's."""
        self._seen: dict[int, list[dict[str, torch.Tensor]]] = {}
        self._exits: dict[int, torch.Tensor] = {}

    def begin_step(self, step: int, steps: int) -> None:
        """Shrink the selection from ``topk_start`` to ``topk``, linearly over ``topk_steps``."""
        start, end, length = self.config.topk_start, self.config.topk, self.config.topk_steps
        if start is None or length is None:
            return
        warmup = length if length >= 1 else length * steps
        self.training_topk = round(start + (end - start) * min(1.0, step / warmup))

    def density(self, length: int) -> float:
        """Share of the causal pairs of ``length`` tokens that are attended: the token at position i reads
        ``min(i + 1, sinks + topk + window)``."""
        keys = self.config.sinks + self.config.topk + self.config.window
        growing = min(length, keys)
        pairs = growing * (growing + 1) // 2 + (length - growing) * keys
        return pairs / (length * (length + 1) // 2)

    def attach(self, layer: nn.Module, layer_index: int) -> None:
        """Add the scorer to a layer, and a forward pre-hook that scores the layer's input.

        Raises:
            ModelError: the layer's attention has a part that SparseK does not compute, or its weights are elsewhere.
        """
        from sparsetrain.methods.sparsek_layer import attach_scorer

        attach_scorer(layer, layer_index, self.config, self.score_heads)

    def detach(self, layer: nn.Module) -> None:
        """Set the scorer aside and remove the hook."""
        from sparsetrain.methods.sparsek_layer import detach_scorer

        detach_scorer(layer)

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        sparsek_scores: torch.Tensor | None = None,
        sparsek_gain: torch.Tensor | None = None,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.attend`. ``sparsek_scores`` and ``sparsek_gain`` are what the layer's scorer returned."""
        from sparsetrain_kernels.sparsek import find_places

        self._refuse(options)
        if key.shape[2] != query.shape[2]:
            raise ModelError(
                f"SparseK got a cache of {key.shape[2]} keys for {query.shape[2]} queries, but no scores of the "
                "earlier ones; let the model make its own cache, or pass an empty transformers.DynamicCache()"
            )
        cu_seqlens = options.get("cu_seqlens")
        places = find_places(query.shape[2], cu_seqlens, query.device)
        scores, _ = self._scores(layer, query, sparsek_scores, sparsek_gain, places)
        topk = self.training_topk if layer.training else self.config.topk
        return self._select_and_attend(layer, query, key, value, scores, topk, cu_seqlens, options.get("scale"))

    def new_state(self) -> SparseKState:
        """Room for ``sinks + topk + window`` keys and values a head."""
        from sparsetrain.methods.sparsek_state import SparseKState

        config = self.config
        return SparseKState(
            topk=config.topk,
            window=config.window,
            sinks=config.sinks,
            score_buffer=config.score_buffer or 4 * config.topk,
            score_heads=self.score_heads,
        )

    def attend_with_state(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        state: SparseKState,
        starts: list[int] | None,
        sparsek_scores: torch.Tensor | None = None,
        sparsek_gain: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """See :meth:`Method.attend_with_state`: one token at a time from the slots, several by the operator of training
        over what the slots hold and the new tokens."""
        import torch
        from sparsetrain_kernels.sparsek import Places, find_places

        from sparsetrain.methods.sparsek_state import Sequence

        self._refuse(options)
        slots, scale = state.start(key), options.get("scale")
        if query.shape[2] == 1 and state.started:
            places = Places(slots.length[:, None], torch.zeros_like(slots.length[:, None]))
            before = state.moments(slice(None))
            scores, after = self._scores(layer, query, sparsek_scores, sparsek_gain, places, before)
            state.step(key, value, scores, after)
            return state.attend(query, gate=self.config.gate, scale=scale)

        out = torch.zeros_like(query)
        for (start, length), rows in _alike(starts, state.lengths).items():
            tokens = query.shape[2] - start
            if tokens <= 0:
                continue
            q, k, v = (tensor[rows][:, :, start:] for tensor in (query, key, value))
            linear, gain = (
                None if tensor is None else tensor[rows][:, :, start:] for tensor in (sparsek_scores, sparsek_gain)
            )
            places = find_places(tokens, None, query.device)
            places = Places(places.position + length, places.first)
            scores, after = self._scores(layer, q, linear, gain, places, state.moments(rows))
            sequence = state.sequence(rows, length, Sequence(k, v, scores, places.position.expand_as(scores)))
            # What the slots hold asks nothing, but the operator wants a query for every key.
            asked = torch.cat([q.new_zeros(*q.shape[:2], sequence.key.shape[2] - tokens, q.shape[3]), q], dim=2)
            # The slots have room for the config's topk, whatever training is at.
            answers = self._select_and_attend(
                layer, asked, sequence.key, sequence.value, sequence.scores, self.config.topk, None, scale
            )
            out[rows, :, start:] = answers[:, :, -tokens:]
            state.fill(rows, sequence, length + tokens, after)
        return out

    def observations(self) -> dict[str, float]:
        """What ``sparsetrain_kernels.sparsek.topk_statistics`` tells of each layer's selections, and mean and spread of
        its scores: means over the calls since the last time. Without the numbers a short text cannot give."""
        import torch

        seen, self._seen = self._seen, {}
        means = {}
        for layer, calls in sorted(seen.items()):
            # Read from the device at once.
            numbers = torch.stack([number for call in calls for number in call.values()]).tolist()
            for i, name in enumerate(calls[0]):
                mean = sum(numbers[i :: len(calls[0])]) / len(calls)
                if not math.isnan(mean):
                    means[f"sparsek/{STATISTICS.get(name, name)}/layer_{layer:02}"] = mean
        return means

    def lifetimes(self) -> dict[int, torch.Tensor]:
        """See :meth:`Method.lifetimes`. Sinks are read to the end of their document."""
        import torch

        found = {}
        for layer, exit in self._exits.items():
            left = torch.arange(exit.shape[1], dtype=torch.int32, device=exit.device) + self.config.window
            found[layer] = (exit - left).clamp(min=0)
        return found

    def _refuse(self, options: Mapping[str, Any]) -> None:
        for name in ("softcap", "sink_logits"):
            if options.get(name) is not None:
                raise ModelError(f"SparseK attention has no {name}, which this model asks for; not supported")

    def _scores(
        self,
        layer: Any,
        query: torch.Tensor,
        linear: torch.Tensor | None,
        gain: torch.Tensor | None,
        places: Places,
        moments: Moments | None = None,
    ) -> tuple[torch.Tensor, Moments | None]:
        """The scores that compete, and the moments of normalisation after them."""
        from sparsetrain_kernels.sparsek import place_scores

        from sparsetrain.methods.sparsek_scorer import hashed_scores

        if self.config.scorer == "random":
            linear = hashed_scores(self.score_heads, layer.layer_idx, places, like=query)
        if linear is None:
            raise ModelError(
                f"{type(layer).__name__} did not hand the scores of its input on to its attention; this architecture "
                "cannot take SparseK"
            )
        if self.config.scorer == "detached":
            linear = linear.detach()
        return place_scores(linear, gain, places, self.config.slope, moments)

    def _observe(
        self,
        layer: Any,
        scores: torch.Tensor,
        selection: CausalSelection,
        topk: int,
        cu_seqlens: torch.Tensor | None,
    ) -> None:
        import torch
        from sparsetrain_kernels.sparsek import topk_statistics

        config = self.config
        found = topk_statistics(scores, selection, topk, config.window, sinks=config.sinks, cu_seqlens=cu_seqlens)
        found["score_std"], found["score_mean"] = torch.std_mean(scores)
        self._seen.setdefault(layer.layer_idx, []).append(found)
        self._exits[layer.layer_idx] = selection.exit[0]

    def _select_and_attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: torch.Tensor,
        topk: int,
        cu_seqlens: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        from sparsetrain_kernels.selected_attention import selected_attention
        from sparsetrain_kernels.sparsek import causal_sparsek

        config = self.config
        selection = causal_sparsek(scores, topk, config.window, sinks=config.sinks, cu_seqlens=cu_seqlens)
        if self.observing:
            self._observe(layer, scores.detach(), selection, topk, cu_seqlens)
        return selected_attention(
            query,
            key,
            value,
            scores,
            selection.threshold,
            selection.exit,
            topk=topk,
            window=config.window,
            sinks=config.sinks,
            gate=config.gate,
            cu_seqlens=cu_seqlens,
            scale=scale,
        )


def _alike(starts: list[int] | None, lengths: list[int]) -> dict[tuple[int, int], list[int] | slice]:
    """The rows of a batch by their padding and by how many tokens they have read; a slice where all are alike."""
    pairs = list(zip(starts or [0] * len(lengths), lengths, strict=True))
    if len(set(pairs)) == 1:
        return {pairs[0]: slice(None)}
    return {pair: [row for row, other in enumerate(pairs) if other == pair] for pair in dict.fromkeys(pairs)}
