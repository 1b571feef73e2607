from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from sparsetrain.errors import DataError, RecipeError
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.perplexity import PerplexitySection
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World

ALONE = World(0, 1, torch.device("cpu"))
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. "


def section(path: Path, lengths: list[int], tokens: int) -> EvalSection:
    return EvalSection(tasks=[PerplexitySection(lengths=lengths, source=DataSource(path=str(path)), tokens=tokens)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(TEXT * 10)
    return path


def by_hand(model, ids: list[int], length: int) -> float:
    """One window at a time through transformers' own loss."""
    total, count = 0.0, 0
    for start in range(0, len(ids), length):
        window = torch.tensor([ids[start : start + length]])
        if window.shape[1] > 1:
            with torch.no_grad():
                loss = model(window, labels=window, use_cache=False).loss.item()
            total, count = total + loss * (window.shape[1] - 1), count + window.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize("lengths", [[64, 128, 512], [100, 511]], ids=["dividing", "with remainders of 12 and 1"])
def test_packed_windows_give_the_perplexity_of_single_windows(tiny_model, byte_tokenizer, text, lengths):
    result = evaluate(tiny_model, byte_tokenizer, section(text, lengths, 512), ALONE)
    ids = byte_tokenizer(text.read_text())["input_ids"][:512]
    assert result.tasks["perplexity"].perplexity == pytest.approx(
        {n: by_hand(tiny_model, ids, n) for n in lengths}, rel=1e-5
    )
    assert result.tasks["perplexity"].tokens == 512


def test_a_model_that_caps_its_logits_computes_them_itself(byte_tokenizer, text):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        sliding_window=4096,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = byte_tokenizer(text.read_text())["input_ids"][:256]
    expected = {n: by_hand(model, ids, n) for n in (64, 256)}
    sparsify(model, {"method": "full"})
    result = evaluate(model, byte_tokenizer, section(text, [64, 256], 256), ALONE)
    assert result.tasks["perplexity"].perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "nll_256", "nll_512"),
    [
        ("gutenberg/sherlock_holmes_pg1661.txt", 3.9946, 3.9728),
        ("tinyshakespeare.txt", 4.6746, 4.6380),
        ("wikitext-2/wiki.test.raw", 4.6957, 4.7463),
    ],
)
def test_a_pretrained_model_has_its_known_perplexity(test_data, tmp_path, name, nll_256, nll_512):
    folder = test_data / "models" / "stories260K_hf"
    model = sparsify(AutoModelForCausalLM.from_pretrained(folder), {"method": "full"})
    excerpt = tmp_path / "excerpt.txt"
    excerpt.write_text((test_data / "text" / name).read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = evaluate(model, tokenizer, section(excerpt, [256, 512], 16384), ALONE)
    assert math.log(result.tasks["perplexity"].perplexity[256]) == pytest.approx(nll_256, abs=6e-5)
    assert math.log(result.tasks["perplexity"].perplexity[512]) == pytest.approx(nll_512, abs=6e-5)


def test_the_mode_of_every_module_is_restored(tiny_model, byte_tokenizer, text):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    before = [module.training for module in tiny_model.modules()]
    seen = []
    tiny_model.model.layers[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    evaluate(tiny_model, byte_tokenizer, section(text, [64], 64), ALONE)
    assert seen == [False]
    assert [module.training for module in tiny_model.modules()] == before


def test_progress_counts_forward_passes(tiny_model, byte_tokenizer, text):
    calls = []
    evaluate(
        tiny_model,
        byte_tokenizer,
        section(text, [64, 256], 512),
        ALONE,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_window_longer_than_the_stream_is_refused(tiny_model, byte_tokenizer, text):
    with pytest.raises(RecipeError, match=r"eval\.tasks\.perplexity\.lengths: a window of 1024 .*tokens \(512\)"):
        evaluate(tiny_model, byte_tokenizer, section(text, [64, 1024], 512), ALONE)


def test_a_short_source_is_refused(tiny_model, byte_tokenizer, text):
    with pytest.raises(DataError, match="tokens"):
        evaluate(tiny_model, byte_tokenizer, section(text, [64], 65536), ALONE)
