"""The training loss: summed negative log-likelihood, so that the caller divides by the tokens of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsetrain.modeling import has_plain_head


class CausalLMLoss(nn.Module):
    """A causal language model that returns the summed NLL of chosen positions.

    Its state, which is what a checkpoint holds, is the trained parameters alone: what is frozen comes from the model's
    own files again. Loading is strict about the rest.

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
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

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


def _trained(module: nn.Module) -> set[str]:
    """Names of the trained parameters and of the buffers, tied ones under each of their names.

    DeepSpeed's own ``exclude_frozen_parameters`` would keep an output projection that is tied to a frozen embedding.
    """
    named = module.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    return trained | {name for name, _ in module.named_buffers(remove_duplicate=False)}


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    kept = {f"{prefix}{name}" for name in _trained(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _expect_no_frozen(module: nn.Module, incompatible: Any) -> None:
    trained = _trained(module)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name in trained]
