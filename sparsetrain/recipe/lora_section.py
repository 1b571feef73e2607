"""The ``lora`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsetrain.recipe.expressions import check_expression
from sparsetrain.section import Bounds, Decay, Section


class LoraSection(Section):
    """Low-rank adapters (2106.09685) with frozen base weights, through peft. The modules that the attention method adds
    are fully trained and saved with the adapters."""

    rank: Annotated[int, Field(gt=0), Bounds(2**16, "no matrix has a higher rank")] = 16
    """Rank of the update of each matrix."""
    alpha: Annotated[int, Field(gt=0), Bounds(2**24, "it scales the update")] | None = None
    """The update is scaled by ``alpha / rank``; null: ``2 * rank``, as in LongLoRA and most recipes."""
    dropout: Decay = 0.0
    """Dropout probability of an adapter's inputs in training."""
    targets: str | Annotated[list[str], Field(min_length=1)] = "attention"
    """Which linear layers get an adapter. ``attention``: the projections of queries, keys, values and output.
    ``linear``: every one of the decoder, but never the output head or a module that the method adds. Or give a list of
    names (``[q_proj, mlp.down_proj]``, matched from the end), or a regular expression for whole names."""
    dora: bool = False
    """DoRA: also train the magnitude of each column, besides the low-rank update of its direction (2402.09353)."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` instead, so that higher ranks do not learn more slowly (2312.03732)."""
    train_embeddings: bool = False
    """Also train the full input embedding. LongLoRA (2309.12307, section 3.3) found this and the norms necessary for
    longer contexts."""
    train_norms: bool = False
    """Also train the weights of the norms, which are few."""
    quantize_base: Literal["none", "4bit", "8bit"] = "none"
    """Keep the frozen matrices of the decoder in 4 bits (NF4, as QLoRA, 2305.14314) or 8 (LLM.int8), by bitsandbytes.
    Needs CUDA and a ZeRO stage below 3."""

    @model_validator(mode="after")
    def _rule_or_expression(self) -> LoraSection:
        if not isinstance(self.targets, str) or self.targets in ("attention", "linear"):
            return self
        if self.targets.lower() == "all-linear":
            raise ValueError(f"targets={self.targets!r} is a keyword of peft; the equivalent here is linear")
        if self.targets.replace("_", "").isalnum():
            raise ValueError(
                f"targets={self.targets!r} is not a rule; choose attention, linear, a list of names such as "
                f"[{self.targets}], or a regular expression for whole names such as .*layers.[0-7].*proj"
            )
        try:
            check_expression(self.targets)
        except ValueError as error:
            raise ValueError(f"targets={error}") from None
        return self

    @property
    def scale_numerator(self) -> int:
        """``alpha`` with its default filled in."""
        return 2 * self.rank if self.alpha is None else self.alpha
