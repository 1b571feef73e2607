"""``sparsetrain.generate`` on a CUDA device: steps replayed from one graph write what eager ones write."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import sparsetrain
from sparsetrain.generation.observed import observing
from sparsetrain.inference.captured_step import CapturedStep
from sparsetrain.inference.fewer_kernels import ready_for_steps
from sparsetrain.modeling import SparseCache

from .test_generation_on_cuda import METHODS, PATTERNS, make_model, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW = 90
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": [7, 400], "pad_token_id": 0}
DECODES: dict[str, dict[str, Any]] = {
    "top-p": {"prune": {"p": 0.7}},
    "Quest": {"select": "quest", "candidates": 64},
    "top-p, used again": {"prune": {"p": 0.7}, "refresh": {"every": 4}},
    "top-k by similarity": {"refresh": {"every": 3, "keep": 0.25, "similarity": 0.8}},
}


def both(model: Any, lengths: tuple[int, ...], caches: Any = SparseCache, **settings: Any) -> list[torch.Tensor]:
    """What eager steps of transformers' loop write, and what captured steps do, with the same random numbers."""
    ids, mask = prompts(lengths)
    found = []
    for write in (type(model).generate, sparsetrain.generate):
        torch.manual_seed(5)
        cache = caches(model, max_length=400)
        found.append(
            write(
                model,
                ids,
                attention_mask=mask,
                past_key_values=cache,
                disable_compile=True,
                **{**SETTINGS, **settings},
            )
        )
    return found


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The number of replays."""
    counted = [0]
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        counted[0] += 1
        original(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return counted


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("lengths", [(300,), (300, 17, 290)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_are_those_of_eager_steps(method, lengths, do_sample, replays):
    want, got = both(make_model(method), lengths, do_sample=do_sample)
    assert got.tolist() == want.tolist()
    assert replays[0] == got.shape[1] - 300 - 2


@pytest.mark.parametrize("method", PATTERNS)
def test_pages_come_from_the_host_between_replays(method, replays):
    def offloaded(model: Any, max_length: int) -> SparseCache:
        return SparseCache(model, max_length=max_length, offload=True)

    want, got = both(make_model(method), (250, 17), offloaded, do_sample=False, eos_token_id=None, max_new_tokens=140)
    assert got.tolist() == want.tolist()
    assert replays[0] == 138


@pytest.mark.parametrize("decode", DECODES.values(), ids=DECODES)
def test_layers_that_choose_count_what_they_read(decode, replays):
    model = sparsetrain.set_decode(make_model("full").float(), {**decode, "recent": 8, "dense_layers": [0]})
    ids, mask = prompts((300, 17, 290))
    kept, texts = [], []
    for write in (type(model).generate, sparsetrain.generate):
        cache = SparseCache(model, max_length=400)
        with observing():
            out = write(
                model,
                ids,
                attention_mask=mask,
                past_key_values=cache,
                disable_compile=True,
                do_sample=False,
                **{**SETTINGS, "eos_token_id": None},
            )
        texts.append(out.tolist())
        kept.append(cache.layers[1].memory.observations())
    assert texts[0] == texts[1]
    assert replays[0] == NEW - 2
    # Of the first step and the 62nd, where eager steps count all and weigh the first and the 65th.
    assert kept[1]["kept"] == pytest.approx(kept[0]["kept"], abs=0.1)
    assert 0 < kept[1]["mass_min"] <= kept[1]["mass_mean"] <= 1 + 1e-6


@pytest.mark.parametrize("method", ["full", "power", "sparsek"])
def test_the_next_batch_uses_the_same_graph(method, replays):
    model = make_model(method)
    held = SparseCache(model, max_length=400)
    made = []
    for lengths in ((300, 17), (120, 290), (290, 300)):
        ids, mask = prompts(lengths)
        held.reset()
        found = [
            write(
                model,
                ids,
                attention_mask=mask,
                past_key_values=cache,
                disable_compile=True,
                do_sample=False,
                **SETTINGS,
            )
            for write, cache in (
                (type(model).generate, SparseCache(model, max_length=400)),
                (sparsetrain.generate, held),
            )
        ]
        assert found[0].tolist() == found[1].tolist()
        assert int(held.get_seq_length()) == found[1].shape[1] - 1
        assert held.layers[0].counted == found[1].shape[1] - 1
        made.append(held.captured)
    assert made[0] is made[1] is made[2]


def test_a_step_waits_for_its_flag_alone(monkeypatch):
    model, (ids, mask) = make_model("power"), prompts((300, 17))
    original = CapturedStep.run

    def run(step: CapturedStep) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return original(step)

    monkeypatch.setattr(CapturedStep, "run", run)
    cache = SparseCache(model, max_length=400)
    try:
        sparsetrain.generate(
            model, ids, attention_mask=mask, past_key_values=cache, do_sample=True, top_k=5, top_p=0.9, **SETTINGS
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_a_model_that_asks_the_device_in_every_step_runs_without_a_graph(do_sample, caplog, replays):
    model = make_model("power")
    model.model.norm.register_forward_hook(lambda module, args, out: out * (1 + 0 * float(out.sum().item())))
    with caplog.at_level(logging.WARNING):
        want, got = both(model, (300, 17), do_sample=do_sample)
    assert got.tolist() == want.tolist()
    assert replays[0] == 0
    assert "steps run one by one: a step of Qwen3ForCausalLM cannot be captured" in caplog.text
    # And the device is as before.
    want, got = both(make_model("power"), (300, 17), do_sample=do_sample)
    assert got.tolist() == want.tolist()
    assert replays[0] > 0


@pytest.mark.parametrize("method", ["power", "sparsek"])
@torch.no_grad()
def test_fewer_kernels_compute_the_same(method):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    model, plain, (ids, _) = make_model(method).bfloat16(), make_model(method).bfloat16(), prompts((300,))
    assert "rope, rms_norm, swiglu" in str(ready_for_steps(model))
    outputs = []
    for each in (plain, model):
        cache = SparseCache(each, max_length=400)
        logits = [each(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
        logits += [
            each(torch.full_like(ids[:, :1], token), past_key_values=cache, use_cache=True).logits
            for token in range(1, 9)
        ]
        outputs.append(torch.cat(logits, 1).float())
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert difference < 0.03
    want, got = both(model, (300, 17), do_sample=False)
    assert got.tolist() == want.tolist()
