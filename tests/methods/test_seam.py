"""What a method must have, and that every oracle agrees with what it judges."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
import torch
from torch import nn

from sparsetrain.methods.base import Method, MethodConfig, PassDocuments
from sparsetrain.methods.registry import METHODS, parse_attention
from sparsetrain.methods.static import StaticMethod

SMALL = {
    "full": {},
    "power": {"block": 8, "window": 2},
    "sliding": {"block": 8, "window": 2},
    "stride": {"block": 8, "window": 2, "stride": 3},
    "dilated": {"block": 8, "window": 2},
    "longnet": {"block": 8, "segments": [[2, 1], [8, 4]], "head_shift": True},
    "ruler": {"block": 8, "window": 2},
    "recycled": {"every": 8, "keep": 6, "sinks": 1, "recent": 2},
    "sparsek": {"topk": 6, "window": 8, "sinks": 1, "scorer": "random"},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_oracle_is_what_a_layer_answers(method):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 90, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    call = {"cu_seqlens": torch.tensor([0, 25, 90]).int(), "scale": 0.3, "softcap": None, "sink_logits": None}
    layer = nn.Module().eval()
    layer.layer_idx = 1
    built = parse_attention({"method": method, **SMALL[method]}).build(2)
    output = built.attend(layer, query, key, value, q_start=None, **call)
    rows, right = built.expected(layer, query, key, value, document=slice(25, 90), q_start=None, **call)
    assert rows.min() >= 25
    assert len(rows) >= 32
    assert right.dtype == torch.float64
    torch.testing.assert_close(output[:, :, rows].double(), right, rtol=1e-4, atol=1e-5)


VARIANTS = [(method, {}) for method in METHODS]
VARIANTS += [("power", {"base": 4}), ("power", {"split": "heads", "farthest": 8})]
VARIANTS += [("recycled", {"p": 0.6, "similarity": 0.9}), ("sparsek", {"topk": 90})]


@pytest.mark.parametrize(("method", "more"), VARIANTS)
def test_attention_over_the_keys_that_a_method_says_it_reads_is_what_a_layer_answers(method, more):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 90, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    call = {"cu_seqlens": torch.tensor([0, 90]).int(), "scale": 0.3, "softcap": None, "sink_logits": None}
    gate = {"gate": "straight"} if method == "sparsek" else {}  # the others also scale what is read
    layer = nn.Module().eval()
    layer.layer_idx = 1
    built = parse_attention({"method": method, **SMALL[method], **gate, **more}).build(2)
    if method == "recycled":
        plan = built.plan_pass(PassDocuments([0, 90], [20], ["text"]))
        call["segments"] = plan
    rows = torch.tensor([0, 5, 19, 20, 40, 43, 62, 89])
    read = built.keys_read(layer, query, key, value, rows=rows, **call)
    assert read.dtype == torch.bool
    assert read.shape in {(1, 8, 90), (2, 8, 90)}
    assert built.says_keys_read
    weights = (query[0, :, rows].unflatten(0, (2, 2)) @ key[0, :, None].mT * 0.3).masked_fill(
        ~read[:, None], float("-inf")
    )
    expected = (weights.softmax(-1) @ value[0, :, None]).flatten(0, 1)
    output = built.attend(layer, query, key, value, q_start=None, **call)
    torch.testing.assert_close(output[0, :, rows], expected, rtol=1e-4, atol=1e-5)


def test_a_config_without_costs_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="NoCosts defines a method but lacks build, costs"):

        class NoCosts(MethodConfig):
            method: Literal["none"] = "none"

            def pattern(self, num_kv_heads=1):
                return None


def test_a_method_without_an_oracle_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="NoOracle is a method but lacks expected"):

        class NoOracle(Method):
            def density(self, length):
                return 1.0

            attend = StaticMethod.attend


def test_costs_and_densities_of_every_method_load_no_torch():
    code = (
        "import sys\n"
        "from sparsetrain.methods.costs import LayerShape\n"
        "from sparsetrain.methods.registry import METHODS\n"
        "shape = LayerShape(64, 4, 2, 16, 4096, 4096, hopper=True)\n"
        "for config in METHODS.values():\n"
        "    assert config().costs(shape).backward_bytes > 0 and config().build(2).density(4096) > 0\n"
        "print([name for name in ('torch', 'transformers', 'sparsetrain.plan') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
