from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from sparsetrain import __version__
from sparsetrain.cli import main, script
from sparsetrain.cli.foreign_warnings import NEEDLESS
from sparsetrain.recipe import load_recipe, shipped_recipes

RECIPE = """\
# A recipe of the tests.
model: {path: some/model}
attention: {method: power, block: 16, window: 3}
data: {sources: [{path: corpus.jsonl}]}
sequence: {length: 128}
train: {steps: 30, lr: 2e-5, global_batch_sequences: 4}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RECIPE)
    Path("corpus.jsonl").write_text('{"text": "a line"}\n')
    return "run.yaml"


@pytest.fixture
def call(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_version(call):
    assert call("--version") == (0, f"sparsetrain {__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "eval", "doctor", "recipe show", "recipe copy", "recipe validate"])
def test_help_shows_examples(call, command):
    code, out, _ = call(*command.split(), "--help")
    assert code == 0
    assert f"sparsetrain {command}" in out


@pytest.mark.parametrize("command", ["generate", "bench decode"])
def test_help_fills_the_terminal(command):
    """Paragraphs do not keep the line ends of their source, and examples do."""
    called = [sys.executable, "-m", "sparsetrain.cli", *command.split(), "--help"]
    out = subprocess.run(
        called, env={**os.environ, "COLUMNS": "800"}, capture_output=True, text=True, check=True
    ).stdout
    prose, _, examples = out.partition("Examples:")
    lines = [line.strip() for line in prose.splitlines()]
    assert not any(line and after for line, after in pairwise(lines))
    assert examples.count(f"  sparsetrain {command} ") > 1


def test_list_names_every_shipped_recipe(call):
    code, out, _ = call("recipe", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())


def test_show_prints_a_recipe_that_loads(call, recipe):
    for extra in ([], ["--explain"]):
        code, out, err = call("recipe", "show", recipe, "train.lr=1e-4", *extra)
        assert (code, err) == (0, "")
        Path("shown.yaml").write_text(out)
        assert load_recipe("shown.yaml").recipe == load_recipe(recipe, ["train.lr=1e-4"]).recipe


def test_copy_keeps_comments_and_never_overwrites(call, recipe):
    assert call("recipe", "copy", "qwen3-0.6b-power-32k", "mine.yaml")[0] == 0
    shipped, mine = shipped_recipes()["qwen3-0.6b-power-32k"].read_text(), Path("mine.yaml").read_text()
    assert "#   deepspeed launch/train.py mine.yaml train.tokens=1e8" in mine
    assert mine == shipped.replace(" qwen3-0.6b-power-32k", " mine.yaml")
    assert load_recipe("mine.yaml").recipe.model.path == "Qwen/Qwen3-0.6B-Base"
    Path("mine.yaml").write_text("mine\n")
    code, _, err = call("recipe", "copy", "qwen3-0.6b-power-32k", "mine.yaml")
    assert code == 2
    assert "mine.yaml exists already" in err
    assert Path("mine.yaml").read_text() == "mine\n"
    assert call("recipe", "copy", "qwen3-0.6b-power-32k", "no/such/folder.yaml")[0] == 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where even root cannot write")
def test_copy_to_where_nothing_can_be_written(call, recipe):
    assert call("recipe", "copy", "quickstart", "mein rezept ä.yaml")[1].endswith(
        "sparsetrain run 'mein rezept ä.yaml'\n"
    )
    code, _, err = call("recipe", "copy", "quickstart", "/proc/my.yaml")
    assert code == 2
    assert err.startswith("error: cannot write /proc/my.yaml")


def test_an_error_under_half_a_launcher_environment_is_still_a_message(call, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert call("run", "nowhere.yaml")[0] == 2


def test_validate_prints_one_line_a_recipe(call, recipe):
    code, out, err = call("recipe", "validate", recipe, "qwen3-0.6b-power-32k", "--gpus", "2")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("run.yaml: valid: 1 row x 2 accumulation x 2 ranks = 4 rows = 512 tokens a step; 30 steps")
    assert "power attention, 78.3% of causal pairs" in first
    assert second.startswith("qwen3-0.6b-power-32k: valid: 1 row x 16 accumulation x 2 ranks")
    assert second.endswith(
        "the tokenizer of Qwen/Qwen3-0.6B-Base, the Hub dataset emozilla/pg19 (there is no such file or folder here)"
    )


def test_validate_reports_every_broken_recipe_and_goes_on(call, recipe):
    Path("bad.yaml").write_text(RECIPE.replace("lr:", "lrr:"))
    code, out, err = call("recipe", "validate", "bad.yaml", recipe, "gone.yaml")
    assert code == 2
    assert out.startswith("run.yaml: valid")
    assert "bad.yaml:6: train.lrr: unknown key; did you mean train.lr?" in err
    assert "there is no recipe gone.yaml" in err


def test_validate_applies_overrides_to_every_recipe_and_prints_notes(call, recipe):
    code, out, err = call("recipe", "validate", recipe, "attention.method=full")
    assert code == 0
    assert "; full attention" in out
    assert "note: attention.method=full replaces power (run.yaml:3): block=16, window=3 dropped" in err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["deepspeed.config={zero_optimization: {stage: 3}}"], "zero_optimization.stage is 3 there"),
        (["deepspeed.config={gradient_cliping: 1.0}"], "did you mean gradient_clipping?"),
        (["deepspeed.config=gone.json"], "deepspeed.config: gone.json: cannot be read"),
        (["--ranks", "3"], "is not a multiple of"),
        (
            ["model.path=sparsetrain:tiny", "lora={targets: '(a+)+$'}"],
            "lora.targets: (a+)+$ matches no linear layer of LlamaForCausalLM",
        ),
        (["model.path=sparsetrain:small"], "no such model ships with sparsetrain; there is ['tiny']"),
        (["model.path=./gone"], "model.path='./gone': there is no such folder"),
        (["model.path=a/b", "model.tokenizer=/gone"], "model.tokenizer='/gone': there is no such folder"),
    ],
)
def test_validate_refuses_what_a_run_would_refuse(call, recipe, overrides, expected):
    code, _, err = call("recipe", "validate", recipe, *overrides)
    assert code == 2
    assert expected in err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora={targets: [q_proj, nope]}", "lora.targets: nope matches no linear layer of LlamaForCausalLM"),
        ("model.tokenizer=/gone", "model.tokenizer='/gone': there is no such folder"),
        ("data.sources=[{path: /gone.jsonl}]", "/gone.jsonl does not exist"),
    ],
)
def test_every_command_refuses_a_recipe_in_the_same_words(call, recipe, override, expected):
    commands = [["recipe", "validate"], ["plan"], ["run"]]
    answers = [call(*command, recipe, "model.path=sparsetrain:tiny", override) for command in commands]
    assert {code for code, _, _ in answers} == {2}
    (message,) = {err.splitlines()[-1] for _, _, err in answers}
    assert expected in message
    assert message.endswith(f"command line override {override})")
    code, out, _ = call("doctor", recipe, "model.path=sparsetrain:tiny", override)
    assert code == 2
    assert "".join(message.removeprefix("error: ").split()) in "".join(out.split())


def test_an_override_that_is_given_twice_is_told(call, recipe):
    code, _, err = call("recipe", "validate", recipe, "train.lr=1e-3", "train.lr=1e-4")
    assert code == 0
    assert "override train.lr=1e-4 replaces command line override train.lr=1e-3" in err


@pytest.mark.parametrize("name", [" ", "..", "a/../b", "x "])
def test_a_name_that_is_no_folder_is_refused(call, recipe, name):
    code, _, err = call("recipe", "validate", recipe, f'name="{name}"')
    assert code == 2
    assert "is not a valid folder name in runs" in err


def test_schema_is_json(call):
    code, out, _ = call("recipe", "schema")
    assert code == 0
    assert "base" in json.loads(out)["properties"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "gone.yaml"],
        ["run", "run.yaml", "train.lrr=3"],
        ["run", "run.yaml", "train.lr"],
        ["recipe", "show", "bad.yaml"],
        ["recipe", "validate", "train.lr=3"],
        ["doctor", "gone.yaml"],
        ["eval", "nowhere", "run.yaml"],
        ["eval", "nowhere", "run.yaml", "eval.tasks.passkey.lengths=[128]"],
        ["eval", "nowhere", "run.yaml", "attention.method=full"],
    ],
)
def test_mistakes_exit_with_2_and_one_message(call, recipe, arguments):
    Path("bad.yaml").write_text("model: [\n")
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_real_process_exits_with_2_and_no_traceback_unless_asked(recipe):
    command = [sys.executable, "-m", "sparsetrain.cli", "recipe", "show", "run.yaml", "train.lrr=3"]
    quiet = subprocess.run(command, capture_output=True, text=True)
    assert quiet.returncode == 2
    assert quiet.stderr.startswith("error: run.yaml has 1 problem:")
    assert "Traceback" not in quiet.stderr


def test_traceback_on_request(call, recipe, monkeypatch):
    from sparsetrain.errors import RecipeError

    monkeypatch.setenv("SPARSETRAIN_TRACEBACK", "1")
    with pytest.raises(RecipeError):
        main(["recipe", "show", "run.yaml", "train.lrr=3"])


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["recipe", "validate"], ["run", "x", "--nonsense"]])
def test_usage_errors_exit_with_2(call, arguments):
    assert call(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipe", "list"],
        ["recipe", "validate", "qwen3-8b-power-128k"],
        ["recipe", "show", "run.yaml"],
        ["recipe", "schema"],
        ["bench", "--help"],
        ["bench", "step", "--help"],
    ],
)
def test_quick_commands_import_nothing_heavy(recipe, arguments):
    script = (
        "import sys; from sparsetrain.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'peft', 'numpy', 'matplotlib', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_eval_measures_a_saved_folder(call, recipe, test_data):
    from sparsetrain.modeling import load_model, save

    loaded = load_recipe(recipe, [f"model={{path: {test_data}/models/stories260K_hf, dtype: float32}}"]).recipe
    model, tokenizer = load_model(loaded.model, loaded.attention, seed=0)
    save(model, "final", tokenizer)
    measure = "eval.tasks.passkey={lengths: [256], depths: 2, trials: 1}"
    code, out, err = call("eval", "final", recipe, measure, "--output", "result.json")
    assert code == 0, err
    assert "256" in out
    result = json.loads(Path("result.json").read_text())
    (row,) = result["rows"].values()
    assert row["tasks"]["passkey"]["lengths"] == [256]
    assert len(row["tasks"]["passkey"]["correct"][0]) == 2

    code, _, err = call("eval", "final", recipe, measure, "--output", "nowhere/result.json")
    assert (code, err.startswith("error: --output nowhere/result.json: there is no such folder")) == (2, True)
    for file in Path("final").glob("*token*"):
        file.unlink()
    code, _, err = call("eval", "final", recipe, measure)
    assert code == 2
    assert "error: RUN_OR_MODEL (its tokenizer)='final' cannot be loaded: " in err


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "make it writable"), (errno.EIO, "check the disk")],
)
def test_a_fault_of_the_disk_is_told_in_a_line(monkeypatch, capsys, fault, remedy):
    def full(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault), "runs/x/report.md")

    monkeypatch.setattr("sparsetrain.cli.entry._command", lambda: full)
    assert main(["recipe", "list"]) == 2
    said = f"error: [Errno {fault}] {os.strerror(fault)}: 'runs/x/report.md'; {remedy}, or work in another folder\n"
    assert capsys.readouterr().err == said


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EBADF, "bad file descriptor")

    monkeypatch.setattr("sparsetrain.cli.entry._command", lambda: broken)
    with pytest.raises(OSError, match="bad file descriptor"):
        main(["recipe", "list"])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_a_rank_that_is_no_number_is_refused_by_every_command(call, monkeypatch, name):
    monkeypatch.setenv(name, "x")
    code, _, err = call("generate", "sparsetrain:tiny", "--prompt", "x")
    assert code == 3
    assert f"{name}='x' in the environment is not a number; unset or correct it" in err


@pytest.mark.parametrize("command", ["eval", "generate", "report", "export"])
def test_a_recipe_named_instead_of_its_run_is_told_so(call, recipe, command):
    rest = {"generate": ["--prompt", "x"], "export": ["out"]}.get(command, [])
    for name in ("quickstart", "run.yaml"):
        code, _, err = call(command, name, *rest)
        assert code == 2
        assert f"{name} is a recipe; run it first (sparsetrain run {name}), then name its run folder, runs/" in err
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/recipe.yaml").touch()
    assert "quickstart is a recipe; name its run: runs/quickstart" in call(command, "quickstart", *rest)[2]


def test_a_run_that_was_stopped_while_it_loaded_its_libraries_does_not_load_them_again(monkeypatch):
    monkeypatch.setattr("sparsetrain.cli.entry.main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["sparsetrain", "doctor"])
    monkeypatch.delitem(sys.modules, "sparsetrain.training.distributed.launcher", raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(SystemExit) as ended:
        script()
    assert ended.value.code == 0


def test_threads_sleep_where_they_wait_unless_it_is_said_otherwise():
    # OpenMP reads it as torch is imported, which must not have happened before.
    code = (
        "import os, sys; sys.modules['torch'] = None; import sparsetrain.cli; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        said = subprocess.check_output([sys.executable, "-c", code], env=others | given, text=True)
        assert said.strip() == expected


def test_an_import_does_not_change_the_environment():
    """Getting started says what to set before a training loop in Python."""
    code = "import os; before = dict(os.environ); import sparsetrain; assert os.environ == before; sparsetrain.sparsify"
    code += "; assert os.environ.get('GOMP_SPINCOUNT') == before.get('GOMP_SPINCOUNT')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_needless_warnings_of_other_libraries_are_left_out_and_others_are_not(call):
    for _ in range(2):  # a process may run several commands
        assert call("--version")[0] == 0
    for name, beginning in NEEDLESS.items():
        logger = logging.getLogger(name)
        assert len(logger.filters) == len(set(logger.filters))
        records = [logging.makeLogRecord({"name": name, "msg": text}) for text in (f"{beginning} = 0", "a real one")]
        assert [bool(logger.filter(record)) for record in records] == [False, True]


NOWHERE = "nothing can be written in /proc (No such file or directory)"
WRONG = [
    (["generate", "sparsetrain:tiny", "--file", "-"], "--file -: standard input is closed or empty"),
    (["generate", "sparsetrain:tiny", "--file", "empty.txt"], "--file empty.txt: the file is empty"),
    (["generate", "sparsetrain:tiny", "--dtype", "float32", "--file", "no.txt"], "--file no.txt: cannot be read"),
    (["generate", "sparsetrain:tiny", "--prompt", "a", "--dtype", "int8"], "--dtype int8 is not known"),
    (["generate", "sparsetrain:tiny", "--prompt", "a", "--device", "gpu"], "--device gpu is not known"),
    (["generate", "sparsetrain:tiny", "--prompt", "a", "--budget", "few"], "budget=few must be auto"),
    (["generate", "./none", "--prompt", "a"], "RUN_OR_MODEL='./none': there is no such folder"),
    (["eval", "quickstart"], "RUN_OR_MODEL='quickstart': quickstart is a recipe; run it first"),
    (["eval", "sparsetrain:tiny", "--tasks", "owl"], "--tasks owl: there is no such task"),
    (["calibrate", "sparsetrain:tiny", "--data", "no.txt"], "--data no.txt: cannot be read"),
    (["compare-decode", "sparsetrain:tiny", "owl"], "there is no recipe owl"),
    (["export", "none", "out"], "none is not a run folder (it has no recipe.yaml)"),
    (["export", "run", "/proc/x"], f"cannot write /proc/x: {NOWHERE}"),
    (["export", "run", "run"], "run exists already and is not an empty folder"),
    (["run", "quickstart", "--output", "/proc/x"], f"cannot write the run folder /proc/x: {NOWHERE}"),
    (["run", "quickstart", "--output", "/proc/x", "--resume"], f"cannot write the run folder /proc/x: {NOWHERE}"),
    (["bench", "decode", "--output", "/proc/x"], f"--output /proc/x: {NOWHERE}"),
    (["bench", "decode", "--output=/proc/x"], f"--output /proc/x: {NOWHERE}"),
    (["report", "none"], "none is not a run folder (no such folder)"),
    (["report", "run", "--output", "empty.txt"], "empty.txt exists already and is no page of sparsetrain"),
    (["report", "/proc"], f"/proc: {NOWHERE}; name a file of another folder with --output"),
    (["compare", "run", "none"], "none is not a run folder (no such folder)"),
    (["train", "my.yaml"], "there is no command train; this is `sparsetrain run`"),
    (
        ["data", "preview", "empty.txt"],
        "empty.txt: a recipe is a YAML file, not .txt; to read data, name it in a recipe",
    ),
]
"""Command lines, and what is said of each."""

REFUSED_WITHOUT_TORCH = """
import contextlib, io, json, sys
from sparsetrain.cli import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(command)
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


@pytest.mark.parametrize("stdin", ["</dev/null", "<&-"], ids=["empty", "closed"])
def test_what_a_command_line_has_wrong_is_said_before_torch_is_imported(stdin, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").touch()
    (tmp_path / "said.py").write_text(REFUSED_WITHOUT_TORCH)
    wrong = WRONG if stdin == "</dev/null" else WRONG[:1]
    command = shlex.join([sys.executable, "said.py", json.dumps([arguments for arguments, _ in wrong])])
    out = subprocess.run(["sh", "-c", f"{command} {stdin}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for (_, said), line in zip(wrong, out.stdout.splitlines(), strict=True):
        code, found, torch = json.loads(line)
        assert (code, torch) == (2, False), found
        assert f"error: {said}" in found
