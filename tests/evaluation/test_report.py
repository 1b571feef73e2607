from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.report import print_results, read_results, write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.tasks.passkey import PasskeyResult
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult

PASSKEY = PasskeyResult(lengths=[512, 1024], depths=[0.0, 1.0], trials=4, digits=5, correct=[[4, 3], [1, 0]])
RESULTS = {
    "before": EvalResult(
        tasks={
            "perplexity": PerplexityResult(perplexity={512: 12.3456, 1024: 45678.9}, tokens=65536),
            "passkey": PASSKEY,
        }
    ),
    "after": EvalResult(tasks={"perplexity": PerplexityResult(perplexity={512: 7.5, 2048: math.inf}, tokens=65536)}),
}

# As it was written before tasks had names.
FORMER = '{"after": {"perplexity": {"512": 7.5}, "perplexity_tokens": 64, "passkey": null, "recall": null}}'


def test_the_run_folder_gets_the_numbers_and_a_page(tmp_path):
    picture = tmp_path / "pictures" / "report.png"
    report = write_report(RESULTS, tmp_path, title="quickstart", pictures=[picture])
    assert read_results(tmp_path) == RESULTS
    lines = report.read_text().splitlines()
    assert lines[0] == "# quickstart"
    assert "|  | 512 | 1,024 | 2,048 |" in lines
    assert "| before | 12.35 | 45,679 | - |" in lines
    assert "| after | 7.500 | - | inf |" in lines
    assert "|  | 512 | 1,024 | all | 95 % interval |" in lines
    assert "| before | 88% | 12% | 50% | 28% to 72% |" in lines
    assert "| 100% | 75% | 0% |" in lines
    assert "![report](pictures/report.png)" in lines


@pytest.mark.parametrize(
    "content", ["", '{"after": {"perp', "[]", "null", '{"after": {"tasks": {"perplexity": 3}}}', FORMER]
)
def test_a_file_that_holds_no_results_is_named(tmp_path, content):
    assert read_results(tmp_path) == {}
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"evaluation\.json does not hold the results"):
        read_results(tmp_path)


def test_results_of_other_inputs_are_named_where_results_are_told(tmp_path):
    passkeys = {"before": "a", "after": "a", "later": "b"}
    measured = {
        label: EvalResult(tasks={"passkey": PASSKEY.model_copy(update={"inputs": inputs})})
        for label, inputs in passkeys.items()
    }
    said = "Other inputs than those of before (prompts, texts or tokens): later. Compare numbers of equal inputs only."
    console = Console(file=io.StringIO(), width=120)
    print_results(measured, console)
    assert console.file.getvalue().count(said) == 1
    assert said in write_report(measured, tmp_path, title="quickstart").read_text()
    assert read_results(tmp_path) == measured


def test_tables_are_printed():
    console = Console(file=io.StringIO(), width=120)
    print_results(RESULTS, console)
    printed = console.file.getvalue()
    assert "Perplexity by context length" in printed
    assert "45,679" in printed
    assert "28% to 72%" in printed
    assert printed.count("before") == 3
    assert printed.count("after") == 1


def test_nothing_measured_prints_nothing():
    console = Console(file=io.StringIO())
    print_results({"before": EvalResult()}, console)
    assert console.file.getvalue() == ""
