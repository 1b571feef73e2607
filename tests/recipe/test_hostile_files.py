"""Recipes that are made to break the reader: each is refused in one message, with the place, and at once."""

from __future__ import annotations

import os

import pytest

from sparsetrain.cli import main
from sparsetrain.errors import RecipeError
from sparsetrain.recipe import load_recipe

DIGITS = 400 * "9"


@pytest.mark.parametrize(
    "value",
    [
        "!!timestamp 2001-01-01",
        "!!binary aGVsbG8=",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!float 3",
        "!!int '3'",
        "!!bool maybe",
        "!!null x",
        "!!python/name:os.system x",
        "!local 3",
    ],
)
def test_a_tag_is_refused_wherever_it_stands(refuse, minimal, value):
    for text in (minimal.replace("some/model", value), minimal.replace("lr: 2e-5", f"lr: {value}")):
        assert "is not allowed in a recipe; write the value plainly" in refuse(text)
    assert "run.yaml:10" in refuse(minimal + f"{value.split()[0]} key: 1\n")


def test_text_may_be_called_text(load, minimal):
    assert load(minimal.replace("some/model}", "some/model, revision: !!str 123}")).recipe.model.revision == "123"


@pytest.mark.parametrize("field", ["train.steps", "train.lr", "train.seed", "model.config_overrides.x", "version"])
@pytest.mark.parametrize("value", [DIGITS, f"-{DIGITS}", 10 * DIGITS, 20 * DIGITS, "1e999", str(2**63)])
def test_a_number_of_any_size_is_refused_with_its_field(refuse, minimal, field, value):
    message = refuse(minimal, f"{field}={value}")
    assert message.count("\n") == 1
    assert f"{field}: " in message or "schema version" in message or "is out of range" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.sources.²", "{path: x}"), ("data.sources.٣.path", "x"), (f"data.sources.{DIGITS}.path", "x")],
)
def test_only_plain_digits_number_an_entry(refuse, minimal, key, value):
    assert "name an entry by its number" in refuse(minimal, f"{key}={value}")


@pytest.mark.parametrize("text", [r'"a\0b"', r'"\ud800"', r'"\e[2J"', r'"\x85"'])
def test_characters_that_no_text_has_are_refused_in_values_and_keys(refuse, minimal, text):
    assert "model.path: holds the character U+" in refuse(minimal.replace("some/model", text))
    assert "a key holds the character U+" in refuse(minimal + f"{text}: 1\n")


def test_arguments_and_output_that_are_no_text_are_refused(minimal, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(minimal)
    for arguments in (
        ["run", "r.yaml", "--output", "a\udcff"],
        ["recipe", "show", "\udcff.yaml"],
        ["plan", "a\nb\x00"],
    ):
        assert main(arguments) == 2
        assert "holds the character U+" in capsys.readouterr().err
    assert main(["run", "r.yaml", "--output", ""]) == 2
    assert "--output : is empty; name a folder" in capsys.readouterr().err


def test_output_is_a_name_and_no_yaml(minimal, tmp_path):
    (tmp_path / "r.yaml").write_text(minimal)
    for name in ("[1]", "null", "é😀", "1e5", "'x", "a: b", "-"):
        assert load_recipe(tmp_path / "r.yaml", output=name).recipe.output == name


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 250)}], y{i}: 1}}\n" for i in range(100)
)


@pytest.mark.parametrize("bomb", [ALIASES, MERGES], ids=["aliases", "merge keys"])
def test_aliases_cannot_make_millions_of_values(refuse, bomb):
    assert "has more than 100,000 values" in refuse(bomb)


@pytest.mark.parametrize("text", ["model: &m {<<: *m, path: x}\n", "model: &m {path: *m}\n"])
def test_a_mapping_inside_itself_is_refused(refuse, text):
    assert "an alias that contains itself" in refuse(text)


def test_thousands_of_unknown_keys_are_counted_and_some_are_listed(refuse, minimal):
    message = refuse(minimal + "".join(f"{'k' * 40}{i}: 1\n" for i in range(4000)) + f"{'z' * 1000}: 1\n")
    assert "has 4,001 problems:" in message
    assert "and 3981 more" in message
    assert len(message) < 100_000


@pytest.mark.parametrize("depth", [40, 300, 3000])
def test_deep_nesting_is_refused(refuse, minimal, depth):
    assert "nested too deeply" in refuse(minimal + "x: " + "[" * depth + "]" * depth + "\n")
    assert "leads deeper than 32 sections" in refuse(minimal, ".".join(["a"] * depth) + "=1")


def test_long_overrides_are_no_paths(load, minimal, tmp_path, monkeypatch, capsys):
    value = "x" * 3000
    minimal = minimal.replace("path: corpus.jsonl", "synthetic: passkey")
    assert load(minimal, f"model.config_overrides.note={value}").recipe.model.config_overrides == {"note": value}
    assert main(["recipe", "validate", str(tmp_path / "run.yaml"), f"model.config_overrides.note={value}"]) == 0
    assert main(["recipe", "validate", value]) == 2
    assert "there is no recipe xxx" in capsys.readouterr().err


def test_pipes_devices_and_folders_are_not_read(tmp_path, write, minimal):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml", "/dev/zero"):
        with pytest.raises(RecipeError, match="a recipe is a YAML file"):
            load_recipe(tmp_path / name)
        with pytest.raises(RecipeError, match=r"child.yaml:1: base: .* is not a file"):
            load_recipe(write("child.yaml", f"base: {name}\n"))


def test_a_file_of_another_size_or_encoding_is_refused(tmp_path, minimal):
    file = tmp_path / "r.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(RecipeError, match="is larger than 262,144 bytes"):
        load_recipe(file)
    file.write_bytes(minimal.encode("utf-16"))
    with pytest.raises(RecipeError, match="begins as UTF-16 does"):
        load_recipe(file)
    file.write_bytes((minimal + "# é").encode("latin-1"))
    with pytest.raises(RecipeError, match="not a text file in UTF-8"):
        load_recipe(file)
    file.write_bytes(b"\xef\xbb\xbf" + minimal.encode())
    assert load_recipe(file).recipe.train.steps == 30


def test_a_long_chain_of_bases_is_refused(write, minimal):
    write("r0.yaml", minimal)
    for index in range(1, 2000):
        write(f"r{index}.yaml", f"base: r{index - 1}.yaml\n")
    with pytest.raises(RecipeError, match="more than 16 recipes are based on one another"):
        load_recipe(write("last.yaml", "base: r1999.yaml\n".replace("1999", "1998")))


def test_what_a_variable_holds_is_not_looked_up_again(refuse, minimal, monkeypatch):
    monkeypatch.setenv("OUTER", "${env:OUTER}")
    assert "OUTER holds ${ itself" in refuse(minimal.replace("some/model", '"${env:OUTER}"'))
    assert "has ${ without an end" in refuse(minimal.replace("some/model", '"${env:OUTER"'))
    monkeypatch.setenv("OUTER", "a\udcff")
    assert "holds the character U+DCFF" in refuse(minimal.replace("some/model", '"${env:OUTER}"'))


@pytest.mark.parametrize(
    "text", ["a: 1\n---\nb: 1\n", "%YAML 9.9\n---\na: 1\n", "%TAG ! x\n--- !y\na", "a: &\n", '"\\U00110000"']
)
def test_other_documents_are_refused(refuse, text):
    assert "run.yaml" in refuse(text)
