"""The training loss: summed negative log-likelihood, so that the caller divides by the tokens of the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsetrain.data.batch import IGNORE
from sparsetrain.modeling import has_plain_head
from sparsetrain.modeling.ulysses import ULYSSES_ARGUMENT, Ulysses
from sparsetrain.training.chunks import split_evenly
from sparsetrain.training.liger import can_fuse_loss, fuse_loss


class CausalLMLoss(nn.Module):
    """A causal language model that returns the summed NLL of chosen positions.

    The logits of a 128K-token row over a 128K vocabulary take 64 GiB in fp32. They never exist here: the decoder's
    hidden states go through the output projection a chunk at a time, recomputed in backward. With Liger, one operation
    projects, takes the loss and forms the gradient, a chunk of its own at a time, and nothing is recomputed.

    DeepSpeed's ``TiledFusedLogitsLoss`` is a third way. It forms the gradient in the forward pass as well, but scales
    only that of the hidden states by what comes from behind, not that of the projection's weight; the loss here is
    divided by the targets of the global batch behind it. It also makes fewer tiles than asked for where the tokens do
    not divide, and ranks that gather weights of ZeRO-3 must make equally many.

    Args:
        model: a transformers causal language model.
        chunk: positions in a chunk; None computes all logits at once, by the model itself.
        fused: use Liger's operation where it computes this model's loss.
        ulysses: splits each forward pass over the ranks that share a sequence, which then hold a part of it.
    """

    def __init__(
        self, model: PreTrainedModel, chunk: int | None, *, fused: bool = False, ulysses: Ulysses | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk if has_plain_head(model) else None
        self.shared = {} if ulysses is None else {ULYSSES_ARGUMENT: ulysses}
        self.fused = fused and self.chunk is not None and can_fuse_loss(model)
        if self.fused:
            fuse_loss(model.get_output_embeddings())

    def describe(self) -> str:
        """How the loss is computed."""
        if self.fused:
            return "fused by Liger, logits in chunks of its own"
        return f"logits of {self.chunk:,} tokens at a time" if self.chunk else "logits of all tokens at once"

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        num_chunks: int,
    ) -> torch.Tensor:
        """Summed NLL.

        Args:
            input_ids: int64 ``[1, T]``, packed documents.
            position_ids: int64 ``[1, T]``, restarting at each document.
            cu_seqlens: int32 ``[documents + 1]``.
            positions: int64 ``[K]``, where a token is predicted.
            targets: int64 ``[K]``, the token that follows each position.
            num_chunks: chunks to make of the K positions, the same on every rank: under ZeRO-3 each use of the output
                projection gathers it, which all ranks must do together. A chunk may be empty.

        Returns:
            fp32 scalar.
        """
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens,
            "use_cache": False,
            **self.shared,
        }
        if self.chunk is None:
            logits = self.model(**inputs).logits[0]
            return F.cross_entropy(logits[positions].float(), targets, reduction="sum")
        # An index would give the gradient a copy; this gives it a view.
        hidden = self.model.get_decoder()(**inputs).last_hidden_state.squeeze(0)
        hidden, targets = _rows(hidden, positions, targets)
        if self.fused:
            return self.model.get_output_embeddings()(hidden, targets)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, target in zip(split_evenly(hidden, num_chunks), split_evenly(targets, num_chunks), strict=True):
            total = total + checkpoint(self._chunk_loss, part, target, use_reentrant=False)
        return total

    def _chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model.get_output_embeddings()(hidden).float(), targets, reduction="sum")


def _rows(hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict something, and what; or all of them, the others with the target that is ignored.

    Picking rows copies them, and their gradient too: 2 GiB for 128K tokens of width 4,096. Where most rows are picked,
    projecting the few others costs less. Rows without any targets are ignored as a whole: an operation over no rows is
    none that every kernel knows.
    """
    if 0 < 2 * len(positions) < len(hidden):
        return hidden[positions], targets
    return hidden, torch.full_like(hidden[:, 0], IGNORE, dtype=targets.dtype).index_copy(0, positions, targets)
