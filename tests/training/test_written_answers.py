"""An evaluation that generates, in a run whose ranks share the weights by ZeRO-3."""

from __future__ import annotations

import json

from sparsetrain.cli import main


def test_ranks_that_share_the_weights_write_what_one_writes(tmp_path, tiny, start):
    answers = [{"text": letter} for letter in "aeiou"]
    paragraph = {"context": "Any vowel will do.", "qas": [{"question": f"{n}?", "answers": answers} for n in range(3)]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    task = {"task": "ruler", "lengths": [1000], "tasks": ["qa_1", "fwe"], "samples": 3}
    task["squad"] = str(tmp_path / "squad.json")
    tasks = [
        task | {"questions": 2},
        {"task": "multi_turn", "lengths": [700], "samples": 3, "turns": 2, "keys": 2},
        {"task": "reasoning", "lengths": [700], "samples": 3, "kinds": ["two_facts", "bfs"], "bfs_depths": [1]},
    ]
    arguments = [f"eval={json.dumps({'at_start': True, 'at_end': False, 'tasks': tasks})}", "train.steps=2"]
    two = start(tmp_path / "two", *arguments, "deepspeed.stage=3", ranks=2)
    assert main(["run", str(tiny), *arguments, "--output", str(tmp_path / "one")]) == 0
    two.wait()
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert list(one) == list(two) == ["full attention, before", "power, before"]
    assert one == two
    found = one["power, before"]["tasks"]["ruler"]
    tallies = found["tallies"]["qa_1"]
    assert sum(each["right"] for each in tallies) > 0
    assert [each["asked"] for each in tallies] == [6]
    assert 0 < sum(each["written"] for each in tallies) <= 6 * 32
