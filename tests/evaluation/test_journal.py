"""An evaluation that was killed goes on with what it had measured, and gives the result of one that was not."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetrain.evaluation.fingerprint import weights_digest
from sparsetrain.evaluation.journal import Journal, digest
from sparsetrain.evaluation.result import other_inputs
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.passkey import PasskeySection
from sparsetrain.evaluation.tasks.perplexity import PerplexitySection
from sparsetrain.evaluation.tasks.recall import RecallSection
from sparsetrain.evaluation.tasks.ruler import RulerSection
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World

ALONE = World(0, 1, torch.device("cpu"))
ABOUT = {"model": "tiny", "attention": {"method": "full"}}


class Killed(BaseException):
    pass


@pytest.fixture
def evaluation(tiny_model, byte_tokenizer, tmp_path: Path):
    """Evaluates with a journal; ``kill`` ends it behind so many batches. Returns the result, progress and notes."""
    text = tmp_path / "held_out.txt"
    text.write_text("Ishmael. " + " ".join(f"It was {number} years ago." for number in range(99)))
    section = EvalSection(
        tasks=[
            PerplexitySection(lengths=[64, 256], source=DataSource(path=str(text)), tokens=1200),
            PasskeySection(lengths=[300, 320], depths=2, trials=1, digits=1),
            RecallSection(source={"synthetic": "recall", "keys": 3, "lengths": [2050]}, documents=3),
            RulerSection(lengths=[1900], samples=2, tasks=["vt"]),
        ]
    )

    def run(name="row", about=ABOUT, *, kill=None, fresh=False, journal=None):
        journal = journal or Journal.open(tmp_path / "samples", name, about, ALONE, fresh=fresh)
        seen = []

        def progress(done, total):
            seen.append((done, total))
            if kill is not None and len(seen) == kill:
                raise Killed

        result = evaluate(tiny_model, byte_tokenizer, section, ALONE, seed=3, on_progress=progress, journal=journal)
        return result, seen, journal.notes

    return run


def lines_of(folder: Path, rank: int = 0) -> list[str]:
    return (folder / f"samples/row.rank{rank}.jsonl").read_text().splitlines()


def test_what_was_measured_before_a_kill_is_not_measured_again(evaluation, tmp_path):
    whole, seen, notes = evaluation("whole")
    assert (seen[0], seen[-1], notes) == ((1, 18), (18, 18), [])
    for kill in (3, 4, 9):
        with pytest.raises(Killed):
            evaluation(kill=kill)
    # What is said first is what is there; so 3, 3 and 8 batches were measured.
    resumed, seen, notes = evaluation()
    assert resumed == whole
    assert seen == [(14, 18), (15, 18), (16, 18), (17, 18), (18, 18)]
    assert notes == [f"14 finished batches are taken from {tmp_path / 'samples'}"]
    assert evaluation()[:2] == (whole, [(18, 18)])


def test_a_torn_line_costs_its_batch_and_files_of_other_ranks_count(evaluation, tmp_path):
    whole, _, _ = evaluation()
    lines = lines_of(tmp_path)
    folder = tmp_path / "samples"
    (folder / "row.rank0.jsonl").write_text("\n".join([*lines[:6], lines[6][:-9]]))
    (folder / "row.rank1.jsonl").write_text("\n".join([lines[0], *lines[9:]]) + "\n")
    resumed, seen, _ = evaluation()
    assert (resumed, seen[0]) == (whole, (15, 18))
    assert evaluation()[1] == [(18, 18)], "what followed the torn line is a line of its own"


def test_results_tell_whether_their_inputs_were_the_same(tiny_model, byte_tokenizer):
    section = EvalSection(tasks=[PasskeySection(lengths=[300], depths=2, trials=1, digits=1)])
    measured = {
        label: evaluate(tiny_model, byte_tokenizer, section, ALONE, seed=seed).tasks["passkey"]
        for label, seed in {"one": 3, "again": 3, "reseeded": 4}.items()
    }
    said = "Other inputs than those of one (prompts, texts or tokens): reseeded. Compare numbers of equal inputs only."
    assert other_inputs(measured) == said
    measured["former"] = measured.pop("reseeded").model_copy(update={"inputs": ""})
    assert other_inputs(measured) == "", "files of before do not tell"


def test_labels_that_begin_or_read_alike_have_files_of_their_own(tmp_path):
    labels = ["power", "power/", "x" * 120 + "1", "x" * 120 + "2", "{a: 1}", "[a: 1]"]
    for label in labels:
        Journal.open(tmp_path, label, ABOUT, ALONE).add(("task", "settings", "batch"), label)
    assert len(list(tmp_path.iterdir())) == len(labels)


def test_records_of_something_else_are_not_used_and_that_is_said(evaluation, tmp_path):
    evaluation()
    other = {**ABOUT, "attention": {"method": "power"}, "decode": None}
    _, seen, notes = evaluation(about={**other, "decode": "twilight"})
    file = tmp_path / "samples/row.rank0.jsonl"
    assert (seen[0], notes) == ((1, 18), [f"{file} is not used: it is of other attention and decode"])
    assert evaluation(about={**other, "decode": "twilight"})[1] == [(18, 18)]
    assert evaluation(about={**other, "decode": "twilight"}, fresh=True)[1][0] == (1, 18)
    file.write_text("{")
    assert evaluation()[2] == [f"{file} is not used: it does not say what was evaluated"]


def test_changed_text_and_changed_settings_are_measured_anew(evaluation, tmp_path):
    evaluation()
    text = tmp_path / "held_out.txt"
    text.write_text(text.read_text().replace("Ishmael", "Isabell", 1))
    # The first window of 256 tokens, and the row of the first four of 64, have changed.
    assert evaluation()[1][0] == (16, 18)
    _, seen, _ = evaluation()
    assert seen == [(18, 18)]


def test_without_a_folder_to_write_to_the_evaluation_goes_on(evaluation, tmp_path):
    (tmp_path / "samples").write_text("in the way")
    said = []
    journal = Journal.open(tmp_path / "samples", "row", ABOUT, ALONE, say=said.append)
    assert evaluation(journal=journal)[1][-1] == (18, 18)
    (line,) = said
    assert line.startswith(f"{tmp_path / 'samples/row.rank0.jsonl'} cannot be written: ")
    assert line.endswith("; finished samples are not kept from here on")


@dataclass
class Sample:
    ids: np.ndarray
    answers: list[str]


def test_a_digest_is_of_the_content():
    def sample(**given):
        return Sample(**({"ids": np.arange(3), "answers": ["a", "bc"]} | given))

    assert digest([sample(), {"x": torch.arange(2)}]) == digest([sample(), {"x": torch.arange(2)}])
    others = [
        sample(),
        sample(ids=np.arange(3, dtype=np.int32)),
        sample(ids=np.arange(3)[None]),
        sample(ids=np.arange(1, 4)),
        sample(answers=["ab", "c"]),
        sample(answers=["a", ["bc"]]),
        sample(answers=None),
    ]
    assert len(set(map(digest, others))) == len(others)
    with pytest.raises(TypeError, match="no digest of a object"):
        digest([object()])


def test_a_digest_of_weights_tells_models_apart(tiny_model):
    tiny_model.register_buffer("flags", torch.tensor([True, False]))
    first = weights_digest(tiny_model, ALONE)
    assert weights_digest(copy.deepcopy(tiny_model), ALONE) == first
    changed = []
    for change in (
        lambda model: model.lm_head.weight.data[3, 4].mul_(-1),
        lambda model: model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0)),
        lambda model: model.flags.fill_(True),
        lambda model: model.to(torch.bfloat16),
        lambda model: sparsify(model, {"method": "sparsek", "topk": 8, "window": 4}),
    ):
        other = copy.deepcopy(tiny_model)
        change(other)
        changed.append(weights_digest(other, ALONE))
    assert len({first, *changed}) == 6


def test_a_record_is_what_json_gives_back(tmp_path):
    journal = Journal.open(tmp_path, "row", ABOUT, ALONE)
    part = journal.part("task", "{}")
    part.add("batch", {"loss": float("inf"), "sums": (0.1, 2)})
    assert part["batch"] == {"loss": float("inf"), "sums": [0.1, 2]}
    again = Journal.open(tmp_path, "row", ABOUT, ALONE)
    assert again.part("task", "{}")["batch"] == part["batch"]
    assert "batch" not in again.part("task", json.dumps({"samples": 3}))
