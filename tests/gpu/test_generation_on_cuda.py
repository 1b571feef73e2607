"""Generation on a CUDA device reads what a pass without a cache reads, for every method, from 1K to 128K tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sparsetrain.modeling import SparseCache, sparsify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]
# As many scores are remembered as compete, so that thresholds are exact.
SPARSEK = {"method": "sparsek", "topk": 256, "window": 128, "sinks": 4, "score_buffer": 2**17}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "power": {"method": "power", "block": 128, "window": 3, "sinks": 1},
    "sliding": {"method": "sliding", "block": 128, "window": 3, "sinks": 1},
    "stride": {"method": "stride", "block": 128, "window": 2, "sinks": 1, "stride": 16},
    "dilated": {"method": "dilated", "block": 128, "window": 8, "dilation": 4},
    "longnet": {"method": "longnet", "block": 128},
    "base 4": {"method": "power", "block": 128, "window": 3, "sinks": 1, "base": 4},
    "by layer": {"method": "power", "block": 128, "window": 3, "sinks": 1, "split": "layers", "farthest": 512},
    "by head": {"method": "power", "block": 128, "window": 3, "sinks": 1, "split": "heads", "farthest": 512},
    "ruler": {"method": "ruler", "block": 128, "window": 3},
    "sparsek": SPARSEK,
    "sparsek, not normalised": {**SPARSEK, "normalize": False},
    "sparsek, scores of a layer": {**SPARSEK, "scores": "layer"},
}
STEPS = 8


def make_model(method: str) -> PreTrainedModel:
    """Two layers of a Qwen3 with heads for which there are kernels, fp32; full attention in bf16, where it is fused."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2**18,
        initializer_range=0.1,
    )
    dtype = torch.bfloat16 if method == "full" else torch.float32
    return sparsify(AutoModelForCausalLM.from_config(config, dtype=dtype).cuda().eval(), METHODS[method])


@pytest.mark.parametrize("tokens", [1024, 8192, 32_768, 131_072])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_cached_prompt_and_what_follows_equal_passes_without_a_cache(method: str, tokens: int) -> None:
    model = make_model(method)
    close = {"rtol": 0.0, "atol": 0.15 if method == "full" else 1e-3}
    ids = torch.randint(1, 512, (1, tokens), generator=torch.Generator().manual_seed(1)).cuda()

    def last(text: torch.Tensor, **options: Any) -> torch.Tensor:
        return model(text, use_cache=False, logits_to_keep=STEPS + 1, **options).logits

    prompt, rest = ids[:, :-STEPS], ids[:, -STEPS:]
    out = model(prompt, use_cache=True, logits_to_keep=1)
    steps = [out.logits]
    for token in rest.split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1).float(), last(ids).float(), **close)

    generated = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
    logits = last(generated)[:, :-1].float()
    chosen = logits.gather(2, generated[:, -STEPS:, None])[..., 0]
    assert (chosen >= logits.amax(-1) - 2 * close["atol"]).all()


def prompts(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of random tokens, padded on the left, and their mask."""
    generator, width = torch.Generator().manual_seed(1), max(lengths)
    ids = torch.randint(1, 512, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return (ids * mask).cuda(), mask.long().cuda()


PATTERNS = ("power", "stride", "dilated", "longnet", "by head", "ruler")
"""Methods whose keys may lie in host memory."""


def caches(model: PreTrainedModel, room: int, method: str) -> list[Any]:
    made = [DynamicCache(config=model.config), SparseCache(model, max_length=room)]
    return made + ([SparseCache(model, max_length=room, offload=True)] if method in PATTERNS else [])


@pytest.mark.parametrize("lengths", [(300,), (300, 17, 290)], ids=str)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_step_waits_for_nothing(method: str, lengths: tuple[int, ...]) -> None:
    model, (ids, mask) = make_model(method), prompts(lengths)
    for cache in caches(model, 400, method):
        seen, position = mask, mask.cumsum(1) - 1
        token = ids[:, -1:]
        model(ids, attention_mask=seen, position_ids=position.clamp_min(0), past_key_values=cache)
        try:
            for step in range(6):
                seen = torch.cat([seen, torch.ones_like(token)], 1)
                position = position[:, -1:] + 1
                # The first steps compile kernels.
                torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
                model(token, attention_mask=seen, position_ids=position, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lengths", [(300,), (300, 17, 290)], ids=str)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_generate_compiles_the_steps_of_a_sparse_cache_once(method: str, lengths: tuple[int, ...]) -> None:
    """By itself, with CUDA graphs, as generate does wherever a cache allows it."""
    from sparsetrain_kernels.block_pattern.triton.work import far_table

    model, (ids, mask) = make_model(method), prompts(lengths)
    settings: dict[str, Any] = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cache in caches(model, 400, method)[1:]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # What others made, each has to make outside of its graphs.
        far_table.cache_clear()
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        tolerance = 0.3 if method == "full" else 2e-3
        for row, length in enumerate(lengths):
            text = out[row : row + 1, ids.shape[1] - length :]
            logits = model(text, use_cache=False, logits_to_keep=91).logits[:, :-1].float()
            chosen = logits.gather(2, text[:, -90:, None])[..., 0]
            assert (chosen >= logits.amax(-1) - tolerance).all()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_captured_step_goes_on_as_the_text_grows(method: str) -> None:
    model, (ids, _) = make_model(method), prompts((340,))
    want = model(ids, use_cache=False).logits[:, 300:].float()
    cache = SparseCache(model, max_length=400)
    model(ids[:, :300], past_key_values=cache)
    token, position = ids[:, 300:301].clone(), torch.tensor([[300]], device="cuda")

    def step() -> torch.Tensor:
        return model(token, position_ids=position, past_key_values=cache).logits

    got, at = [], 300
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for at in range(300, 303):
            token.copy_(ids[:, at : at + 1])
            position.fill_(at)
            got.append(step().float())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for at in range(303, 340):
        token.copy_(ids[:, at : at + 1])
        position.fill_(at)
        graph.replay()
        got.append(logits.float().clone())
    atol = 0.15 if method == "full" else 1e-3
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0.0, atol=atol)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_training_gives_the_gradients_of_the_plain_path(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one, as rows are trained: scores then lie in memory as the projection leaves them."""
    from sparsetrain_kernels import backend

    model = make_model(method).train()
    ids = torch.randint(1, 512, (1, 2048), generator=torch.Generator().manual_seed(1)).cuda()

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]

    by_kernels = step()
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    for ours, plain in zip(by_kernels, step(), strict=True):
        scale = plain.abs().max()
        assert (ours - plain).abs().max() <= 2e-3 * scale
