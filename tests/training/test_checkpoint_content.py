"""A checkpoint whose checksums are right and whose content makes no sense is passed over, or refused; never trusted."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import zlib
from dataclasses import asdict

import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsetrain.cli import main
from sparsetrain.errors import CheckpointError, DataError
from sparsetrain.training import checkpoints
from sparsetrain.training.checkpoints import store
from sparsetrain.training.checkpoints.content import content_fault

NAME = "step-000002"
VALUES = [None, True, -1, 1.5, 7, 10**20, math.inf, "x", [], {}]


@pytest.fixture(scope="module")
def small(tiny, shared, run_folder):
    """A run of two steps."""

    def make(folder):
        assert main(["run", str(tiny), "train.steps=2", "--output", str(folder / "run")]) == 0

    return run_folder(shared("content", make) / "run")


@pytest.fixture
def damaged(small, tmp_path):
    """``damaged(change)``: a copy of the checkpoint that ``change`` was let loose on, with checksums that are right."""
    copies = iter(range(1_000_000))

    def damage(change):
        folder = tmp_path / f"copy-{next(copies)}" / NAME
        shutil.copytree(small.path / "checkpoints" / NAME, folder, copy_function=os.link)
        change(folder)
        record, tensors = folder / "rank-00000.json", folder / "rank-00000.safetensors"
        if not tensors.samefile(small.path / "checkpoints" / NAME / tensors.name):
            rewrite(record, json.dumps(json.loads(record.read_text()) | {"file": entry(tensors)}))
        files = {path.name: entry(path) for path in folder.iterdir() if path.is_file()}
        del files["manifest.json"]
        rewrite(folder / "manifest.json", json.dumps(files))
        return folder

    return damage


def entry(path):
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}


def rewrite(path, content):
    """Replace a file, which is a link to that of the run."""
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def places(tree, path=()):
    """Every place in a JSON document; of long lists the ends."""
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*path, key))
    elif isinstance(tree, list):
        for index in range(len(tree)) if len(tree) < 6 else (0, len(tree) - 1):
            yield from places(tree[index], (*path, index))


def mutants(document):
    """The document with one value replaced, removed or added, each with what was done."""
    for path in places(document):
        for value in [*VALUES, "removed", "added"]:
            tree = copy.deepcopy({"root": document})
            *way, last = ("root", *path)
            parent = tree
            for key in way:
                parent = parent[key]
            if value == "removed":
                del parent[last]
            elif value == "added":
                if not isinstance(parent[last], dict):
                    continue
                parent[last]["strange"] = 1
            elif parent[last] == value and type(parent[last]) is type(value):
                continue
            else:
                parent[last] = value
            yield f"{'.'.join(map(str, path))} = {value!r}", tree.get("root")


def outcome(folder, load):
    """What a resume makes of a checkpoint: why it is passed over or refused, or the state that it goes on from."""
    fault = store.fault(folder) or content_fault(folder)
    if fault is not None:
        assert fault.strip()
        return fault
    try:
        return load(folder)
    except (CheckpointError, DataError) as error:
        return str(error)


@pytest.fixture
def while_loading(small, tmp_path, tiny, monkeypatch):
    """``while_loading(act)``: resume the run, and call ``act(load)`` where it loads its checkpoint; ``load(folder)``
    loads another into the same engine."""

    def resume(act):
        original = checkpoints.load

        def load(engine, start, *given, **options):
            act(lambda folder: original(engine, folder, *given, **options))
            return original(engine, start, *given, **options)

        monkeypatch.setattr(checkpoints, "load", load)
        run = tmp_path / "run"
        shutil.copytree(small.path, run)
        assert main(["run", str(tiny), "train.steps=2", "--output", str(run), "--resume"]) == 0

    return resume


@pytest.mark.parametrize("name", ["state.json", "rank-00000.json"])
def test_no_value_of_another_kind_is_taken_for_a_state(small, damaged, while_loading, name):
    document = json.loads((small.path / "checkpoints" / NAME / name).read_text())
    # What tells of a run and decides nothing, and what any number may be.
    harmless = ("wandb_run_id", "engine.global_samples", "tokens", "steps", "random.numpy.2", "random.numpy.3")
    harmless += ("random.numpy.4", "random.python.1.0", "random.python.2", "random.numpy.1", "random.python.1.624")
    seen = {"accepted": 0, "refused": 0}

    def sweep(load):
        right = asdict(load(damaged(lambda folder: None)))
        for what, tree in mutants(document):
            folder = damaged(lambda folder, tree=tree: rewrite(folder / name, json.dumps(tree)))
            found = outcome(folder, load)
            if isinstance(found, str):
                seen["refused"] += 1
            elif asdict(found) != right or name != "state.json":
                seen["accepted"] += 1
                assert what.startswith(harmless), f"{what} was taken"

    while_loading(sweep)
    assert seen["refused"] > 100
    assert seen["accepted"] < 60


@pytest.mark.parametrize("name", ["state.json", "rank-00000.json", "manifest.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        100_000 * b"[",
        b'{"step": ' + 5000 * b"9" + b"}",
        b"{}",
        b'"x"',
        "pipe",
        "folder",
    ],
    ids=str,
)
def test_a_file_that_is_no_document(damaged, small, name, content, tmp_path):
    folder = damaged(lambda folder: None)
    path = folder / name
    if content == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif content == "folder":
        path.unlink()
        path.mkdir()
    elif name == "manifest.json":
        rewrite(path, content)
    else:
        folder = damaged(lambda folder: rewrite(folder / name, content))
    assert store.fault(folder) or content_fault(folder)


def test_a_checkpoint_of_a_recipe_in_an_old_spelling_is_refused_with_the_new_one(damaged, small, tiny, refused):
    def old_spelling(folder):
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["eval"] = {"at_end": False, "passkey": {"lengths": [64]}}
        rewrite(folder / "recipe.yaml", yaml.safe_dump(recipe))

    wanted = "eval.passkey: tasks are a list now; write it as an entry of eval.tasks: - {task: passkey, lengths: [64]}"
    checkpoint = damaged(old_spelling)
    assert wanted in content_fault(checkpoint)
    run = checkpoint.parent / "run"
    shutil.copytree(small.path, run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    shutil.copytree(checkpoint, run / "checkpoints" / NAME)
    # By a recipe that is up to date, and by the run's own, which is as old.
    error = refused("run", str(tiny), "train.steps=3", "--output", str(run), "--resume")
    assert wanted in error
    assert "skipping step-000002: its recipe.yaml cannot be read" in error
    shutil.copy(checkpoint / "recipe.yaml", run / "recipe.yaml")
    assert wanted in refused("run", str(run / "recipe.yaml"), "--resume")
    assert (run / "checkpoints" / NAME / "state.json").is_file()


def test_a_file_without_an_end_is_not_read(damaged, monkeypatch):
    def grow(folder):
        rewrite(folder / "state.json", (folder / "state.json").read_bytes())
        os.truncate(folder / "state.json", 1 << 27)

    assert "too many for what it should hold" in store.fault(damaged(grow))


def test_the_step_is_that_of_the_name(damaged):
    folder = damaged(lambda folder: None)
    for name in ("step-000003", "step-2", "step-000999"):
        other = folder.rename(folder.with_name(name))
        assert content_fault(other) == f"it holds the state of {NAME}"
        folder = other


def any_of(tensors, kind):
    return next(name for name in sorted(tensors) if name.startswith(f"{kind}/"))


def without(kind):
    return lambda tensors: {name: t for name, t in tensors.items() if name != any_of(tensors, kind)}


def replaced(kind, change):
    return lambda tensors: tensors | {any_of(tensors, kind): change(tensors[any_of(tensors, kind)]).contiguous()}


def added(*names):
    return lambda tensors: tensors | {name: torch.zeros(1) for name in names}


TENSORS = [
    (without("weight"), "does not match its weights"),
    (without("exp_avg"), "does not match its weights"),
    (without("step"), "does not count the steps"),
    (lambda tensors: {name: t for name, t in tensors.items() if name[0] == "w"}, "does not match its weights"),
    (lambda tensors: {}, "it holds no weights"),
    (replaced("weight", torch.Tensor.half), "in F16"),
    (replaced("weight", lambda t: t[:-1]), "does not match its weights"),
    (replaced("weight", lambda t: t[None]), "is not a tensor of a checkpoint"),
    (added("strange"), "is not a tensor of a checkpoint"),
    (added("weight/-1/x"), "is not a tensor of a checkpoint"),
    (added("weight/5/x"), "element 0 of weight of x is missing"),
    (lambda tensors: added("weight/1/" + any_of(tensors, "weight")[9:])(tensors), "appears twice"),
    (added("weight/0/x", "exp_avg/0/x", "exp_avg_sq/0/x", "step/0/x"), "x is in the checkpoint, but not trained"),
    (added("buffer/0/x"), "its buffer x is"),
    (replaced("weight", lambda t: t * math.nan), "weights are not finite"),
    (replaced("step", lambda t: t - 9), "it counts -"),
    (replaced("step", lambda t: t + 0.5), "it counts 2.5 steps"),
]


def test_tensors_that_are_not_those_of_the_run(damaged, while_loading):
    tried = []

    def sweep(load):
        for change, said in TENSORS:

            def damage(folder, change=change):
                file = folder / "rank-00000.safetensors"
                tensors = change(load_file(file))
                file.unlink()
                save_file(tensors, file)

            found = outcome(damaged(damage), load)
            assert isinstance(found, str), said
            assert said in found
            tried.append(said)

    while_loading(sweep)
    assert len(tried) == len(TENSORS)


ODD = st.sampled_from([*VALUES, -0.0, 2**62, 2**63, -(2**31), 1e308, math.nan, "\ud800", "\0", "../x", "9" * 30])
ANYTHING = st.recursive(
    ODD | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
TREE_EDITS = st.lists(st.tuples(st.integers(0, 10**6), ANYTHING | st.just("removed")), min_size=1, max_size=3)
RAW_EDITS = st.just([]) | st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 20), st.binary(max_size=6)), min_size=1, max_size=3
)
"""Of bytes; empty where the document is edited as such."""


def edited(tree, edits):
    """A JSON document with values replaced or removed in any places."""
    tree = copy.deepcopy({"root": tree})
    for number, value in edits:
        found = [path for path in places(tree) if path]
        *way, last = found[number % len(found)]
        parent = tree
        for key in way:
            parent = parent[key]
        if value == "removed" and way:
            del parent[last]
        else:
            parent[last] = value
    return tree["root"]


def edited_bytes(content, edits):
    for start, length, new in edits:
        place = start % (len(content) + 1)
        content = content[:place] + new + content[place + length :]
    return content


def test_fuzzed_documents_and_tensors_of_a_checkpoint_are_loaded_or_refused(fuzz, while_loading, damaged):
    def with_document(folder, made):
        name, edits, raw = made
        content = (folder / name).read_bytes()
        rewrite(folder / name, edited_bytes(content, raw) if raw else json.dumps(edited(json.loads(content), edits)))

    def with_tensors(folder, made):
        edits, raw = made
        path = folder / "rank-00000.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        if raw:
            content = edited_bytes(content[: size + 64], raw) + content[size + 64 :]
        else:
            header = json.dumps(edited(json.loads(content[8 : 8 + size]), edits)).encode()
            content = len(header).to_bytes(8, "little") + header + content[8 + size :]
        rewrite(path, content)

    def sweep(load):
        def check(change, made):
            folder = damaged(lambda folder: change(folder, made))
            found = outcome(folder, load)
            assert found.strip() if isinstance(found, str) else found.step == 2
            shutil.rmtree(folder.parent)

        documents = st.sampled_from(["state.json", "rank-00000.json"])
        fuzz(st.tuples(documents, TREE_EDITS, RAW_EDITS), lambda made: check(with_document, made))
        fuzz(st.tuples(TREE_EDITS, RAW_EDITS), lambda made: check(with_tensors, made))

    while_loading(sweep)


def test_a_fuzzed_manifest_is_taken_or_refused(fuzz, damaged):
    folder = damaged(lambda folder: None)
    right = (folder / "manifest.json").read_bytes()

    def check(made):
        edits, raw = made
        content = edited_bytes(right, raw) if raw else json.dumps(edited(json.loads(right), edits))
        rewrite(folder / "manifest.json", content)
        found = store.fault(folder) or content_fault(folder)
        assert found is None or found.strip()

    fuzz(st.tuples(TREE_EDITS, RAW_EDITS), check)
