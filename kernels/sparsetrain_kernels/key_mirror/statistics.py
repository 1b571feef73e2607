"""Mean and spread of a prompt's keys, channel by channel: what a mirror is centred and scaled by."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_tensors
from sparsetrain_kernels.key_mirror.layout import check_tensor

LEAST_SPREAD = 2.0**-6
"""Of a channel, as a part of the root mean square of its head's: a channel that hardly changes in the prompt must not
take the range of the codes when it does later."""
TOKENS = 4096
"""Keys that are looked at together: copies in fp32 are of these."""


@torch.no_grad()
def key_statistics(key: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of each channel of the keys, and the standard deviation (2502.02770, section 4, quantises keys as they
    are; with outliers in few channels, most of the range of 4 bits then goes to those).

    Padding is not read. Nothing is read on the host.

    Args:
        key: ``[B, Hkv, N, D]``, the prompts, with any padding before them.
        lengths: int32 ``[B]``, the tokens of each; None means ``N``. Of more than ``N``, the last ``N`` count.

    Returns:
        ``center, spread``, fp32 ``[B, Hkv, D]``. The spread is at least 1/64 of the root mean square of the head's, and
        1 where all are 0, as those of one token or none.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_tensors(key=key)
    if key.dim() != 4 or key.shape[2] == 0 or not key.is_floating_point():
        raise ValueError(
            f"key has shape {tuple(key.shape)} of {key.dtype}, expected floats [batch, kv heads, tokens, dim]"
        )
    batch, _, tokens, _ = key.shape
    if lengths is None:
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
    check_tensor("lengths", lengths, (batch,), torch.int32, key.device, strided=True)
    count = lengths.clamp(0, tokens)
    is_token = (torch.arange(tokens, device=key.device) >= tokens - count[:, None])[:, None, :, None]
    divisor = count.clamp(min=1)[:, None, None]

    def mean(of: list[Tensor]) -> Tensor:
        return torch.stack(of).sum(0) / divisor

    parts = list(zip(key.split(TOKENS, 2), is_token.split(TOKENS, 2), strict=True))
    center = mean([torch.where(real, part.float(), 0.0).sum(2) for part, real in parts])
    spread = mean([torch.where(real, part.float() - center[:, :, None], 0.0).square().sum(2) for part, real in parts])
    spread = spread.sqrt()
    least = LEAST_SPREAD * spread.square().mean(2, keepdim=True).sqrt()
    spread = torch.maximum(spread, least)
    return center, torch.where(spread > 0, spread, 1.0)
