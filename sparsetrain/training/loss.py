"""The training loss: the summed negative log-likelihood, which the caller divides by the tokens of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsetrain.data.batch import Batch
from sparsetrain.data.document import IGNORE
from sparsetrain.errors import ModelError
from sparsetrain.modeling import balance_factor, has_plain_head
from sparsetrain.modeling.ulysses import ULYSSES_ARGUMENT, Ulysses
from sparsetrain.training.memory.chunks import split_evenly
from sparsetrain.training.memory.liger import can_fuse_loss, fuse_loss


class CausalLMLoss(nn.Module):
    """A causal language model that returns the summed NLL of chosen positions.

    The logits of a 128K-token row over a 128K vocabulary would take 64 GiB in fp32. They are never computed at once:
    the decoder's hidden states go through the output projection in chunks, which are recomputed in backward. With
    Liger, one fused operation computes projection, loss and gradient in its own chunks, and nothing is recomputed.

    DeepSpeed's ``TiledFusedLogitsLoss`` is an alternative that is not used. It also computes gradients in the forward
    pass, but in backward it multiplies only the gradient of the hidden states by the incoming gradient, not that of the
    projection's weight; here the loss is divided by the targets of the global batch later. It also makes fewer tiles
    than requested if the tokens do not divide evenly, but under ZeRO-3 all ranks need the same number.

    Args:
        model: A transformers causal language model.
        chunk: Positions in a chunk; None computes all logits at once in the model itself.
        fused: Use Liger's operation if it supports this model's loss.
        ulysses: Splits each forward pass over the ranks that share a sequence; each then holds a part of it.

    Raises:
        ModelError: The model's routers add a balance loss, and sequence parallelism is on.
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
        """The balance loss of the last call, fp32 scalar, including its factor; None if the model adds none."""
        self.sums: dict[str, torch.Tensor] = {}
        """Metrics of the last call as fp64 scalars, summed over what :meth:`counts` counts first."""
        self.shared = {} if ulysses is None else {ULYSSES_ARGUMENT: ulysses}
        self.fused = fused and self.chunk is not None and can_fuse_loss(model)
        if self.fused:
            fuse_loss(model.get_output_embeddings())

    def describe(self) -> str:
        """A description of how the loss is computed."""
        how = f"logits of {self.chunk:,} tokens at a time" if self.chunk else "logits of all tokens at once"
        if self.fused:
            how = "fused by Liger, which computes logits in chunks"
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
        planned: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Summed NLL, and the balance loss of the routers where the model adds one.

        Args:
            input_ids: int64 ``[1, T]``, packed documents.
            position_ids: int64 ``[1, T]``, restarting at each document.
            cu_seqlens: int32 ``[documents + 1]``.
            positions: int64 ``[K]``, the positions at which a token is predicted.
            targets: int64 ``[K]``, the token that follows each position.
            num_chunks: Number of chunks of the K positions, the same on every rank: under ZeRO-3 each use of the output
                projection gathers it, a collective operation. A chunk may be empty.
            balance_weight: Weight of the balance loss of these tokens besides its factor; by default K, so that it is
                added to the mean NLL per target.
            planned: What the attention method needs to know about the documents
                (:func:`~sparsetrain.modeling.attention.passes.planned_arguments`).

        Returns:
            fp32 scalar.
        """
        inputs = self._inputs(input_ids, position_ids, cu_seqlens, planned)
        if self.chunk is None:
            output = self.model(**inputs)
            loss = F.cross_entropy(output.logits[0][positions].float(), targets, reduction="sum")
        else:
            hidden, output = self._decode(inputs)
            loss = self._sum_over_chunks(*rows_of_targets(hidden, positions, targets), num_chunks)
        return self._with_balance(loss, output, len(positions) if balance_weight is None else balance_weight)

    def counts(self, batch: Batch) -> list[float]:
        """What the loss of a step is divided by, first, and other counts of a micro batch that are summed over it."""
        return [batch.num_target_tokens]

    def arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        """More arguments of :meth:`forward` for a micro batch, by name, such as a tensor ``[documents]``."""
        return {}

    def shares(self, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """More arguments of :meth:`forward`, ``[]``, made of the whole step's :meth:`counts`, fp64 ``[counts]``."""
        return {}

    def _inputs(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        planned: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The arguments of the model's forward."""
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens,
            "use_cache": False,
            **self.shared,
            **(planned or {}),
        }

    def _with_balance(self, loss: torch.Tensor, output: Any, weight: torch.Tensor | float) -> torch.Tensor:
        """Add the routers' balance loss of the model's output, if there is one."""
        if not self.balance:
            return loss
        if not isinstance(output.aux_loss, torch.Tensor):
            raise ModelError(
                f"{type(self.model).__name__} of transformers {transformers.__version__} computes no balance loss, "
                "though its config asks for it (output_router_logits); upgrade transformers, or set "
                "model.config_overrides.output_router_logits=false"
            )
        found = self.balance * output.aux_loss.float().to(loss.device)
        self.balance_loss = found.detach()
        return loss + found * weight

    def _decode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The decoder's hidden states ``[T, hidden]``, and the model's own output if it adds a loss."""
        decoder = self.model.get_decoder()
        if not self.balance:
            # Indexing would copy the gradient; this gives a view.
            return decoder(**inputs).last_hidden_state.squeeze(0), None
        # Use the model's own loss function, which needs logits of one token only.
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


def pass_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """The tensors of a batch that :meth:`CausalLMLoss.forward` takes, by name: ``[1, T]``, ``[documents + 1]`` and
    ``[targets]``, on the batch's device."""
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "positions": positions,
        "targets": batch.labels[0, positions + 1],
    }


def rows_of_targets(
    hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states at the chosen positions with their targets, or all of them with ignored targets elsewhere.

    Args:
        hidden: ``[tokens, hidden]``.
        positions: ``[targets]``, int64.
        targets: ``[targets]``, int64.

    Returns:
        Rows ``[rows, hidden]`` and their targets ``[rows]``.

    Selecting rows copies them and their gradient: 2 GiB for 128K tokens of hidden size 4,096. If most rows are
    selected, projecting the few others is cheaper. If there are no targets, all rows are ignored, because not every
    kernel accepts an empty input.
    """
    if 0 < 2 * len(positions) < len(hidden):
        return hidden[positions], targets
    return hidden, torch.full_like(hidden[:, 0], IGNORE, dtype=targets.dtype).index_copy(0, positions, targets)
