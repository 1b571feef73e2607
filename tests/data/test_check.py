"""``validate``, ``plan``, ``doctor`` and ``run`` refuse data that no run could start with, and load nothing for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from sparsetrain.cli import main
from sparsetrain.data.sources import open_source
from sparsetrain.doctor import run_checks
from sparsetrain.doctor.needs import check_recipe_data
from sparsetrain.recipe import load_recipe
from sparsetrain.source_section import DataSource

TURNS = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
RECIPE = """
model: {path: "sparsetrain:tiny", tokenizer: tokenizer}
attention: {method: full}
data: {sources: [{path: text.jsonl}]}
sequence: {length: 128}
train: {steps: 3, lr: 2e-5}
wandb: {mode: disabled}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, byte_tokenizer):
    """A recipe with a byte-level tokenizer, and files of every kind that is refused."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("tokenizer")
    for name, text in {
        "run.yaml": RECIPE,
        "text.jsonl": '{"text": "a line"}\n',
        "chat.jsonl": json.dumps({"messages": TURNS}) + "\n",
        "asked.jsonl": json.dumps({"messages": TURNS[:1]}) + "\n",
        "other.jsonl": '{"txt": "a line"}\n',
        "number.jsonl": '{"text": 3}\n',
        "broken.jsonl": '{"text": \n{"text": "a line"}\n',
        "list.jsonl": "null\n",
        "empty.jsonl": "",
        "table.csv": "text\na line\n",
        "cut.parquet": "PAR1",
        "mixed/a.txt": "a",
        "mixed/b.jsonl": "{}",
        "nothing/a.bin": "a",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    os.mkfifo("pipe.jsonl")
    datasets.Dataset.from_dict({"text": ["a line"]}).to_parquet("table.parquet")
    datasets.Dataset.from_dict({"text": [None]}).to_parquet("null.parquet")
    return tmp_path


def template(text):
    """Give the tokenizer of the recipe a chat template."""
    Path("tokenizer/chat_template.jinja").write_text(text)


REFUSED = [
    ("data.sources.0.path=gone.jsonl", "data.sources.0: data source 'gone.jsonl': gone.jsonl does not exist"),
    ("data.sources.0.path=gone.csv", "gone.csv does not exist"),
    ("data.sources.0.path=data/gone.CSV.gz", "data/gone.CSV.gz does not exist"),
    ("data.sources.0.path=gone/*.jsonl", "no file matches gone/*.jsonl"),
    ("data.sources.0.path=./nothing", "the folder ./nothing holds no .jsonl"),
    ("data.sources.0.path=mixed", "mixed mixes kinds of files"),
    ("data.sources.0.path=table.csv", "table.csv is of an unknown kind"),
    ("data.sources.0.path=pipe.jsonl", "pipe.jsonl is not a regular file"),
    ("data.sources.0.path=empty.jsonl", "is empty: empty.jsonl has no rows"),
    ("data.sources.0.path=broken.jsonl", "broken.jsonl:1: not valid JSON"),
    ("data.sources.0.path=broken.jsonl", "Fix the row, or set data.on_malformed=skip to train on the others"),
    (
        "eval.tasks.perplexity={lengths: [64], source: {path: null.parquet}}",
        "is null, not a string. Fix the row: an evaluation leaves",
    ),
    ("data.sources.0.path=list.jsonl", "list.jsonl:1: a JSON null, not an object"),
    ("data.sources.0.path=cut.parquet", "1 of 1 files are damaged: cut.parquet"),
    ("data.sources.0.path=null.parquet", "null.parquet, row 0: 'text' is null"),
    ("data.sources.0.path=number.jsonl", "number.jsonl:1: 'text' is of type int, not a string. Fix the row, or set"),
    ("data.sources.0.path=other.jsonl", "its columns 'txt' fit no known form (did you mean text_field: txt?)"),
    ("data.sources.0={path: text.jsonl, form: prompt_completion}", "needs a column 'prompt'"),
    ("data.sources.0.path=chat.jsonl", "holds chat messages, but the tokenizer has no chat template"),
    ("data.sources.0={path: text.jsonl, split: test}", "split belongs to Hub datasets"),
    ("data.sources.0={path: python-stdlib, split: test}", "python-stdlib has the splits train and validation"),
    ("data.sources.0={path: python-stdlib, subset: a}", "subset belongs to Hub datasets"),
    ("data.sources.0={synthetic: passkey, lengths: [32]}", "data.sources.0: a retrieval document of 32 tokens has no"),
    ("data.sources.0={synthetic: multikey, keys: 400}", "has names for 288 keys at most"),
    ("data.sources.0={synthetic: recall, keys: 60}", "a recall document of 128 tokens has no room"),
    (
        "eval.tasks.passkey={lengths: [4096, 64]}",
        "eval.tasks.passkey.lengths: a retrieval document of 64 tokens has no room",
    ),
    (
        "eval.tasks.recall={source: {synthetic: recall, lengths: [8]}}",
        "eval.tasks.recall.source: a recall document of 8 tokens",
    ),
    (
        "eval.tasks.perplexity={lengths: [64], source: {path: table.csv}}",
        "eval.tasks.perplexity.source: data source 'table.csv'",
    ),
    ("eval.tasks.perplexity={lengths: [64], source: {path: gone.txt}}", "gone.txt does not exist"),
    ("eval.tasks.perplexity={lengths: [64], source: {synthetic: passkey}}", "perplexity is measured on text"),
]


@pytest.mark.parametrize(("override", "said"), REFUSED)
def test_data_that_no_run_could_start_with_is_refused(override, said, folder, capsys):
    assert main(["recipe", "validate", "run.yaml", override]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert said in found


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{% for m in messages %}", "data.sources.0: the chat template cannot be compiled: line 1"),
        ("{{ 1 / 0 }}", "asked.jsonl:1: it has no assistant turn"),
        ("{{ raise_exception('roles must alternate') }}", "chat.jsonl:1: the chat template refuses it: roles must"),
    ],
)
def test_a_chat_template_that_fails_is_refused(broken, said, folder, capsys):
    template(broken)
    sources = "[{path: chat.jsonl}, {path: asked.jsonl}]"
    assert main(["recipe", "validate", "run.yaml", f"data.sources={sources}"]) == 2
    assert said in capsys.readouterr().err


def test_all_four_commands_refuse_the_same_and_name_every_fault(folder, capsys):
    overrides = ["data.sources=[{path: gone.jsonl}, {path: table.csv}]", "eval.tasks.passkey={lengths: [64]}"]
    for command in (["recipe", "validate"], ["plan"], ["run"]):
        assert main([*command, "run.yaml", *overrides]) == 2
        lines = capsys.readouterr().err.strip().splitlines()[-3:]
        assert [line.partition(":")[0].strip() for line in lines][1:] == [
            "data.sources.1",
            "eval.tasks.passkey.lengths",
        ]
        assert "error: data.sources.0: data source 'gone.jsonl'" in lines[0]
    (finding,) = (each for each in run_checks(load_recipe("run.yaml", overrides).recipe) if each.check == "data")
    assert finding.status == "fail"
    assert all(line.startswith(found) for line, found in zip(lines, ["", *finding.found.splitlines()[1:]]))


def test_what_lies_on_the_hub_is_named_and_passes(folder, capsys):
    overrides = ["data.sources=[{path: org/set}, {path: table.parquet}]", "model.tokenizer=org/model"]
    assert main(["recipe", "validate", "run.yaml", *overrides]) == 0
    unseen = capsys.readouterr().out.partition("; not checked: ")[2].strip()
    assert unseen == "the tokenizer of org/model, the Hub dataset org/set (there is no such file or folder here)"


@pytest.mark.parametrize("on_malformed", ["stop", "skip"])
def test_a_first_pair_that_does_not_fit_a_row_is_noted(folder, capsys, on_malformed):
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "a" * 200, "chosen": "b", "rejected": "c"}) + "\n")
    pairs = ["preference.loss=dpo", "data={sources: [{path: pairs.jsonl}], long_documents: drop}"]
    assert main(["recipe", "validate", "run.yaml", *pairs, f"data.on_malformed={on_malformed}"]) == 0
    told = "its first pair has 404 tokens, more than sequence.length=128, and is left out (data.long_documents=drop)"
    assert told in capsys.readouterr().err
    assert main(["recipe", "validate", "run.yaml", *pairs, "sequence.length=512"]) == 0
    assert "its first pair" not in capsys.readouterr().err


def test_malformed_rows_that_the_recipe_skips_pass(folder):
    for path in ("broken.jsonl", "number.jsonl", "null.parquet"):
        assert main(["recipe", "validate", "run.yaml", f"data.sources.0.path={path}", "data.on_malformed=skip"]) == 0


def test_what_a_template_writes_is_told_by_validate_and_doctor(folder, capsys):
    template("{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}")
    assert main(["recipe", "validate", "run.yaml", "data.sources.0.path=chat.jsonl"]) == 0
    assert "note: the chat template writes '<|end|>', which is not a token" in capsys.readouterr().err
    found = check_recipe_data(load_recipe("run.yaml", ["data.sources.0.path=chat.jsonl"]).recipe)
    assert [each.status for each in found] == ["ok", "warn", "warn"]


def test_local_data_is_looked_at_without_torch(folder):
    script = "import sys; from sparsetrain.cli import main; code = main(sys.argv[1:]); "
    script += "sys.exit(code or 9 * bool({'torch', 'datasets', 'deepspeed'} & set(sys.modules)))"
    arguments = [
        "recipe",
        "validate",
        "run.yaml",
        "model={path: sparsetrain:tiny}",
        "eval.tasks.passkey={lengths: [512]}",
    ]
    assert subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True).returncode == 0


def test_which_rows_go_through_the_chat_template(folder, byte_tokenizer, write_jsonl):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    rows = {
        "text": {"text": "a"},
        "pair": {"prompt": "a", "completion": "b"},
        "turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
        "alpaca": {"instruction": "a", "output": "b"},
        "chat": {"messages": TURNS},
    }
    sources = {name: DataSource(path=write_jsonl([row], f"{name}.jsonl")) for name, row in rows.items()}
    chats = {name for name, each in sources.items() if open_source(each, tokenizer, streaming=True).reader.chat}
    assert chats == {"turns", "alpaca", "chat"}
