"""The loss of pairs of answers as a module, in the place of the loss of every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsetrain.data.batch import Batch
from sparsetrain.data.document import IGNORE
from sparsetrain.modeling.adapters import adapters_off
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.loss import CausalLMLoss, rows_of_targets
from sparsetrain.training.memory.chunks import split_evenly
from sparsetrain.training.preference.losses import Answers, pair_losses
from sparsetrain.training.preference.reference import Reference


class PreferenceLoss(CausalLMLoss):
    """The summed loss of the pairs in a packed row.

    The documents of a row are pairs: 2 i is a preferred answer behind its prompt, 2 i + 1 the rejected one. As for the
    loss of every token, logits exist a chunk at a time. The log-likelihood of each token is kept (fp32 ``[K]``), and
    summed by document.

    Liger's fused losses are not used: that of every token has no gradient of single tokens, and those of pairs take
    padded batches.

    Args:
        model: A transformers causal language model, with adapters if the reference is the model without them.
        recipe: ``preference`` is its section.
        reference: The reference's log-likelihoods, measured before; None for losses that need none, and where adapters
            are switched off.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, reference: Reference | None = None) -> None:
        super().__init__(model, recipe.train.loss_chunk)
        assert recipe.preference is not None
        self.section = recipe.preference
        self.reference = reference
        self.without_adapters = recipe.reference == "adapters_off"

    def describe(self) -> str:
        """A description of how the loss is computed."""
        against = ""
        if self.section.has_reference:
            original = "the model without its adapters" if self.without_adapters else "the original, measured before"
            against = f" against {original}"
        return f"{self.section.loss} of pairs of answers{against}, {super().describe()}"

    def counts(self, batch: Batch) -> list[float]:
        """Pairs, and tokens of preferred answers."""
        tokens = _target_counts(batch)
        return [len(tokens) // 2, int(tokens[::2].sum())]

    def arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The tokens of each answer, and its log-likelihood under the reference if it was measured: ``[answers]``."""
        found = self.answer_tokens(batch)
        if self.reference is not None:
            found["measured"] = self.reference.of(batch)
        return found

    @staticmethod
    def answer_tokens(batch: Batch) -> dict[str, torch.Tensor]:
        """The argument ``answer_tokens`` of :meth:`forward`: ``[answers]``, int64."""
        return {"answer_tokens": torch.from_numpy(_target_counts(batch))}

    def shares(self, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight of the likelihood of each preferred token, ``[]``, as the mean is over all of them in the step."""
        weight = self.section.likelihood_weight
        return {"nll_share": weight * counts[0] / counts[1].clamp(min=1.0)} if weight else {}

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
        answer_tokens: torch.Tensor | None = None,
        measured: torch.Tensor | None = None,
        nll_share: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed loss of the pairs, and the balance loss of the routers where the model adds one.

        Args:
            input_ids, position_ids, cu_seqlens, positions, targets, num_chunks, balance_weight, planned: As in
                :meth:`CausalLMLoss.forward`.
            answer_tokens: int64 ``[2 P]``: targets of each document. None: the summed NLL of all targets, as of the
                loss of every token.
            measured: fp64 ``[2 P]``: the reference's log-likelihoods, if they were measured before.
            nll_share: fp64 scalar: weight of the summed NLL of the preferred answers; None adds none.

        Returns:
            fp32 scalar.
        """
        row = (input_ids, position_ids, cu_seqlens, positions, targets, num_chunks)
        if answer_tokens is None:
            return super().forward(*row, balance_weight, planned)
        reference = measured
        if self.without_adapters:
            with torch.no_grad(), adapters_off(self.model):
                reference = self.log_likelihoods(*row, answer_tokens, planned)
        found, output = self._forward(*row, answer_tokens, planned)
        policy, tokens = Answers.of(found), Answers.of(answer_tokens.to(found.dtype))
        compared = None if reference is None else Answers.of(reference)
        losses, *rewards = pair_losses(self.section, policy, tokens, compared)
        self._measure(policy, *rewards)
        loss = losses.sum()
        if nll_share is not None:
            loss = loss - nll_share * policy.chosen.sum()
        weight = float(len(losses)) if balance_weight is None else balance_weight
        return self._with_balance(loss.float(), output, weight)

    def log_likelihoods(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        num_chunks: int,
        answer_tokens: torch.Tensor,
        planned: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The log-likelihood of each document's targets, fp64 ``[documents]``; arguments as in :meth:`forward`."""
        row = (input_ids, position_ids, cu_seqlens, positions, targets, num_chunks)
        return self._forward(*row, answer_tokens, planned)[0]

    def _forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        num_chunks: int,
        answer_tokens: torch.Tensor,
        planned: Mapping[str, Any] | None,
    ) -> tuple[torch.Tensor, Any]:
        """:meth:`log_likelihoods`, and the model's output where it adds a loss."""
        inputs = self._inputs(input_ids, position_ids, cu_seqlens, planned)
        if self.chunk is None:
            output = self.model(**inputs)
            losses = F.cross_entropy(output.logits[0][positions].float(), targets, reduction="none")
        else:
            hidden, output = self._decode(inputs)
            rows, wanted = rows_of_targets(hidden, positions, targets)
            parts = zip(split_evenly(rows, num_chunks), split_evenly(wanted, num_chunks), strict=True)
            losses = torch.cat([checkpoint(self._token_losses, *part, use_reentrant=False) for part in parts])
            losses = losses if len(losses) == len(positions) else losses[positions]
        # A sum by index would use atomics, whose order is free.
        return -torch.segment_reduce(losses.double(), "sum", lengths=answer_tokens, unsafe=True), output

    def _token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return F.cross_entropy(logits, targets, reduction="none")

    def _measure(self, policy: Answers, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        with torch.no_grad():
            self.sums = {
                "rewards/chosen": chosen.sum(),
                "rewards/rejected": rejected.sum(),
                "rewards/margins": (chosen - rejected).sum(),
                "rewards/accuracies": (chosen > rejected).double().sum(),
                "logps/chosen": policy.chosen.detach().sum(),
                "logps/rejected": policy.rejected.detach().sum(),
            }


def _target_counts(batch: Batch) -> np.ndarray:
    """Targets of each document of a batch, int64 ``[documents]``."""
    learned = np.flatnonzero(batch.labels[0].numpy() != IGNORE)
    return np.diff(np.searchsorted(learned, batch.cu_seqlens.numpy())).astype(np.int64)
