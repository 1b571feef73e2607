"""The training loss: summed negative log-likelihood, so that the caller divides by the tokens of the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsetrain.modeling import has_plain_head


class CausalLMLoss(nn.Module):
    """A causal language model that returns the summed NLL of chosen positions.

    The logits of a 128K-token row over a 128K vocabulary take 64 GiB in fp32. They never exist here: the decoder's
    hidden states go through the output projection a chunk at a time, recomputed in backward.

    Args:
        model: a transformers causal language model.
        chunk: positions in a chunk; None computes all logits at once, by the model itself.
    """

    def __init__(self, model: PreTrainedModel, chunk: int | None) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk if has_plain_head(model) else None

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
        }
        if self.chunk is None:
            logits = self.model(**inputs).logits[0]
            return F.cross_entropy(logits[positions].float(), targets, reduction="sum")
        hidden = self.model.get_decoder()(**inputs).last_hidden_state[0, positions]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, target in zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True):
            total = total + checkpoint(self._chunk_loss, part, target, use_reentrant=False)
        return total

    def _chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model.get_output_embeddings()(hidden).float(), targets, reduction="sum")
