from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsetrain.modeling import load_model
from sparsetrain.training.output.costs import Costs
from sparsetrain.training.output.flops import model_flops_per_token, peak_flops


def counted_flops(layers: int, heads: int, head_dim: int, tokens: int) -> tuple[int, int]:
    """What torch counts for forward and backward of a stack of projections and full attention, and its parameters."""
    from torch.utils.flop_counter import FlopCounterMode

    hidden = heads * head_dim
    projections = torch.nn.ModuleList(torch.nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(layers))
    states = torch.randn(1, tokens, hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = states
        for projection in projections:
            query, key, value = projection(out).view(tokens, 3, heads, head_dim).permute(1, 2, 0, 3)
            weights = (query @ key.transpose(1, 2)).softmax(-1)
            out = (weights @ value).transpose(0, 1).reshape(1, tokens, hidden)
        out.sum().backward()
    return counter.get_total_flops(), sum(p.numel() for p in projections.parameters())


def test_a_token_costs_what_torch_counts():
    counted, num_params = counted_flops(layers=3, heads=4, head_dim=16, tokens=96)
    assert 96 * model_flops_per_token(num_params, 3, 4, 16, mean_visible_keys=96) == counted


def test_attention_costs_in_proportion_to_the_visible_keys():
    matrices = model_flops_per_token(1000, 2, 4, 8, 0)
    assert matrices == 6000
    sparse, dense = (model_flops_per_token(1000, 2, 4, 8, keys) - matrices for keys in (64, 512))
    assert dense == 8 * sparse > 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H200 NVL", "bfloat16", 835),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", "torch.bfloat16", 165.2),
    ],
)
def test_known_peaks(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AMD EPYC 9454", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
        ("NVIDIA RTX A1000", torch.bfloat16),
        ("NVIDIA H200", torch.float64),
    ],
)
def test_unknown_peaks_are_not_guessed(name, dtype):
    assert peak_flops(name, dtype) is None


def test_utilisation_has_two_conventions(tiny_recipe, world):
    """Half of the keys read is half of attention; matrices cost the same in both."""
    recipe = tiny_recipe()
    model, _ = load_model(recipe.model, recipe.attention, seed=0)
    costs = replace(Costs.of(model, recipe, world), peak_flops=1e12)
    found = costs.utilisation(1e5)
    dense = attended(recipe, 256)
    assert found["mfu_dense_equivalent"] - found["mfu"] == pytest.approx(dense * (1 - sum(costs.densities) / 2) / 1e7)


def attended(recipe, length):
    """FLOPs of full attention for one token of the tiny model, forward and backward."""
    shape = recipe.model.architecture
    return 3 * 4 * shape["num_hidden_layers"] * shape["hidden_size"] * (length + 1) / 2
