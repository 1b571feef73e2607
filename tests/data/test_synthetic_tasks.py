"""Retrieval documents: the right length, the key at its depth, loss on the answer alone, tokens equal to the text's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sparsetrain
from sparsetrain.data import multikey_prompt, passkey_prompt
from sparsetrain.data.batch import IGNORE
from sparsetrain.data.recall import Recall
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

TINY = Path(sparsetrain.__file__).parent / "assets/tiny"
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
        assert decode(tokenizer, prompt.input_ids[prompt.answer_start :]).strip() == prompt.key
        assert re.fullmatch(rf"\d{{{digits}}}", prompt.key)
        text = decode(tokenizer, prompt.input_ids[: prompt.answer_start])
        assert text.endswith("\nWhat is the pass key? The pass key is")
        assert f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n" in text
        assert text.count("Remember it") == 1


def test_of_many_keys_the_one_named_is_asked_for(gpt2):
    for seed in range(20):
        prompt = build("multikey", gpt2, 1500, 0.5, seed)
        text = decode(gpt2, prompt.input_ids[: prompt.answer_start])
        hidden = dict(re.findall(r"\nThe pass key of the (\w+ \w+) is (\d{5})\. Remember it\.", text))
        asked = re.search(r"\nWhat is the pass key of the (\w+ \w+)\? The pass key of the \1 is$", text)
        assert len(hidden) == 4
        assert hidden[asked[1]] == prompt.key == decode(gpt2, prompt.input_ids[prompt.answer_start :]).strip()


@pytest.mark.parametrize("task", ["passkey", "multikey"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_key_hides_at_its_depth(depth, task, gpt2):
    prompt = build(task, gpt2, 4000, depth, seed=1)
    noise_lines = r"(?:The grass[^\n]*\n)?"
    text = decode(gpt2, prompt.input_ids[: prompt.answer_start])
    assert re.match(rf"There (is|are) [^\n]*\n{noise_lines}", text)
    before, after = re.split(rf"\nThe pass key[^\n]* is {prompt.key}\. [^\n]*\n", text)
    words = [len(re.findall(r"grass|sky|sun|Here|There and", part)) for part in (before, after)]
    assert words[0] / sum(words) == pytest.approx(depth, abs=0.01)


def test_among_distractors_a_marked_key_is_asked_for(gpt2):
    depths = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompt = multikey_prompt(gpt2, 1500, 0.5, rng, digits=5, keys=3, distractors=12)
        text = decode(gpt2, prompt.input_ids[: prompt.answer_start])
        marked = dict(re.findall(r"\nImportant! The pass key of the (\w+ \w+) is (\d{5})\.(?=\n)", text))
        unmarked = dict(re.findall(r"\nThe pass key of the (\w+ \w+) is (\d{5})\.(?=\n)", text))
        asked = re.search(r"\nWhat is the pass key of the (\w+ \w+)\? The pass key of the \1 is$", text)
        assert (len(marked), len(unmarked)) == (3, 12)
        assert not marked.keys() & unmarked.keys()
        assert marked[asked[1]] == prompt.key == decode(gpt2, prompt.input_ids[prompt.answer_start :]).strip()
        depths += [text.index(name) / len(text) for name in unmarked]
    assert np.histogram(depths, bins=3, range=(0.1, 0.95))[0].min() > len(depths) / 5


def test_recall_asks_for_every_pair_once():
    """The definition of the task, read off documents of a vocabulary of which some tokens are special."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    seen = {"keys": set(), "values": set(), "filler": set()}
    for seed in range(60):
        length = 64 + seed
        tokens = Recall(tokenizer, keys=6).document(length, np.random.default_rng(seed))
        ids = tokens.input_ids.tolist()
        assert len(ids) == length
        assert tokens.targets == [(i, i + 1) for i in range(length - 11, length, 2)]
        asked = dict(zip(ids[-12::2], ids[-11::2]))
        assert len(asked) == 6
        places = [ids.index(key) for key in asked]
        assert all(ids[place + 1] == value for place, value in zip(places, asked.values()))
        assert max(places) + 1 < length // 2
        assert places != sorted(places)
        early = {i for place in places for i in (place, place + 1)}
        seen["keys"] |= set(asked)
        seen["values"] |= set(asked.values())
        seen["filler"] |= {ids[i] for i in range(length - 12) if i not in early}
    assert {name: len(kind) for name, kind in seen.items()} == dict.fromkeys(seen, 64)
    assert len(set().union(*seen.values(), tokenizer.all_special_ids)) == 3 * 64 + len(tokenizer.all_special_ids)


def test_the_pairs_of_recall_are_anywhere_in_the_first_half(tokenizer):
    task = Recall(tokenizer, keys=1)
    places = [
        ids.index(ids[-2]) for ids in (task.document(200, np.random.default_rng(i))[0].tolist() for i in range(900))
    ]
    assert np.histogram(places, bins=9, range=(0, 99))[0].min() > 60
    assert max(places) <= 98


