"""A run that ends within an evaluation goes on there: finished samples are kept."""

from __future__ import annotations

import json

import pytest

from sparsetrain.cli import main
from sparsetrain.evaluation.journal import Journal

TASKS = "tasks: [{task: passkey, lengths: [128], depths: 2, trials: 2, digits: 1}]"


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_in_its_last_evaluation_does_not_measure_twice(tmp_path, tiny, run_folder, monkeypatch):
    run = run_folder(tmp_path / "run")
    arguments = ["run", str(tiny), f"eval={{at_start: false, at_end: true, {TASKS}}}", "--output", str(run.path)]
    measured, killed, add = [], [], Journal.add

    def adding(self, key, record):
        if len(measured) == 3 and not killed:
            killed.append(True)
            raise Killed
        measured.append(key)
        add(self, key, record)

    monkeypatch.setattr(Journal, "add", adding)
    with pytest.raises(Killed):
        main(arguments)
    samples = run.path / "evaluation.samples"
    assert [file.name for file in samples.iterdir()] == ["power-after.rank0.jsonl"]
    assert main([*arguments, "--resume"]) == 0
    assert len(measured) == len(set(measured)) == 4
    assert not samples.exists()
    assert list(json.loads((run.path / "evaluation.json").read_text())) == ["power, after"]
