"""The training loss: summed negative log-likelihood, so that the caller divides by the tokens of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import ModelError
from sparsetrain.modeling import balance_factor, has_plain_head
from sparsetrain.modeling.ulysses import ULYSSES_ARGUMENT, Ulysses
from sparsetrain.training.memory.chunks import split_evenly
from sparsetrain.training.memory.liger import can_fuse_loss, fuse_loss


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

    Raises:
        ModelError: the model's routers add a balance loss, and ranks share its sequences.
    """

    def __init__(
        self, model: PreTrainedModel, chunk: int | None, *, fused: bool = False, ulysses: Ulysses | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk if has_plain_head(model) else None
        self.balance = balance_factor(model)
        if self.balance and ulysses is not None:
            raise ModelError(
                "the routers' balance loss (output_router_logits) is not computed over sequences that ranks share; set "
                "sequence.parallel: 1, or model.config_overrides={output_router_logits: false}"
            )
        self.balance_loss: torch.Tensor | None = None
        """That of the last call, fp32, with its factor; None where the model adds none."""
        self.shared = {} if ulysses is None else {ULYSSES_ARGUMENT: ulysses}
        self.fused = fused and self.chunk is not None and can_fuse_loss(model)
        if self.fused:
            fuse_loss(model.get_output_embeddings())

    def describe(self) -> str:
        """How the loss is computed."""
        how = f"logits of {self.chunk:,} tokens at a time" if self.chunk else "logits of all tokens at once"
        if self.fused:
            how = "fused by Liger, logits in chunks of its own"
        return how + (f", and {self.balance:g} of the routers' balance loss" if self.balance else "")

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        num_chunks: int,
        balance_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed NLL, and the balance loss of the routers where the model adds one.

        Args:
            input_ids: int64 ``[1, T]``, packed documents.
            position_ids: int64 ``[1, T]``, restarting at each document.
            cu_seqlens: int32 ``[documents + 1]``.
            positions: int64 ``[K]``, where a token is predicted.
            targets: int64 ``[K]``, the token that follows each position.
            num_chunks: chunks to make of the K positions, the same on every rank: under ZeRO-3 each use of the output
                projection gathers it, which all ranks must do together. A chunk may be empty.
            balance_weight: what the balance loss of these tokens is multiplied by beside its factor; by default K, so
                that it is added to the mean NLL of a target.

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
            output = self.model(**inputs)
            loss = F.cross_entropy(output.logits[0][positions].float(), targets, reduction="sum")
        else:
            hidden, output = self._decode(inputs)
            loss = self._sum_over_chunks(*_rows(hidden, positions, targets), num_chunks)
        if self.balance:
            if not isinstance(output.aux_loss, torch.Tensor):
                raise ModelError(
                    f"{type(self.model).__name__} of transformers {transformers.__version__} computes no balance loss, "
                    "though its config asks for it (output_router_logits); upgrade transformers, or set "
                    "model.config_overrides.output_router_logits=false"
                )
            found = self.balance * output.aux_loss.float().to(loss.device)
            self.balance_loss = found.detach()
            loss = loss + found * (len(positions) if balance_weight is None else balance_weight)
        return loss

    def _decode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The decoder's hidden states ``[T, hidden]``, and where it adds a loss, what the model itself returns."""
        decoder = self.model.get_decoder()
        if not self.balance:
            # An index would give the gradient a copy; this gives it a view.
            return decoder(**inputs).last_hidden_state.squeeze(0), None
        # The family's own function, at the cost of one token's logits.
        found: list[torch.Tensor] = []
        hook = decoder.register_forward_hook(lambda _, __, output: found.append(output.last_hidden_state))
        try:
            output = self.model(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
        return found[0].squeeze(0), output

    def _sum_over_chunks(self, hidden: torch.Tensor, targets: torch.Tensor, num_chunks: int) -> torch.Tensor:
        if self.fused:
            fused: torch.Tensor = self.model.get_output_embeddings()(hidden, targets)
            return fused
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
