"""Training with the keys that hold a share of the weight: a method that is registered for one experiment alone.

    python -m sparsetrain.recipes.evidence.top_p_method run my.yaml attention.method=top-p

is the command line of sparsetrain with this method beside its own. It costs more than full attention.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Expected, Method, MethodConfig
from sparsetrain.methods.costs import AttentionCosts, LayerShape
from sparsetrain.methods.full import FullConfig
from sparsetrain.methods.installed import INSTALLED

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKED_TOKENS = 512
KEYS = "top-p/keys"
"""The name of what is observed."""


class TopPConfig(MethodConfig):
    """Each token reads itself and the fewest earlier tokens that hold a share ``p`` of its weight, of each query head;
    the query heads of a KV head read what any of them chose. So Twilight reads with exact weights."""

    method: Literal["top-p"] = "top-p"
    """Top-p attention."""
    p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the weight."""
    falling: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the steps in which it falls from 1, evenly."""

    def pattern(self, num_kv_heads: int = 1) -> None:
        """None: the choice depends on the text."""
        return None

    def build(self, num_kv_heads: int = 1) -> TopPMethod:
        """The method object for this config."""
        return TopPMethod(self)

    def costs(self, shape: LayerShape) -> AttentionCosts:
        """Those of full attention, which are less."""
        return FullConfig().costs(shape)


class TopPMethod(Method):
    """Attends to the keys that hold a share of the weight."""

    def __init__(self, config: TopPConfig) -> None:
        self.config = config
        self.p = config.p
        self._read: list[float] = []

    def begin_step(self, step: int, steps: int) -> None:
        """Lower the share from 1."""
        fallen = min(1.0, step / (self.config.falling * steps))
        self.p = 1 - (1 - self.config.p) * fallen

    def density(self, length: int) -> float:
        """All logits are computed."""
        return 1.0

    def attend(
        self, layer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """See :meth:`Method.attend`; ``query`` ``[B, Hq, N, D]``; ``key``, ``value`` ``[B, Hkv, M, D]``.

        Raises:
            ModelError: the model caps its logits or has learned sinks.
        """
        from sparsetrain_kernels import top_p_attention

        for name in ("softcap", "sink_logits"):
            if options.pop(name, None) is not None:
                raise ModelError(f"attention.method=top-p knows no {name}, which this model has; train another model")
        if self.observing:
            self._read.append(keys_read(query, key, self.p, **options))
        return top_p_attention(query, key, value, self.p, window=1, union=True, **options)

    def observations(self) -> dict[str, float]:
        """The keys that a token and KV head reads, in the mean over calls."""
        read, self._read = self._read, []
        return {KEYS: sum(read) / len(read)} if read else {}

    def expected(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        document: slice,
        **options: Any,
    ) -> Expected:
        """See :meth:`Method.expected`: by sorting all weights, at the first tokens of the document.

        ``query`` ``[1, Hq, N, D]``; ``key``, ``value`` ``[1, Hkv, N, D]``; fp64 output ``[1, Hq, R, D]``.
        """
        import torch

        stop = min(document.stop, document.start + CHECKED_TOKENS)
        rows = torch.arange(document.start, stop, device=query.device)
        q, k, v = (tensor[0, :, rows].double() for tensor in (query, key, value))
        group = q.shape[0] // k.shape[0]
        k, v = (tensor.repeat_interleave(group, 0) for tensor in (k, v))
        itself = torch.eye(len(rows), dtype=torch.bool, device=query.device)
        later = torch.ones_like(itself).triu(1)
        weights = (q @ k.mT * options["scale"]).masked_fill(later, float("-inf")).softmax(-1)
        ordered, place = weights.masked_fill(itself, 0).sort(-1, descending=True)
        before = weights.diagonal(dim1=1, dim2=2)[..., None] + ordered.cumsum(-1) - ordered
        read = itself | torch.zeros_like(later).expand_as(weights).scatter(-1, place, before < self.p)
        read = read.unflatten(0, (-1, group)).any(1).repeat_interleave(group, 0) & ~later
        weights = weights * read
        return Expected(rows, (weights / weights.sum(-1, keepdim=True) @ v)[None])


def keys_read(
    query: torch.Tensor,
    key: torch.Tensor,
    p: float,
    *,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> float:
    """The keys that a token and KV head reads, in the mean; by weights rounded to fp16.

    Args:
        query: ``[B, Hq, N, D]``.
        key: ``[B, Hkv, N, D]``.
        p: share of the weight.
        cu_seqlens: int32 ``[documents + 1]``.
        scale: factor on the logits.
    """
    import torch
    from sparsetrain_kernels import causal_attention, top_p_keys

    with torch.no_grad():
        _, lse = causal_attention(query, key, key, cu_seqlens=cu_seqlens, scale=scale, return_lse=True)
        given: dict[str, Any] = {"cu_seqlens": cu_seqlens, "scale": scale, "capacity": key.shape[2], "window": 1}
        positions = torch.arange(key.shape[2], dtype=torch.int32)
        counts = top_p_keys(query, key, lse.float(), p, query_positions=positions, **given).counts
    return 1 + float(counts.double().mean())


def register() -> None:
    """Make this process know the method, as it knows those of installed packages."""
    name, where = TopPConfig.model_fields["method"].default, f"{TopPConfig.__module__}:{TopPConfig.__name__}"
    INSTALLED.entries[name] = (EntryPoint(name, where, INSTALLED.group),)


if __name__ == "__main__":
    from sparsetrain.recipes.evidence import top_p_method

    from sparsetrain.cli import script

    top_p_method.register()
    script()
