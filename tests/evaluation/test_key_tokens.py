"""Key tokens are those that a long context makes likely, and the same ones for every model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from sparsetrain.data import passkey_prompt
from sparsetrain.errors import DataError, ModelError, RecipeError
from sparsetrain.evaluation.journal import digest
from sparsetrain.evaluation.report import print_results, read_results, write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.key_tokens import KeyTokens, KeyTokensSection
from sparsetrain.evaluation.text.key_tokens import Choice, KeyTokensResult, pack, unpack
from sparsetrain.inference.models import find_model
from sparsetrain.modeling import sparsify
from sparsetrain.randomness import generator
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text("".join(f"It was {number} years ago, and {number * 7} days. " for number in range(40)))
    return path


def task(path: Path, **settings) -> KeyTokensSection:
    given = {"lengths": [200], "tokens": 500, "short": 48, "stride": 16, "alpha": 0.05, "beta": -5.5} | settings
    return KeyTokensSection(source=DataSource(path=str(path)), **given)


def measured(model, tokenizer, section, **more) -> KeyTokensResult:
    return evaluate(model, tokenizer, EvalSection(tasks=[section]), ALONE, **more).tasks["key_tokens"]


def places(section, tokenizer, result, length) -> np.ndarray:
    """The places of the key tokens in the text."""
    scored = KeyTokens(section, tokenizer).windows["long"][length].scored
    return scored[unpack(result.chosen[length], len(scored))]


def nll(model, ids) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("stride", [16, 1])
def test_key_tokens_and_the_loss_on_them_are_those_of_the_definition(tiny_model, byte_tokenizer, text, stride):
    section = task(text, stride=stride, tokens=450)
    result = measured(tiny_model, byte_tokenizer, section)
    ids = byte_tokenizer(text.read_text())["input_ids"][:450]
    expected, losses, others = [], [], []
    for start in (0, 200, 400):
        window = ids[start : start + 200]
        long = nll(tiny_model, window)
        for place in range(48, len(window)):
            begin = (place - 48) // stride * stride
            short = nll(tiny_model, window[begin : place + 1])[-1]
            if short - long[place - 1] > 0.05 and long[place - 1] < 5.5:
                expected.append(start + place)
                losses.append(long[place - 1].item())
            else:
                others.append(long[place - 1].item())
    assert 10 < len(expected) < 200
    assert places(section, byte_tokenizer, result, 200).tolist() == expected
    assert result.metrics() == pytest.approx(
        {
            "/200": math.exp(np.mean(losses)),
            "/200/others": math.exp(np.mean(others)),
            "/200/share": len(losses) / (len(losses) + len(others)),
        },
        rel=1e-5,
    )
    assert result.score() == pytest.approx(-np.mean(losses), rel=1e-5)


@pytest.fixture(scope="module")
def retrieving():
    """The model that ships with the package, which finds a key in a few hundred tokens, and its tokenizer."""
    source = find_model("sparsetrain:tiny")
    return sparsify(source.load(None), {"method": "full"}), source.tokenizer


def test_a_key_that_was_said_early_is_the_key_token_and_shows_what_a_window_loses(retrieving, tmp_path):
    model, tokenizer = retrieving
    prompts = [passkey_prompt(tokenizer, 400, 0.1, generator(0, index), 5) for index in range(2)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input_ids": each.input_ids.tolist()}) + "\n" for each in prompts))
    section = task(path, lengths=[400], short=64, stride=64, alpha=2.0, beta=-2.0, documents="separate", tokens=801)
    dense = measured(model, tokenizer, section)
    found = places(section, tokenizer, dense, 400)
    starts = [0, 401]
    answers = [start + place for start, each in zip(starts, prompts) for place in range(each.answer_start, 400)]
    assert set(found) <= set(answers)
    assert len(found) >= 6
    assert dense.metrics()["/400"] < 1.1

    sparsify(model, {"method": "sliding", "block": 16, "window": 2, "sinks": 0})
    first = EvalResult(tasks={"key_tokens": dense})
    calls = []
    sliding = measured(
        model, tokenizer, section, first=first, on_progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 2), (2, 2)], "a short context is read only where key tokens are to be chosen"
    assert (sliding.chosen_by, sliding.key[400].tokens) == ("the first row", dense.key[400].tokens)
    assert sliding.inputs == dense.inputs
    assert sliding.metrics()["/400"] > 20
    difference, error = sliding.key[400].difference(dense.key[400])
    assert difference > 3 > error

    # Rows of another run, whose first row chose others, are not compared with this one's.
    other = measured(model, tokenizer, section.model_copy(update={"alpha": 1.0}))
    theirs = measured(
        model,
        tokenizer,
        section,
        first=EvalResult(tasks={"key_tokens": other.model_copy(update={"choice": dense.choice})}),
    )
    assert (theirs.chosen_by, theirs.key[400].tokens) == ("the first row", other.key[400].tokens)
    assert sliding.pairs_with(dense)
    assert not theirs.pairs_with(dense)

    console = Console(width=160, record=True)
    print_results({"full": first, "sliding": EvalResult(tasks={"key_tokens": sliding})}, console)
    printed = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert f"sliding {sliding.metrics()['/400']:#.4g} full" in printed
    scored = dense.definition.windows[400].scored
    assert f"full 400 64 to 127 {len(found)} {scored} {len(found) / scored:.2%}" in printed
    assert any(line.startswith(f"sliding {difference:+.4f} ± {error:.4f}") for line in printed)


def test_key_tokens_of_other_settings_or_another_text_are_not_taken(tiny_model, byte_tokenizer, text):
    first = EvalResult(tasks={"key_tokens": measured(tiny_model, byte_tokenizer, task(text))})
    for settings in ({"alpha": 0.1}, {"tokens": 480}, {"lengths": [220]}, {"stride": 8}):
        assert measured(tiny_model, byte_tokenizer, task(text, **settings), first=first).chosen_by == "itself"
    text.write_text(text.read_text().replace("days", "moon"))
    other = measured(tiny_model, byte_tokenizer, task(text), first=first)
    assert other.chosen_by == "itself"
    assert not other.pairs_with(first.tasks["key_tokens"])
    assert other.inputs != first.tasks["key_tokens"].inputs


def test_another_model_can_choose_them(tiny_model, byte_tokenizer, text, tmp_path):
    chooser = tmp_path / "chooser"
    tiny_model.save_pretrained(chooser)
    byte_tokenizer.save_pretrained(chooser)
    expected = measured(tiny_model, byte_tokenizer, task(text))
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(0.5)
    section = task(text, key_tokens_from=str(chooser))
    result = measured(tiny_model, byte_tokenizer, section)
    assert (result.chosen, result.chosen_by) == (expected.chosen, str(chooser))
    assert result.key[200].mean() != expected.key[200].mean()
    assert result.pairs_with(expected)
    asked = {batch: digest(part) for batch, (part, *_) in KeyTokens(section, byte_tokenizer).batches().items()}
    byte_tokenizer.save_pretrained(chooser)  # files of another time: what was finished is not of this model
    changed = {batch: digest(part) for batch, (part, *_) in KeyTokens(section, byte_tokenizer).batches().items()}
    assert [batch for batch in asked if asked[batch] != changed[batch]] == [batch for batch in asked if " by " in batch]
    again = measured(tiny_model, byte_tokenizer, section, first=EvalResult(tasks={"key_tokens": result}))
    assert (again.chosen_by, again.key) == ("the first row", result.key)

    with pytest.raises(ModelError, match=r"eval\.tasks\.key_tokens\.key_tokens_from='/nowhere'"):
        measured(tiny_model, byte_tokenizer, task(text, key_tokens_from="/nowhere"))
    with pytest.raises(DataError, match=r"key_tokens_from: sparsetrain:tiny has other tokens than the model"):
        measured(tiny_model, byte_tokenizer, task(text, key_tokens_from="sparsetrain:tiny"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"alpha": 50.0}, "no token gains more than 50 nats from the long context"),
        ({"beta": -1e-9}, "no token that gains more than 0.05 nats has a log-likelihood above -1e-09"),
    ],
)
def test_a_text_without_key_tokens_has_no_perplexity_of_them_and_says_why(
    tiny_model, byte_tokenizer, text, tmp_path, settings, why
):
    section = task(text, **settings)
    result = measured(tiny_model, byte_tokenizer, section)
    assert result.metrics().keys() == {"/200/others", "/200/share"}
    assert math.isnan(result.score())
    assert KeyTokensResult.drawing("key_tokens", {"full": result}, None) is None
    first = EvalResult(tasks={"key_tokens": result})
    later = measured(tiny_model, byte_tokenizer, section, first=first)
    assert later.chosen_by == "the first row"
    results = {"full": first, "later": EvalResult(tasks={"key_tokens": later})}

    console = Console(width=160, record=True)
    print_results(results, console)
    printed = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert {"full none itself", "later none full"} <= set(printed)
    assert [line for line in printed if why in line] == [f"full 200 48 to 63 0 356 0.00% {why}"]
    assert KeyTokensResult.report({"alone": later}).details["Key tokens"][1][0::6] == ["the first row", why]
    report = write_report(results, tmp_path, title="A run").read_text()
    assert f"| 0.00% | {why} |" in report
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert [written[label]["tasks"]["key_tokens"]["left_out"] for label in results] == [{"200": why}] * 2
    assert read_results(tmp_path) == results


def test_losses_that_are_no_numbers_have_no_key_tokens_for_that_reason():
    choice = Choice(short=48, stride=16, alpha=2.0, beta=-2.0)
    assert choice.none_because(np.full(3, np.nan), np.ones(3)) == "no loss is a number"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"lengths": [64, 200]},
            "lengths: a window of 64 tokens is no longer than short \\+ stride = 48 \\+ 16, so no ",
        ),
        ({"lengths": [200, 100, 200]}, r"lengths: has 200 2 times; each is measured once, so give it once"),
        ({"lengths": [600]}, r"tokens: 500 tokens hold no window of eval\.tasks\.key_tokens\.lengths=600"),
    ],
)
def test_windows_that_are_no_longer_than_the_short_context_are_refused(byte_tokenizer, text, settings, said):
    with pytest.raises(RecipeError, match=rf"eval\.tasks\.key_tokens\.{said}"):
        KeyTokens(task(text, **settings), byte_tokenizer)


def test_documents_that_are_no_longer_than_the_short_context_are_refused(byte_tokenizer, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": "short " * 5}) + "\n" for _ in range(20)))
    with pytest.raises(DataError, match=r"key_tokens\.lengths: no token of .* has 48 tokens of its window before it"):
        KeyTokens(task(path, documents="separate"), byte_tokenizer)


def test_marks_are_packed_and_unpacked():
    marks = np.random.default_rng(0).random(10_001) < 0.03
    assert (unpack(pack(marks), len(marks)) == marks).all()
    assert len(pack(marks)) < len(marks) / 20
    assert unpack(pack(marks[:0]), 0).tolist() == []
