"""Hidden states of the last tokens by layer, and the linear classifiers that read them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE
from sparsetrain.patterns import FullPattern, Pattern

WIDTH = 512
"""Wider states are projected at random to so many numbers, which keeps their distances up to some percent."""
FOLDS = 4
"""Parts of the samples, each classified by what is fitted to the others."""
RIDGE = 0.1
"""The penalty of a classifier, over the mean square of its samples' norms."""


@contextmanager
def last_states(model: PreTrainedModel, ends: Tensor) -> Iterator[list[Tensor]]:
    """While open, a pass over a packed row adds for each decoder layer with attention its output at ``ends``.

    Args:
        ends: int64 ``[S]``, the last position of each document.

    Yields:
        By layer, fp32 ``[S, min(hidden, WIDTH)]``, each state divided by its root mean square.
    """
    found: list[Tensor] = []
    attention = {id(module) for _, module, _ in sparse_layers(model)}
    parents = [name.rpartition(".")[0] for name, module in model.named_modules() if id(module) in attention]

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states = hidden.reshape(-1, hidden.shape[-1])[ends].float()
        states = states / states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        found.append(_narrow(states))

    hooks = [model.get_submodule(name).register_forward_hook(keep) for name in parents]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(states: Tensor) -> Tensor:
    width = states.shape[1]
    if width <= WIDTH:
        return states
    projection = torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    return states @ projection.to(states.device)


def pack_states(states: Tensor) -> str:
    """States ``[L, d]`` as text: fp16 in base64."""
    return base64.b64encode(states.cpu().numpy().astype("<f2").tobytes()).decode("ascii")


def unpack_states(text: str, layers: int) -> np.ndarray:
    """What :func:`pack_states` was given, fp32 ``[layers, d]``."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32).reshape(layers, -1)


def accuracy(states: Tensor, labels: Tensor, classes: int, seed: int) -> Tensor:
    """The share of samples that a linear classifier names right which was fitted without them, fp64 ``[L]``.

    A ridge regression on the classes, in closed form, for each layer; each of :data:`FOLDS` parts of the samples is
    classified by what is fitted to the others.

    Args:
        states: fp32 ``[L, S, d]``.
        labels: int64 ``[S]``, each class a multiple of :data:`FOLDS` times.
        seed: of the parts.
    """
    samples = len(labels)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    # All parts have each class equally often: else what is rare among the others would be frequent in a part, and a
    # probe that knows nothing be worse than chance.
    order = order[labels[order].argsort(stable=True)]
    states, labels = states[:, order].double(), labels[order]
    wanted = torch.nn.functional.one_hot(labels, classes).double()
    right = torch.zeros(len(states), dtype=torch.float64)
    for first in range(FOLDS):
        part = torch.arange(first, samples, FOLDS)
        fitted = torch.ones(samples, dtype=torch.bool)
        fitted[part] = False
        mean = states[:, fitted].mean(1, keepdim=True)
        own, others = states[:, fitted] - mean, states[:, part] - mean
        gram = own @ own.mT
        penalty = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp_min(1e-9)
        target = wanted[fitted]
        solved = torch.linalg.solve(gram + penalty * torch.eye(len(target)).double(), target - target.mean(0))
        guess = (others @ own.mT @ solved + target.mean(0)).argmax(-1)
        right += (guess == labels[part]).sum(-1)
    return right / samples


def exact_field(model: PreTrainedModel, length: int) -> tuple[Pattern, np.ndarray] | None:
    """The blocks on which the last token depends after each layer that :func:`last_states` looks at, bool
    ``[L, blocks]``, and the pattern that they are of; None where layers choose keys by the text, keep a sliding window
    of their own, or mix tokens without attention."""
    plans = [getattr(module, PLAN_ATTRIBUTE) for _, module, _ in sparse_layers(model)]
    if any(plan.leaks_between_documents or (plan.method is None and plan.window is not None) for plan in plans):
        return None
    record: Any = model.config
    attention: MethodConfig = parse_attention(record.sparsetrain["attention"])
    text: Any = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    pattern = attention.pattern(heads)
    methods = [plan.method for plan in plans]
    if pattern is None and any(method is not None and not method.dense for method in methods):
        return None
    pattern = pattern or FullPattern(block=max(1, length // 64))
    dense = [index for index, method in enumerate(methods) if method is None or method.dense]
    return pattern, pattern.reach(-(-length // pattern.block), len(plans), dense)
