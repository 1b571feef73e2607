"""Answers of a synthetic task: counted as greedy decoding would, the same for every model and any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch

from sparsetrain.data import build_rows, collate
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import DataError, RecipeError
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.recall import Recall, RecallSection
from sparsetrain.modeling import sparsify
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.schema import DataSection, EvalSection, SequenceSection
from sparsetrain.world import World

ALONE = World(0, 1, torch.device("cpu"))
TASK = {"synthetic": "recall", "keys": 3, "lengths": [40, 56]}
SECTION = RecallSection(source=TASK, documents=9)


def rows_of(recall: Recall):
    return [row for questions in recall.passes for row in questions.rows]


def learn_answers(model, rows) -> None:
    """Fit the output projection to the answers of a few documents, by heart."""
    batch = collate(rows)
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    with torch.no_grad():
        inputs = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens, "use_cache": False}
        hidden = model.model(batch.input_ids, **inputs).last_hidden_state[0, positions]
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-1)
    for _ in range(100):
        torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.labels[0, positions + 1]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("attention", [{"method": "full"}, {"method": "sparsek", "topk": 8, "window": 4, "sinks": 0}])
def test_counts_answers_and_loss_as_one_document_at_a_time_does(tiny_model, byte_tokenizer, attention):
    sparsify(tiny_model, attention)
    rows = rows_of(Recall(SECTION, byte_tokenizer, seed=3))
    learn_answers(tiny_model, rows[::2])
    right, nll = [], []
    for row in rows:
        ids, labels = torch.from_numpy(row.input_ids)[None], torch.from_numpy(row.labels)
        with torch.no_grad():
            logp = tiny_model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        for place in (labels != IGNORE).nonzero()[:, 0].tolist():
            right.append(int(logp[place - 1].argmax()) == int(labels[place]))
            nll.append(-float(logp[place - 1, labels[place]]))

    result = evaluate(tiny_model, byte_tokenizer, EvalSection(tasks=[SECTION]), ALONE, seed=3)
    recall = result.tasks["recall"]
    assert (recall.answers, recall.correct) == (27, sum(right))
    assert 10 < sum(right) < 27, "the comparison needs right and wrong answers"
    assert recall.loss == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert result.metrics() == {"eval/recall": sum(right) / 27, "eval/recall_loss": recall.loss}
    low, high = recall.interval()
    assert low < recall.accuracy() < high


def test_an_answer_of_many_tokens_is_right_as_a_whole(tiny_model, byte_tokenizer):
    source = {"synthetic": "multikey", "keys": 1, "distractors": 2, "digits": 4, "lengths": [600]}
    section = RecallSection(source=source, documents=2)
    recall = Recall(section, byte_tokenizer, seed=0)
    learn_answers(tiny_model, rows_of(recall))
    with torch.no_grad():
        result = recall.measure(tiny_model, ALONE, lambda: None)
        assert (result.answers, result.correct) == (2, 2)
        rows_of(recall)[1].labels[-2] ^= 1
        assert recall.measure(tiny_model, ALONE, lambda: None).correct == 1


def test_documents_repeat_with_the_seed_and_are_not_those_of_training(byte_tokenizer):
    first, again, other = (
        [row.input_ids.tolist() for row in rows_of(Recall(SECTION, byte_tokenizer, seed))] for seed in (1, 1, 2)
    )
    assert first == again
    assert [len(row) for row in first] == [40, 56] * 4 + [40]
    assert not {tuple(row) for row in first} & {tuple(row) for row in other}
    stream = build_rows(DataSection(sources=[TASK]), SequenceSection(length=56, packing=False), byte_tokenizer, 1)
    trained = {tuple(next(stream).input_ids.tolist()) for _ in range(50)}
    assert not trained & {tuple(row) for row in first}


@pytest.mark.parametrize("documents", [1, 9, 200])
def test_ranks_share_the_passes_equally(byte_tokenizer, documents):
    recall = Recall(RecallSection(source=TASK, documents=documents), byte_tokenizer, seed=0)
    assert recall.num_answers == 3 * documents
    assert len(recall.passes) == math.ceil(documents / (4096 // 56))
    assert recall.num_forwards(2) * 2 >= len(recall.passes)


def test_a_source_without_a_task_or_room_is_refused(byte_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"eval\.tasks\.recall\.source: a recall document of 12 tokens has no room"):
        Recall(RecallSection(source=TASK | {"lengths": [12]}), byte_tokenizer, seed=0)
    for source in ({"synthetic": "recall"}, {"path": "python-stdlib"}):
        (tmp_path / "recipe.yaml").write_text(
            f"base: quickstart\neval: {{tasks: [{{task: recall, source: {source}}}]}}\n"
        )
        with pytest.raises(RecipeError, match=r"give synthetic \(passkey, multikey or recall\) and its lengths"):
            load_recipe(tmp_path / "recipe.yaml")


def test_recall_alone_is_worth_an_evaluation(tmp_path):
    evaluation = f"{{every: 5, tasks: [{{task: recall, source: {TASK}}}]}}"
    (tmp_path / "recipe.yaml").write_text(f"base: quickstart\neval: {evaluation}\n")
    assert not load_recipe(tmp_path / "recipe.yaml").recipe.eval.empty
    (tmp_path / "recipe.yaml").write_text("base: quickstart\neval: {every: 5, tasks: []}\n")
    with pytest.raises(RecipeError, match=r"nothing would be measured: give eval\.tasks"):
        load_recipe(tmp_path / "recipe.yaml")
