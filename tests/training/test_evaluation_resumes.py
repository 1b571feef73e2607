"""A run that ends within an evaluation goes on there: finished samples are kept."""

from __future__ import annotations

import json

import pytest

from sparsetrain.cli import main
from sparsetrain.evaluation.journal import Journal

TASKS = "tasks: [{task: passkey, lengths: [128], depths: 2, trials: 2, digits: 1}]"


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_in_evaluations_does_not_measure_twice(tmp_path, tiny, run_folder, monkeypatch):
    run = run_folder(tmp_path / "run")
    arguments = ["run", str(tiny), f"eval={{at_end: true, {TASKS}}}", "train.steps=2", "--output", str(run.path)]
    measured, killed, add = [], [], Journal.add

    def adding(self, key, record):
        # In the second evaluation, of the model with its method before training, and in the last.
        if len(measured) in {6, 11} - {*killed}:
            killed.append(len(measured))
            raise Killed
        measured.append(key)
        add(self, key, record)

    monkeypatch.setattr(Journal, "add", adding)
    for _ in range(2):
        with pytest.raises(Killed):
            main([*arguments, "--resume"])
    samples = run.path / "evaluation.samples"
    names = ["full-attention-before.rank0.jsonl", "power-after.rank0.jsonl", "power-before.rank0.jsonl"]
    assert sorted(file.name for file in samples.iterdir()) == names
    assert main([*arguments, "--resume"]) == 0
    assert len(measured) == 12
    assert not samples.exists()
    assert list(json.loads((run.path / "evaluation.json").read_text())) == [
        "full attention, before",
        "power, before",
        "power, after",
    ]
