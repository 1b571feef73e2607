"""Every example of the documentation is valid: blocks of YAML are recipes, and commands are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from sparsetrain.cli import app, main
from sparsetrain.errors import RecipeError
from sparsetrain.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SECTIONS = (
    "model",
    "attention",
    "data",
    "sequence",
    "train",
    "lora",
    "deepspeed",
    "checkpoint",
    "eval",
    "wandb",
    "base",
)
STAND_INS = {"NAME": "quickstart", "RECIPE": "quickstart"}
"""Words in capitals that stand for something of the reader's."""


def of_a_recipe(block: str) -> bool:
    given = yaml.safe_load(block)
    return isinstance(given, dict) and set(given) <= {*SECTIONS, "version", "name", "output"}


def fences(language: str) -> list:
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            if match[2] == language and (match[2] != "yaml" or of_a_recipe(match[3])):
                line = page.read_text(encoding="utf-8")[: match.start()].count("\n") + 1
                found.append(pytest.param(match[3], id=f"{page.name}:{line}"))
    return found


def command_lines() -> list:
    """Lines of `sparsetrain ...` and of the deepspeed launcher, in blocks and in the text."""
    found = {}
    for page in PAGES:
        text = re.sub(r"^\*\*`.*`\*\*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)  # error messages
        pieces = [line for match in FENCE.finditer(text) for line in match[3].replace("\\\n", " ").splitlines()]
        pieces += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))]
        for piece in pieces:
            for line in re.findall(r"(?:^|[ ;&(])((?:\S*/)?(?:sparsetrain|deepspeed) [^#;&|>]*)", piece.strip()):
                if re.match(r"(\S*/)?sparsetrain [a-z]|(\S*/)?deepspeed .*(train|eval)\.py", line):
                    found.setdefault(line.strip(), f"{page.name}: {line.strip()[:60]}")
    return [pytest.param(line, id=name) for line, name in found.items()]


def overrides_in_text() -> list:
    """Settings such as `train.lr=2e-5` in the text."""
    found = {}
    for page in PAGES:
        for code in re.findall(r"(?<!`)`([a-z_]+\.[a-z_0-9.]+=[^` ]+)`", page.read_text(encoding="utf-8")):
            if code.partition(".")[0] in SECTIONS and not re.search(r"=[A-Z]+$|\.\.\.", code):
                found.setdefault(code, f"{page.name}: {code}")
    return [pytest.param(code, id=name) for code, name in found.items()]


@pytest.mark.parametrize("block", fences("yaml"))
def test_a_block_of_yaml_is_a_recipe(block, tmp_path, monkeypatch):
    for name in re.findall(r"\$\{env:(\w+)", block):
        monkeypatch.setenv(name, "/somewhere")
    given = yaml.safe_load(block)
    file = tmp_path / "example.yaml"
    file.write_text(block if "base" in given or "model" in given else f"base: quickstart\n{block}")
    load_recipe(file)


@pytest.fixture(scope="module")
def root_command():
    return typer.main.get_command(app)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_is_one_that_is_understood(line, root_command):
    words = [STAND_INS.get(word, word) for word in shlex.split(line) if word not in ("...", "…")]
    if "deepspeed" in Path(words[0]).name:
        script = next(index for index, word in enumerate(words) if word.endswith(("train.py", "eval.py")))
        words = ["sparsetrain", "eval" if words[script].endswith("eval.py") else "run", *words[script + 1 :]]
    context = click.Context(root_command, info_name="sparsetrain")
    command, rest = context.command, words[1:]
    while rest and hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None, name
    given = [word for word in rest if not word.startswith("-")]
    # A command that is only named, or named with an option, leaves its arguments to the reader.
    parsed = command.make_context(command.name, list(rest), parent=context, resilient_parsing=not given)
    of_a_file = {word: ROOT / word for word in given if word.startswith("recipes/") and (ROOT / word).is_file()}
    named = [of_a_file.get(word, word) for word in given if word in of_a_file or word in shipped_recipes()]
    recipe = [*named, "qwen3-8b-power-128k"][0]
    overrides = [word for word in given if re.match(r"[a-z_]+\.[\w.]+=", word) and "..." not in word]
    if overrides:
        load_recipe(recipe, overrides)
    assert parsed.command is command


