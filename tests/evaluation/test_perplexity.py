from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from sparsetrain.errors import DataError, RecipeError
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.perplexity import PerplexitySection
from sparsetrain.evaluation.text.perplexity import PerplexityResult
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World

ALONE = World(0, 1, torch.device("cpu"))
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. "


def section(path: Path, lengths: list[int], tokens: int, **settings) -> EvalSection:
    source = DataSource(path=str(path))
    return EvalSection(tasks=[PerplexitySection(lengths=lengths, source=source, tokens=tokens, **settings)])


def measured(model, tokenizer, path: Path, lengths: list[int], tokens: int, **settings) -> PerplexityResult:
    return evaluate(model, tokenizer, section(path, lengths, tokens, **settings), ALONE).tasks["perplexity"]


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


def losses_by_hand(model, ids: list[int]) -> torch.Tensor:
    """The loss of every token but the first of one window."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").double()


def sliding_by_hand(model, ids: list[int], length: int, stride: int) -> torch.Tensor:
    """The loss of every token but the first, each in the window that it is new in."""
    found = [losses_by_hand(model, ids[:length])]
    for stop in range(length + stride, len(ids) + stride, stride):
        window = ids[stop - length : stop]
        found.append(losses_by_hand(model, window)[length - stride - 1 :])
    return torch.cat(found)


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


@pytest.mark.parametrize(("stride", "tokens"), [(32, 512), (100, 300)])
def test_of_sliding_windows_only_new_tokens_are_scored(tiny_model, byte_tokenizer, text, stride, tokens):
    result = measured(tiny_model, byte_tokenizer, text, [128], tokens, stride=stride)
    ids = byte_tokenizer(text.read_text())["input_ids"][:tokens]
    assert result.losses[128].tokens == tokens - 1
    assert result.losses[128].mean() == pytest.approx(
        sliding_by_hand(tiny_model, ids, 128, stride).mean().item(), rel=1e-6
    )


def test_a_stride_of_a_whole_window_is_none(tiny_model, byte_tokenizer, text):
    whole, none = (measured(tiny_model, byte_tokenizer, text, [128], 500, stride=stride) for stride in (128, None))
    assert whole.losses == none.losses


def test_bos_precedes_every_window_and_is_one_of_its_tokens(tiny_model, byte_tokenizer, text):
    byte_tokenizer = copy.deepcopy(byte_tokenizer)
    byte_tokenizer.bos_token = "<eos>"
    result = measured(tiny_model, byte_tokenizer, text, [65], 256, bos=True)
    ids = byte_tokenizer(text.read_text())["input_ids"][:256]
    expected = torch.cat([losses_by_hand(tiny_model, [256, *ids[at : at + 64]]) for at in range(0, 256, 64)])
    assert result.losses[65].tokens == 256
    assert result.losses[65].mean() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_separate_documents_have_windows_of_their_own(tiny_model, byte_tokenizer, tmp_path):
    path = tmp_path / "documents.jsonl"
    texts = [TEXT[:70], TEXT[:30], TEXT[:60]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = measured(tiny_model, byte_tokenizer, path, [40], 163, documents="separate")
    documents = [[*byte_tokenizer(text)["input_ids"], 256] for text in texts]
    windows = [ids[at : at + 40] for ids in documents for at in range(0, len(ids), 40)]
    expected = torch.cat([losses_by_hand(tiny_model, window) for window in windows])
    assert result.losses[40].mean() == pytest.approx(expected.mean().item(), rel=1e-6)
    with pytest.raises(DataError, match=r"lengths: no document .* fills a window of 80; the longest has 71"):
        measured(tiny_model, byte_tokenizer, path, [40, 80], 163, documents="separate")


def test_only_completions_are_scored(tiny_model, byte_tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": TEXT[:50], "completion": TEXT[50:90]}) + "\n")
    result = measured(tiny_model, byte_tokenizer, path, [91], 91)
    ids = [*byte_tokenizer(TEXT[:90])["input_ids"], 256]
    assert result.losses[91].tokens == 41
    assert result.losses[91].mean() == pytest.approx(losses_by_hand(tiny_model, ids)[-41:].mean().item(), rel=1e-6)
    assert result.definition.targets_only


@pytest.mark.parametrize("spacing", ["log", "even"])
def test_losses_are_kept_by_position(tiny_model, byte_tokenizer, text, spacing):
    result = measured(tiny_model, byte_tokenizer, text, [32, 128], 512, positions=spacing, trailing=0.25)
    ids = byte_tokenizer(text.read_text())["input_ids"][:512]
    windows = torch.stack([losses_by_hand(tiny_model, ids[at : at + 128]) for at in range(0, 512, 128)])
    for bucket in result.positions:
        expected = windows[:, bucket.first - 1 : bucket.stop - 1]
        assert bucket.losses.tokens == expected.numel()
        assert bucket.losses.mean() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert sum(bucket.losses.tokens for bucket in result.positions) == 4 * 127
    assert [bucket.first for bucket in result.positions] == (
        [1, 2, 4, 8, 16, 32, 64] if spacing == "log" else [1, *range(8, 128, 8)]
    )
    assert (result.trailing_from, result.trailing.tokens) == (96, 4 * 32)
    assert result.trailing.mean() == pytest.approx(windows[:, 95:].mean().item(), rel=1e-6)
    assert result.metrics()["/trailing_loss"] == result.trailing.mean()
    assert result.metrics()["/position/64"] == result.positions[-1 if spacing == "log" else 8].losses.mean()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stride": 65}, r"stride: windows of 64 tokens would pass over tokens; give at most 64"),
        ({"stride": 64, "bos": True}, r"stride: windows of 64 tokens with BOS would pass over tokens; give at most 63"),
    ],
)
def test_strides_that_pass_over_tokens_are_refused(text, settings, said):
    ((field, fault),) = section(text, [64, 128], 512, **settings).tasks[0].faults()
    assert re.search(said, f"{field}: {fault}")


def test_a_tokenizer_without_bos_is_refused(tiny_model, byte_tokenizer, text):
    with pytest.raises(DataError, match=r"eval\.tasks\.perplexity\.bos: the tokenizer has no BOS token"):
        measured(tiny_model, byte_tokenizer, text, [64], 512, bos=True)


@pytest.mark.parametrize(
    ("name", "disjoint", "sliding"),
    [
        ("gutenberg/sherlock_holmes_pg1661.txt", {128: 4.0376, 512: 3.9728}, 3.9545),
        ("tinyshakespeare.txt", {512: 4.6380}, None),
    ],
)
def test_a_pretrained_model_has_its_known_perplexity(test_data, tmp_path, name, disjoint, sliding):
    folder = test_data / "models" / "stories260K_hf"
    model = sparsify(AutoModelForCausalLM.from_pretrained(folder), {"method": "full"})
    excerpt = tmp_path / "excerpt.txt"
    excerpt.write_text((test_data / "text" / name).read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = measured(model, tokenizer, excerpt, list(disjoint), 16384).losses
    assert {length: each.mean() for length, each in losses.items()} == pytest.approx(disjoint, abs=6e-5)
    if sliding is not None:
        losses = measured(model, tokenizer, excerpt, [512], 16384, stride=256).losses
        assert losses[512].mean() == pytest.approx(sliding, abs=6e-5)


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
