from __future__ import annotations

import time

import torch

from sparsetrain.bench.measure import Unavailable, explain, median_ms

CPU = torch.device("cpu")


def test_the_first_call_is_not_counted():
    calls = []

    def call() -> None:
        time.sleep(0.3 if not calls else 0.002)
        calls.append(None)

    assert 2 <= median_ms(call, device=CPU, budget_ms=20) < 50
    assert len(calls) >= 4


def test_long_calls_are_repeated_only_a_few_times():
    calls = []
    median_ms(lambda: calls.append(time.sleep(0.02)), device=CPU, budget_ms=10)
    assert len(calls) == 4


def test_gradients_do_not_add_up():
    leaf = torch.ones(4, requires_grad=True)
    median_ms(lambda: torch.autograd.backward(leaf * 2, torch.ones(4)), device=CPU, budget_ms=1, gradients=[leaf])
    assert leaf.grad.tolist() == [2, 2, 2, 2]


def test_reasons_are_one_line():
    assert explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")) == "out of memory"
    assert explain(Unavailable("needs flash-attn-4")) == "needs flash-attn-4"
    assert explain(RuntimeError("\nfirst\nsecond")) == "RuntimeError: first"
    assert explain(ValueError("at 3:4:\n  x = y\n  ^\nno such type")) == "ValueError: at 3:4: no such type"
    assert explain(KeyError()) == "KeyError: no message"
    assert len(explain(RuntimeError("x" * 5000))) == 300