@pytest.mark.parametrize("override", overrides_in_text())
def test_a_setting_in_the_text_is_in_the_schema(override):
    said = ""
    try:
        load_recipe("quickstart", [override])
    except RecipeError as error:  # that it does not suit the quickstart
        said = str(error)
    assert "unknown key" not in said


@pytest.fixture(scope="module")
def folders_of_examples(tmp_path_factory):
    """A folder with the models that the pages speak of, and the smallest one in the hands of the reader."""
    from transformers import AutoTokenizer

    import sparsetrain

    folder = tmp_path_factory.mktemp("examples")
    model = sparsetrain.load("sparsetrain:tiny")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "sparsetrain/assets/tiny")
    sparsetrain.sparsify(model, {"method": "power", "block": 16, "window": 2, "dense_layers": [0, 1, 2]})
    for name in ("my-model", "runs/qwen3/final"):
        sparsetrain.save(model, folder / name, tokenizer)
    return folder, {"sparsetrain": sparsetrain, "model": model, "tokenizer": tokenizer}


PROGRAMS = ["README.md", "docs/getting-started.md", "docs/generation.md", "docs/decode-policies.md"]
ELSEWHERE = {
    "docs/from-scratch.md": "below",
    "docs/adding-a-method.md": "tests/methods/test_installed.py",
    "docs/evaluation.md": "tests/methods/test_installed.py, but for the harness, which is an extra",
}
"""Pages whose Python another test runs."""


def test_every_page_with_python_is_run():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES if "```python" in page.read_text(encoding="utf-8")}
    assert names == {*PROGRAMS, *ELSEWHERE}


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, folders_of_examples, monkeypatch, capsys):
    """In one program, with shorter texts."""
    folder, given = folders_of_examples
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    blocks = [match[3] for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")) if match[2] == "python"]
    program = "\n".join(blocks).replace("131_072", "128").replace("1_024", "4")
    exec(compile(program, page, "exec"), given | {"ids": given["tokenizer"]("def", return_tensors="pt")["input_ids"]})


@pytest.mark.usefixtures("drafted")
def test_the_commands_of_getting_started_run_in_their_order(tmp_path, monkeypatch, capsys):
    """Those that need neither the Hub nor several GPUs, with a run of one short step."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    lines = [line for match in FENCE.finditer(page) for line in match[3].splitlines()]
    short = ["train.steps=1", "train.micro_batch=1", "sequence.length=256", "data.sources=[{synthetic: passkey}]"]
    short += ["eval.at_start=false", "eval.at_end=false"]
    done = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] != ["sparsetrain"] or words[1] == "--version" or (words[2:] == ["my.yaml"] and words[1] != "plan"):
            continue
        if words[1:3] == ["data", "preview"]:
            continue  # by the tokenizer, which is on the Hub
        words = words[1:]
        if words[0] == "run":
            if Path("runs/quickstart").exists():
                continue  # the same again, somewhere else
            words += short
        if words[0] == "generate":
            words += ["--max-new-tokens", "4"]
        assert main(words) == 0, f"{line}: {capsys.readouterr().err}"
        done.append(words[0])
    assert done == ["run", "generate", "recipe", "recipe", "recipe", "plan", "export", "export"]
    assert Path("my-export/config.json").is_file()
    assert "my-org/my-model" in Path("for-the-hub/README.md").read_text(encoding="utf-8")


def test_there_are_examples():
    assert len(fences("yaml")) >= 1
    assert len(command_lines()) >= 20
    assert len(overrides_in_text()) >= 5


def test_the_example_of_a_new_model_is_valid_with_the_tokenizer_that_it_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = {match[2]: match[3] for match in FENCE.finditer((ROOT / "docs/from-scratch.md").read_text())}
    Path("corpus.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    exec(compile(blocks["python"], "tokenizer.py", "exec"), {})
    Path("scratch.yaml").write_text(blocks["yaml"])
    assert main(["recipe", "validate", "scratch.yaml"]) == 0, capsys.readouterr().err
    assert "2,048 tokens a step" in capsys.readouterr().out
