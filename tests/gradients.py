"""Losses and gradients of two ways to compute the same, and their comparison."""

from __future__ import annotations


def loss_and_gradients(model, loss):
    """After a backward pass of ``loss``: it and the gradient of each parameter that has one, by name."""
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, wanted):
    """Up to rounding, each tensor as a whole."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = ((found[name] - tensor).norm() / tensor.norm()).item()
        assert error < 1e-5, f"{name}: {error}"
