"""The optimizer step of 16-bit weights without ZeRO, in which the host waits for the device once.

DeepSpeed's own asks the device about the gradient of each parameter, one after the other, and copies each by itself. A
large model does not feel that. A small one spends its time there, and several small runs that share a GPU wait for each
other at every question.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch


def wait_once(engine: Any) -> None:
    """Give an engine whose optimizer has 16-bit weights and no ZeRO the step of this module; others keep their own."""
    of_halves = _of_halves()
    if type(engine.optimizer) is of_halves.__base__:
        engine.optimizer.__class__ = of_halves


@cache
def _of_halves() -> type[Any]:
    """Made when it is wanted: importing DeepSpeed takes seconds."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    class HalfStep(FP16_UnfusedOptimizer):
        """DeepSpeed's optimizer with masters in fp32 beside 16-bit weights, stepping over all of them at once."""

        def step(self, closure: Any = None) -> bool:
            """A step; True if a gradient was not finite, and nothing was changed."""
            weights = [weight for group in self.fp16_groups for weight in group]
            masters = [master for group in self.fp32_groups for master in group]
            for weight, master in zip(weights, masters, strict=True):
                master.grad = torch.zeros_like(master) if weight.grad is None else torch.empty_like(master)
            given = [(w.grad, m.grad) for w, m in zip(weights, masters, strict=True) if w.grad is not None]
            gradients = [copy for _, copy in given]
            torch._foreach_copy_(gradients, [gradient for gradient, _ in given])
            norm = torch.nn.utils.get_total_norm(gradients).item()
            self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
            if not self.overflow:
                if (divisor := self.unscale_and_clip_grads(norm, apply_scale=False)) != 1.0:
                    torch._foreach_div_(gradients, divisor)
                self.optimizer.step()
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            self._update_scale(self.overflow)
            self.zero_grad(set_to_none=True)
            for master in masters:
                master.grad = None
            return self.overflow

    return HalfStep
