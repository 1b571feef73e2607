"""Retrieval documents: the right length, the key at its depth, loss on the answer alone, tokens equal to the text's."""

from __future__ import annotations

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from sparsetrain.data import multikey_prompt, passkey_prompt
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import DataError

TOKENIZERS = ["gpt2", "mistral", "stories"]


@pytest.fixture(scope="session")
def stories(test_data):
    """512 tokens: most words are several."""
    return AutoTokenizer.from_pretrained(test_data / "models/stories260K_hf")


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def build(task, tokenizer, length, depth, seed, digits=5):
    rng = np.random.default_rng(seed)
    if task == "passkey":
        return passkey_prompt(tokenizer, length, depth, rng, digits)
    return multikey_prompt(tokenizer, length, depth, rng, digits, keys=4)


@pytest.mark.parametrize("task", ["passkey", "multikey"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_documents_have_the_length_and_the_tokens_of_their_text(name, task, request):
    tokenizer = request.getfixturevalue(name)
    rng = np.random.default_rng(0)
    for trial in range(40):
        length = int(rng.integers(450, 3000))
        prompt = build(task, tokenizer, length, trial % 5 / 4, seed=trial)
        assert length - 8 < len(prompt.input_ids) <= length
        text = decode(tokenizer, prompt.input_ids)
        assert tokenizer(text, verbose=False)["input_ids"] == prompt.input_ids.tolist()


@pytest.mark.parametrize("name", ["tokenizer", *TOKENIZERS])
@pytest.mark.parametrize("digits", [1, 5, 12])
def test_the_answer_is_the_key_of_the_prompt(name, digits, request):
    tokenizer = request.getfixturevalue(name)
    for seed in range(10):
        prompt = build("passkey", tokenizer, 2000, seed / 9, seed, digits)
        assert decode(tokenizer, prompt.answer_ids).strip() == prompt.key
        assert re.fullmatch(rf"\d{{{digits}}}", prompt.key)
        text = decode(tokenizer, prompt.prompt_ids)
        assert text.endswith("\nWhat is the pass key? The pass key is")
        assert f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n" in text
        assert text.count("Remember it") == 1


def test_of_many_keys_the_one_named_is_asked_for(gpt2):
    for seed in range(20):
        prompt = build("multikey", gpt2, 1500, 0.5, seed)
        text = decode(gpt2, prompt.prompt_ids)
        hidden = dict(re.findall(r"\nThe pass key of the (\w+ \w+) is (\d{5})\. Remember it\.", text))
        asked = re.search(r"\nWhat is the pass key of the (\w+ \w+)\? The pass key of the \1 is$", text)
        assert len(hidden) == 4
        assert hidden[asked[1]] == prompt.key == decode(gpt2, prompt.answer_ids).strip()


@pytest.mark.parametrize("task", ["passkey", "multikey"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_key_hides_at_its_depth(depth, task, gpt2):
    prompt = build(task, gpt2, 4000, depth, seed=1)
    noise_lines = r"(?:The grass[^\n]*\n)?"
    text = decode(gpt2, prompt.prompt_ids)
    assert re.match(rf"There (is|are) [^\n]*\n{noise_lines}", text)
    before, after = re.split(rf"\nThe pass key[^\n]* is {prompt.key}\. [^\n]*\n", text)
    words = [len(re.findall(r"grass|sky|sun|Here|There and", part)) for part in (before, after)]
    assert words[0] / sum(words) == pytest.approx(depth, abs=0.01)


def test_a_prompt_is_a_function_of_its_generator(gpt2):
    first, again, other = (build("multikey", gpt2, 900, 0.3, seed).input_ids.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_length_hardly_costs_time(gpt2):
    assert len(build("passkey", gpt2, 1_000_000, 0.5, seed=0).input_ids) > 999_990


def test_documents_too_short_for_the_task_are_refused(gpt2, stream):
    with pytest.raises(DataError, match=r"50 tokens has no room: with this tokenizer the task alone takes \d+ tokens"):
        passkey_prompt(gpt2, 50, 0.5, np.random.default_rng(0))
    with pytest.raises(DataError, match="no room"):
        stream({"synthetic": "passkey", "lengths": [50, 500]}, length=512)
    with pytest.raises(DataError, match=r"keys=300: the multikey task has names for 288"):
        stream({"synthetic": "multikey", "keys": 300}, length=4096)


def test_documents_longer_than_a_row_are_refused(stream):
    with pytest.raises(DataError, match=r"documents of 800 tokens, longer than sequence\.length=512"):
        stream({"synthetic": "passkey", "lengths": [400, 800]}, length=512)


def test_training_takes_loss_on_the_answer_alone(gpt2, stream):
    rows = stream({"synthetic": "passkey", "digits": 4}, tokenizer=gpt2, length=256)
    for _ in range(10):
        row = next(rows)
        assert 250 < len(row.input_ids) <= 256
        (places,) = np.nonzero(row.labels != IGNORE)
        assert places.tolist() == list(range(places[0], len(row.input_ids)))
        assert re.fullmatch(r" \d{4}", decode(gpt2, row.labels[places]))


def test_training_draws_lengths_and_depths_uniformly(stream, tokenizer):
    rows = stream({"synthetic": "passkey", "lengths": [500, 700, 900]}, packing=False, length=900)
    taken = [next(rows) for _ in range(300)]
    lengths = [min((500, 700, 900), key=lambda length: abs(length - len(row.input_ids))) for row in taken]
    assert all(80 <= lengths.count(length) <= 120 for length in (500, 700, 900))
    depths = [
        decode(tokenizer, row.input_ids).index("Remember") / len(row.input_ids)
        for row in taken
        if len(row.input_ids) > 880
    ]
    assert np.histogram(depths, bins=3, range=(0.18, 0.85))[0].min() > len(depths) / 5


def test_seeds_give_other_documents(stream):
    first, again, other = (next(stream({"synthetic": "passkey"}, length=512, seed=seed)) for seed in (0, 0, 1))
    assert first.input_ids.tolist() == again.input_ids.tolist() != other.input_ids.tolist()
