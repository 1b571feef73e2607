"""SparseK attention (2406.16747): each query reads the keys with the ``topk`` largest learned scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Unpack

from pydantic import Field, model_validator

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Expected, Method, MethodConfig
from sparsetrain.methods.costs import AttentionCosts, LayerShape
from sparsetrain.methods.sparsek.costs import layer_costs
from sparsetrain.methods.sparsek.options import check_options
from sparsetrain.section import MOST_STEPS, Bounds, Tokens, TokensOrNone

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.causal_selection import CausalSelection
    from sparsetrain_kernels.inputs import AttentionOptions
    from sparsetrain_kernels.score_placement import DocumentPositions, Moments
    from torch import nn

    from sparsetrain.methods.fit import LayerFit
    from sparsetrain.methods.sparsek.memory import SparseKMemory

STATISTICS = {"support": "support_size", "interior": "interior_size", "saturated": "saturated_share"}
"""Names of selection statistics in a run's metrics, if they differ from the statistic's own name."""


class SparseKConfig(MethodConfig):
    """Each token reads the sinks, its window, and the ``topk`` earlier tokens with the largest scores.

    A key's score depends on its token and the preceding ones, never on the query. A key that drops out of the top-k
    therefore never returns, and generation needs ``sinks + topk + window`` keys for any length (2406.16747, section 3).
    """

    new_modules: ClassVar[tuple[str, ...]] = ("sparsek_scorer",)

    method: Literal["sparsek"] = "sparsek"
    """SparseK."""
    topk: Tokens = 1024
    """Number of earlier tokens with the largest scores that each token reads besides its window and the sinks."""
    window: Tokens = 1024
    """Tokens in the local window, including the query's own. A token takes part in top-k once it leaves the window."""
    sinks: TokensOrNone = 4
    """Tokens at the start of each document that every query reads; they do not take part in top-k."""
    gate: Literal["value", "log", "straight"] = "value"
    """How the soft selection ``p = clip(score - threshold, 0, 1)`` reaches the output. ``value`` multiplies the values
    by it (the paper). ``log`` adds its logarithm to the logits. ``straight`` selects hard and only takes its
    gradient."""
    scores: Literal["head", "layer"] = "head"
    """One score and one selection for each key/value head, or one for the whole layer."""
    scorer: Literal["learned", "frozen", "detached", "random"] = "learned"
    """The source of the scores. ``learned`` is a trained linear network. ``frozen`` is the same network without
    training, through which the model still gets gradients; with ``detached`` it gets none. ``random`` is a hash of the
    position without a network. The last three are baselines for a trained scorer."""
    normalize: bool = True
    """Normalise scores by the mean and variance of all scores so far in the document (timestep normalisation), with a
    learned gain: thresholds then mean the same at every length."""
    slope: Annotated[float, Field(ge=0), Bounds(1e6, "scores are fp32")] = 1e-4
    """Added to the score per position, so that newer tokens rank higher. With ``normalize`` its unit is one standard
    deviation of the scores: at 1e-4 a token needs one standard deviation more to be kept 10,000 tokens longer."""
    init: Literal["normal", "zeros", "attention"] | None = None
    """Initialisation of the network. ``normal`` (also null) is random. ``zeros`` leaves the selection to ``slope``, at
    first a longer window. ``attention`` is fitted in closed form to the attention that keys receive from beyond their
    window. The fit uses the first rows of a run; elsewhere, call ``sparsetrain.modeling.fit_method``."""
    topk_start: Tokens | None = None
    """Start training with this many keys and decrease to ``topk`` over ``topk_steps``; null: ``topk`` throughout."""
    topk_steps: Annotated[float, Field(gt=0), Bounds(MOST_STEPS, "no run has more steps")] | None = None
    """Length of that warm-up: a number of steps if 1 or more, a fraction of all steps if below 1."""
    score_buffer: Tokens | None = None
    """Number of scores per head that generation keeps to compute the threshold, which also depends on dropped tokens.
    null: ``4 * topk``."""

    @model_validator(mode="after")
    def _without_contradictions(self) -> SparseKConfig:
        if self.scorer == "random":
            if self.init is not None:
                raise ValueError(f"init={self.init} needs a network, but scorer=random has none; leave init out")
            if not self.normalize:
                raise ValueError("normalize=false needs a network, but scorer=random has none; leave normalize out")
        elif self.init == "zeros" and (self.slope == 0 or self.scorer != "learned"):
            raise ValueError(
                f"init=zeros with slope={self.slope:g} and scorer={self.scorer}: every token would have the same score "
                "and the selection would be arbitrary; use init=normal or attention"
            )
        if (self.topk_start is None) != (self.topk_steps is None):
            raise ValueError("topk_start and topk_steps belong together; give both or neither")
        if self.topk_start is not None and self.topk_start <= self.topk:
            raise ValueError(
                f"topk_start={self.topk_start} must be above topk={self.topk}: the warm-up shrinks the selection"
            )
        if self.topk_steps is not None and self.topk_steps >= 1 and self.topk_steps != int(self.topk_steps):
            raise ValueError(
                f"topk_steps={self.topk_steps}: 1 or more is a number of steps and must be whole; below 1 is a fraction"
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
        """The method object for this config."""
        return SparseKMethod(self, num_kv_heads)

    def costs(self, shape: LayerShape) -> AttentionCosts:
        """The costs of the selection and of attention over it."""
        warms_up = self.topk_start is not None
        return layer_costs(
            shape,
            scores=shape.kv_heads if self.scores == "head" else 1,
            learned=self.scorer == "learned",
            normalize=self.normalize,
            note="Time is for the final topk; the warm-up from topk_start takes longer." if warms_up else None,
        )

    @property
    def waits_for_fit(self) -> bool:
        """With ``init: attention``."""
        return self.init == "attention"

    def settled(self) -> Self:
        """Without the warm-up of ``topk``."""
        return self.model_copy(update={"topk_start": None, "topk_steps": None})

    def heads_fault(self, num_kv_heads: int, parallel: int) -> str | None:
        """See :meth:`MethodConfig.heads_fault`."""
        if self.scorer != "random":
            return None
        return (
            "attention.scorer=random computes scores from the head's index in the model; set it to 1, or scorer: frozen"
        )

    def training_fault(self) -> str | None:
        """See :meth:`MethodConfig.training_fault`."""
        if self.scorer == "learned":
            return None
        return (
            f"new_modules trains only the scorers, but with attention.scorer={self.scorer} they are not trained; set "
            "attention.scorer: learned, or parameters: all"
        )


class SparseKMethod(Method):
    """Attends to the sinks, the window and the selected tokens."""

    extra_inputs = frozenset({"sparsek_scores", "sparsek_gain"})
    selection_operations = frozenset({"sparsetrain::causal_sparsek"})

    def __init__(self, config: SparseKConfig, num_kv_heads: int) -> None:
        self.config = config
        self.score_heads = num_kv_heads if config.scores == "head" else 1
        self.training_topk = config.topk
        """The current ``topk`` in training; evaluation and generation always use the config's."""
        self._seen: dict[int, list[dict[str, torch.Tensor]]] = {}
        self._exits: dict[int, torch.Tensor] = {}

    def begin_step(self, step: int, steps: int) -> None:
        """Decrease the selection from ``topk_start`` to ``topk`` linearly over ``topk_steps``."""
        start, end, length = self.config.topk_start, self.config.topk, self.config.topk_steps
        if start is None or length is None:
            return
        warmup = length if length >= 1 else length * steps
        self.training_topk = round(start + (end - start) * min(1.0, step / warmup))

    def density(self, length: int) -> float:
        """The fraction of the causal pairs of ``length`` tokens that is attended: the token at position i reads
        ``min(i + 1, sinks + topk + window)`` keys."""
        keys = self.config.sinks + self.config.topk + self.config.window
        growing = min(length, keys)
        pairs = growing * (growing + 1) // 2 + (length - growing) * keys
        return pairs / (length * (length + 1) // 2)

    def attach(self, layer: nn.Module, layer_index: int) -> None:
        """Add the scorer to a layer, and a forward pre-hook that scores the layer's input.

        Raises:
            ModelError: The layer's attention has a part that SparseK does not support, or its weights are offloaded.
        """
        from sparsetrain.methods.sparsek.layer import attach_scorer
        from sparsetrain.methods.sparsek.scorer import ScorerSpec

        config = self.config
        spec = ScorerSpec(
            heads=self.score_heads, normalize=config.normalize, trainable=config.scorer == "learned", init=config.init
        )
        attach_scorer(layer, layer_index, None if config.scorer == "random" else spec)

    def detach(self, layer: nn.Module) -> None:
        """Set the scorer aside and remove the hook."""
        from sparsetrain.methods.sparsek.layer import detach_scorer

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
        """See :meth:`Method.attend`; ``query`` ``[B, Hq, N, D]``; ``key``, ``value`` ``[B, Hkv, M, D]``.

        ``sparsek_scores`` and ``sparsek_gain`` are the result of the layer's scorer, each ``[B, heads, N]``.
        """
        from sparsetrain_kernels.score_placement import document_positions

        check_options(options)
        if key.shape[2] != query.shape[2]:
            raise ModelError(
                f"SparseK got a cache of {key.shape[2]} keys for {query.shape[2]} queries, but no scores of the "
                "earlier keys; let the model create its own cache, or pass an empty transformers.DynamicCache()"
            )
        cu_seqlens = options.get("cu_seqlens")
        places = document_positions(query.shape[2], cu_seqlens, query.device)
        scores, _ = self._scores(layer, query, sparsek_scores, sparsek_gain, places)
        topk = self.training_topk if layer.training else self.config.topk
        return self._select_and_attend(layer, query, key, value, scores, topk, cu_seqlens, options.get("scale"))

    def keys_read(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rows: torch.Tensor,
        sparsek_scores: torch.Tensor | None = None,
        sparsek_gain: torch.Tensor | None = None,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.keys_read`, bool ``[H, R, N]``: the sinks, the window, and the selection."""
        import torch
        from sparsetrain_kernels.causal_selection import causal_sparsek
        from sparsetrain_kernels.score_placement import document_positions

        config, cu_seqlens = self.config, options.get("cu_seqlens")
        places = document_positions(query.shape[2], cu_seqlens, query.device)
        scores, _ = self._scores(layer, query, sparsek_scores, sparsek_gain, places)
        selection = causal_sparsek(scores, config.topk, config.window, sinks=config.sinks, cu_seqlens=cu_seqlens)
        place, row = torch.arange(key.shape[2], device=key.device), rows[:, None]
        always = (place < config.sinks) | (row - place < config.window)
        # Behind the window a key is selected until its exit.
        return (always | (row < selection.exit[0, :, None])) & (place <= row)

    def expected(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        document: slice,
        sparsek_scores: torch.Tensor | None = None,
        sparsek_gain: torch.Tensor | None = None,
        **options: Unpack[AttentionOptions],
    ) -> Expected:
        """See :meth:`Method.expected`: at some positions of the document, with the config's ``topk``.

        ``query`` ``[1, Hq, N, D]``; ``key``, ``value`` ``[1, Hkv, N, D]``; fp64 output ``[1, Hq, R, D]``.
        """
        from sparsetrain_kernels.score_placement import document_positions

        from sparsetrain.methods.sparsek.oracle import expected_rows

        config = self.config
        places = document_positions(query.shape[2], options.get("cu_seqlens"), query.device)
        scores, _ = self._scores(layer, query, sparsek_scores, sparsek_gain, places)
        return expected_rows(
            query,
            key,
            value,
            scores,
            document,
            topk=config.topk,
            window=config.window,
            sinks=config.sinks,
            gate=config.gate,
            scale=options.get("scale") or query.shape[3] ** -0.5,
        )

    def memory(self) -> SparseKMemory:
        """A KV memory of ``sinks + topk + window`` keys and values per head."""
        from sparsetrain.methods.sparsek.memory import SparseKMemory
        from sparsetrain.methods.sparsek.state import SparseKState

        config = self.config
        state = SparseKState(
            topk=config.topk,
            window=config.window,
            sinks=config.sinks,
            score_buffer=config.score_buffer or 4 * config.topk,
            score_heads=self.score_heads,
        )
        return SparseKMemory(state, config.gate, self._scores, self._select_and_attend)

    def fit(self, layer: nn.Module) -> LayerFit | None:
        """The fit of the scorer to the attention that keys receive from beyond their window; None for
        ``scorer: random``."""
        if self.config.scorer == "random":
            return None
        from sparsetrain.methods.sparsek.fit import SparseKFit
        from sparsetrain.methods.sparsek.layer import scorer_of

        return SparseKFit(scorer_of(layer), self.config.window, self.config.sinks)

    def needs_fit(self, layer: nn.Module) -> bool:
        """True with ``init: attention`` until the scorer is fitted or its weights are loaded."""
        if self.config.scorer == "random":
            return False
        from sparsetrain.methods.sparsek.layer import scorer_of

        return not scorer_of(layer).ready

    def fit_tokens(self, lengths: Sequence[int]) -> int:
        """The number of tokens that others read from beyond their window."""
        return sum(max(0, length - self.config.window) for length in lengths)

    def observations(self) -> dict[str, float]:
        """``sparsetrain_kernels.causal_selection.topk_statistics`` of each layer's selections, and mean and standard
        deviation of its scores, averaged over the calls since the last time. Statistics that are undefined for short
        texts are left out."""
        import torch

        seen, self._seen = self._seen, {}
        means = {}
        for layer, calls in sorted(seen.items()):
            # One copy from the device for all values.
            numbers = torch.stack([number for call in calls for number in call.values()]).tolist()
            for i, name in enumerate(calls[0]):
                mean = sum(numbers[i :: len(calls[0])]) / len(calls)
                if not math.isnan(mean):
                    means[f"sparsek/{STATISTICS.get(name, name)}/layer_{layer:02}"] = mean
        return means

    def lifetimes(self) -> dict[int, torch.Tensor]:
        """See :meth:`Method.lifetimes`, int32 ``[heads, N]`` by layer. Sinks are read to the end of their document."""
        import torch

        found = {}
        for layer, exit in self._exits.items():
            left = torch.arange(exit.shape[1], dtype=torch.int32, device=exit.device) + self.config.window
            found[layer] = (exit - left).clamp(min=0)
        return found

    def _scores(
        self,
        layer: Any,
        query: torch.Tensor,
        linear: torch.Tensor | None,
        gain: torch.Tensor | None,
        places: DocumentPositions,
        moments: Moments | None = None,
    ) -> tuple[torch.Tensor, Moments | None]:
        """The normalised scores, and the moments of normalisation after the last token."""
        from sparsetrain_kernels.score_placement import place_scores

        from sparsetrain.methods.sparsek.scorer import hashed_scores

        if self.config.scorer == "random":
            linear = hashed_scores(self.score_heads, layer.layer_idx, places, like=query)
        if linear is None:
            raise ModelError(
                f"{type(layer).__name__} did not pass the scores of its input to its attention; this architecture "
                "does not support SparseK"
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
        from sparsetrain_kernels.causal_selection import topk_statistics

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
        from sparsetrain_kernels.causal_selection import causal_sparsek
        from sparsetrain_kernels.selected_keys import selected_attention

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
