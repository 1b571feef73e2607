from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from sparsetrain.evaluation.interval import wilson_interval
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.passkey import PasskeyResult
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult
from sparsetrain.evaluation.tasks.preference import PreferenceSection
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.world import World

PASSKEY = PasskeyResult(lengths=[512, 1024], depths=[0.0, 1.0], trials=4, digits=5, correct=[[4, 3], [1, 0]])


def test_json_gives_back_the_result():
    perplexity = PerplexityResult(perplexity={512: 7.25, 1024: math.inf}, tokens=4096)
    result = EvalResult(tasks={"perplexity": perplexity, "passkey": PASSKEY})
    assert EvalResult.model_validate_json(result.model_dump_json()) == result
    assert EvalResult.model_validate_json(EvalResult().model_dump_json()) == EvalResult()


def test_json_of_another_shape_is_refused():
    with pytest.raises(ValidationError):
        EvalResult.model_validate_json('{"ppl": {}}')


def test_shares_by_cell_length_and_prompt():
    assert PASSKEY.accuracy() == [[1.0, 0.75], [0.25, 0.0]]
    assert PASSKEY.by_length() == {512: 0.875, 1024: 0.125}
    assert PASSKEY.mean() == 0.5
    assert PASSKEY.interval() == wilson_interval(8, 16)


def test_metrics_are_flat():
    perplexity = PerplexityResult(perplexity={512: 7.25}, tokens=4096)
    assert EvalResult(tasks={"perplexity": perplexity, "passkey": PASSKEY}).metrics() == {
        "eval/perplexity/512": 7.25,
        "eval/passkey": 0.5,
        "eval/passkey/512": 0.875,
        "eval/passkey/1024": 0.125,
    }


@pytest.mark.parametrize(
    ("correct", "trials", "low", "high"),
    [(20, 20, 0.84, 1.0), (0, 20, 0.0, 0.16), (45, 50, 0.79, 0.96), (450, 500, 0.87, 0.92)],
)
def test_wilson_interval(correct, trials, low, high):
    assert wilson_interval(correct, trials) == pytest.approx((low, high), abs=0.006)


def test_a_first_result_of_another_kind_under_the_same_name_is_not_followed(tiny_model, byte_tokenizer, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "The sky is", "chosen": " blue.", "rejected": " a key."}\n')
    section = EvalSection(tasks=[PreferenceSection(source={"path": str(pairs)}, pairs=1, length=64)])
    alone = World(0, 1, torch.device("cpu"))
    first = EvalResult(tasks={"preference": PASSKEY})
    result = evaluate(tiny_model, byte_tokenizer, section, alone, first=first).tasks["preference"]
    assert result.first is None
