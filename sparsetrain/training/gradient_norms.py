"""The norm of the gradient by part of the model, at any ZeRO stage."""

from __future__ import annotations

import re
from typing import Any

import torch

LAYER = re.compile(r".*\.(?:layers|h|blocks?)\.\d+\.(\w+)\.")


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to: of a layer its modules (``self_attn``, ``mlp``,
    ``input_layernorm``), the same in all layers; elsewhere the module's name (``embed_tokens``, ``norm``, ``lm_head``).
    """
    inside = LAYER.match(name)
    return inside[1] if inside is not None else name.split(".")[-2]


def gradient_norms(engine: Any) -> dict[str, float]:
    """``grad_norm/PART`` of the whole gradient of a step, before clipping; called on every rank between the last
    backward pass and the step.

    Under ZeRO all ranks gather each parameter's gradient in turn, which takes the time of another reduction.
    """
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and (gradient := safe_get_full_grad(parameter)) is not None:
            part = part_of(name)
            square = gradient.float().square().sum()
            squares[part] = squares[part] + square if part in squares else square
    parts = sorted(squares)
    norms = torch.stack([squares[part] for part in parts]).sqrt().tolist() if parts else []
    return {f"grad_norm/{part}": norm for part, norm in zip(parts, norms)}