def test_marked_pairs_of_recall_are_asked_for_and_no_others(tokenizer):
    plain, marked = Recall(tokenizer, keys=4), Recall(tokenizer, keys=4, distractors=9)
    keys = {key for i in range(99) for key in plain.document(128, np.random.default_rng(i)).input_ids[-8::2].tolist()}
    marks = set()
    for seed in range(40):
        ids = marked.document(128, np.random.default_rng(seed)).input_ids.tolist()
        asked = dict(zip(ids[-8::2], ids[-7::2]))
        pairs = {ids[i]: i for i in range(64) if ids[i] in keys}
        assert len(pairs) == 13
        assert asked.keys() < pairs.keys()
        assert all(ids[pairs[key] + 1] == value for key, value in asked.items())
        marks |= {ids[pairs[key] - 1] for key in asked}
        (mark,) = marks
        assert sum(token == mark for token in ids) == 4


@pytest.mark.parametrize("hint", ["question", "none"])
def test_recall_says_first_what_is_asked_for_or_not_before_the_end(tokenizer, hint):
    task, mark = Recall(tokenizer, keys=4, distractors=9, hint=hint), Recall(tokenizer, 1, 1)._mark
    for seed in range(40):
        ids = task.document(128, np.random.default_rng(seed)).input_ids.tolist()
        asked = dict(zip(ids[-8::2], ids[-7::2]))
        first = ids[1:8:2] if hint == "question" else []
        assert ids[0:8:2].count(mark) == ids.count(mark) == len(first)
        assert set(first) <= asked.keys()
        assert len(set(first)) == len(first)
        behind = 2 * len(first)
        assert all(ids[ids.index(key, behind) + 1] == value for key, value in asked.items())
        assert max(ids.index(key, behind) for key in asked) < 63


def test_a_hint_without_distractors_is_refused():
    with pytest.raises(ValueError, match="hint=none has no effect here: it belongs to synthetic: recall with"):
        DataSource(synthetic="recall", hint="none")


def test_recall_answers_without_the_pairs_are_guesses(tokenizer):
    """Values are drawn for each document: neither the key nor the earlier answers tell them."""
    documents = [Recall(tokenizer, keys=2).document(40, np.random.default_rng(i)).input_ids for i in range(4000)]
    asked = np.array([ids[-4:] for ids in documents])
    table = np.zeros((2, 256), dtype=int)
    np.add.at(table, (0, asked[:, 1]), 1)
    np.add.at(table, (1, asked[:, 3]), 1)
    assert (table > 0).sum(axis=1).tolist() == [64, 64]
    assert table.max() < 2 * 4000 / 64
    assert abs(np.corrcoef(asked[:, 0], asked[:, 1])[0, 1]) < 0.06
    assert abs(np.corrcoef(asked[:, 1], asked[:, 3])[0, 1]) < 0.06


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
    with pytest.raises(DataError, match=r"keys=4 and distractors=300: the multikey task has names for 288"):
        stream({"synthetic": "multikey", "distractors": 300}, length=4096)
    with pytest.raises(DataError, match=r"recall document of 64 tokens has no room for 20 pairs and 0 distractors"):
        stream({"synthetic": "recall", "keys": 20, "lengths": [64, 512]}, length=512)
    with pytest.raises(DataError, match=r"keys=60 and distractors=5: the recall task has 64 tokens for keys"):
        stream({"synthetic": "recall", "keys": 60, "distractors": 5}, length=512)
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(192)}, "0")))
    with pytest.raises(DataError, match="needs 193 ordinary tokens; this tokenizer has 192"):
        Recall(small, keys=1)


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


def test_recall_takes_loss_on_the_values_asked_for(stream):
    row = next(stream({"synthetic": "recall", "keys": 3}, length=64))
    assert np.nonzero(row.labels != IGNORE)[0].tolist() == [59, 61, 63]
    assert row.labels[[59, 61, 63]].tolist() == row.input_ids[[59, 61, 63]].tolist()


@pytest.mark.parametrize("task", [{"synthetic": "passkey"}, {"synthetic": "recall", "distractors": 2}])
def test_seeds_give_other_documents(task, stream):
    first, again, other = (next(stream(task, length=512, seed=seed)) for seed in (0, 0, 1))
    assert first.input_ids.tolist() == again.input_ids.tolist() != other.input_ids.tolist()


@pytest.mark.parametrize("task", ["multikey", "recall"])
def test_a_stream_goes_on_where_it_was_saved(task, stream):
    source = {"synthetic": task, "keys": 2, "distractors": 3, "lengths": [700, 900]}
    rows = stream(source, length=900, packing=False)
    for _ in range(3):
        next(rows)
    state = rows.state_dict()
    expected = [next(rows).input_ids.tolist() for _ in range(3)]
    again = stream(source, length=900, packing=False)
    again.load_state_dict(state)
    assert [next(again).input_ids.tolist() for _ in range(3)] == expected


def test_documents_of_runs_before_distractors_are_the_same(gpt2):
    """Streams are resumed by their count of documents, so what a seed gives must never change."""
    digest = hashlib.sha256()
    for seed in range(5):
        digest.update(build("passkey", gpt2, 700, 0.3, seed).input_ids.tobytes())
        digest.update(build("multikey", gpt2, 900, 0.3, seed).input_ids.tobytes())
    assert digest.hexdigest()[:16] == "9be5aa5662f0a893"
