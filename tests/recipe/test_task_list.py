"""``eval.tasks`` goes by names: on the command line, over a base, and where the former spelling is refused."""

from __future__ import annotations

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import load_recipe

TASKS = """\
eval:
  tasks:
    - {task: passkey, lengths: [64], trials: 3}
    - task: passkey
      name: far
      lengths: [4096]
"""


def test_two_tasks_of_one_kind_have_settings_of_their_own(load, minimal):
    loaded = load(minimal + TASKS, "eval.tasks.far.trials=9", "eval.tasks.passkey.depths=2", "eval.tasks.1.digits=7")
    near, far = loaded.recipe.eval.tasks
    assert (near.label, near.lengths, near.trials, near.depths, near.digits) == ("passkey", [64], 3, 2, 5)
    assert (far.label, far.lengths, far.trials, far.depths, far.digits) == ("far", [4096], 9, 5, 7)
    assert loaded.places["eval", "tasks", "far", "trials"] == "command line override eval.tasks.far.trials=9"


def test_a_task_that_is_not_there_is_made_by_its_name(load, minimal):
    (task,) = load(minimal, "eval.tasks.passkey.lengths=[64]").recipe.eval.tasks
    assert (task.task, task.name, task.lengths) == ("passkey", None, [64])
    new = ["eval.tasks.far.lengths=[4096]", "eval.tasks.far.task=passkey"]
    for overrides in (new, new[::-1], ["eval.tasks.far={task: passkey, lengths: [4096]}"]):
        (far,) = load(minimal, *overrides).recipe.eval.tasks
        assert (far.task, far.label, far.lengths) == ("passkey", "far", [4096])


def test_a_task_is_replaced_or_taken_out_by_its_name(load, minimal):
    replaced = load(minimal + TASKS, "eval.tasks.passkey={lengths: [32]}").recipe.eval.by_name
    assert (replaced["passkey"].lengths, replaced["passkey"].trials) == ([32], 5)
    for name in ("passkey", "0"):
        loaded = load(minimal + TASKS, f"eval.tasks.{name}=null", "eval.tasks.far.trials=2")
        (far,) = loaded.recipe.eval.tasks
        assert (far.label, far.trials) == ("far", 2)
        assert loaded.places["eval", "tasks", 0, "lengths"].endswith("run.yaml:15")
    assert load(minimal, "eval.tasks.recall=null").recipe.eval.empty


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["eval.tasks.fra.trials=2"], "eval.tasks has no task called fra (there is: passkey, far)"),
        (["eval.tasks=[{name: far}]", "eval.tasks.far.trials=2"], "eval.tasks.far: needs 'task'"),
        (["eval.tasks.fra=null"], "eval.tasks has no task called fra"),
        (["eval.tasks.7.trials=2"], "eval.tasks is a list of 2"),
        (["eval.tasks.7=null"], "eval.tasks is a list of 2"),
        (["eval.tasks.far.trial=2"], "eval.tasks.far.trial: unknown key; did you mean eval.tasks.far.trials?"),
        (["eval.tasks.far.trials=many"], "eval.tasks.far.trials: expected a whole number, got 'many'"),
        (["eval.tasks.far={task: passkey, name: away, lengths: [4]}"], "the task is called far, and away in its value"),
        (["eval.tasks.1.name=passkey"], "eval.tasks: 2 tasks are called passkey; give each its own name"),
        (["eval.tasks.1.name=loss"], "loss is the name of another picture or metric"),
        (["eval.tasks.1.name=recall_loss"], "recall_loss is the name of another picture or metric"),
        (["eval.tasks.1.name=a/b"], "eval.tasks.a/b.name"),
        (["eval.tasks={passkey: {lengths: [64]}}"], "eval.tasks: expected a list, got a mapping (passkey)"),
        (["eval.tasks=[passkey]"], "eval.tasks.0: expected a mapping of settings, got 'passkey'"),
        (["eval.tasks=[{lengths: [64]}]"], "eval.tasks.0: needs 'task'"),
        (["checkpoint.keep_best=fra", "eval.every=2"], "nothing measures fra, and eval.tasks has passkey, far"),
    ],
)
def test_what_cannot_be_honoured_is_refused(refuse, minimal, overrides, said):
    assert said in refuse(minimal + TASKS, *overrides)


def test_one_of_two_tasks_can_be_what_the_best_checkpoint_goes_by(load, minimal):
    recipe = load(minimal + TASKS, "checkpoint.keep_best=far", "eval.every=2").recipe
    assert recipe.checkpoint.keep_best == "far"


def test_an_entry_takes_the_settings_of_the_base_that_has_its_name(write, minimal):
    write("parent.yaml", minimal + TASKS + "    - {task: recall, source: {synthetic: recall, lengths: [64]}}\n")
    child = write("child.yaml", "base: parent\neval: {tasks: [{name: far, trials: 2}, {task: passkey, depths: 1}]}\n")
    loaded = load_recipe(child)
    far, near = loaded.recipe.eval.tasks
    assert (far.label, far.lengths, far.trials) == ("far", [4096], 2)
    assert (near.label, near.lengths, near.trials, near.depths) == ("passkey", [64], 3, 1)
    (note,) = [note for note in loaded.notes if "leaves out" in note]
    assert f"{child}:2: eval.tasks leaves out recall (" in note
    assert loaded.places["eval", "tasks", "far", "lengths"].endswith("parent.yaml:15")
    assert loaded.places["eval", "tasks", "far", "trials"] == f"{child}:2"


def test_another_task_of_the_same_name_takes_nothing_of_the_old_one(write, minimal):
    write("parent.yaml", minimal + TASKS)
    source = "{synthetic: recall, lengths: [64]}"
    child = write("child.yaml", f"base: parent\neval: {{tasks: [{{task: recall, name: far, source: {source}}}]}}\n")
    loaded = load_recipe(child)
    (far,) = loaded.recipe.eval.tasks
    assert (far.task, far.label) == ("recall", "far")
    assert any("eval.tasks.far.task=recall replaces" in note for note in loaded.notes)


def test_what_a_base_lacks_is_asked_for_by_name(write, minimal):
    write("parent.yaml", minimal + TASKS)
    child = write("child.yaml", "base: parent\neval: {tasks: [{task: perplexity, lengths: [64]}]}\n")
    with pytest.raises(RecipeError, match=r"child\.yaml:2: eval\.tasks\.perplexity\.source: is required"):
        load_recipe(child)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "eval:\n  passkey: {lengths: [64, 128], trials: 2}\n",
            "run.yaml:11: eval.passkey: tasks are a list now; write it as an entry of eval.tasks: "
            "- {task: passkey, lengths: [64, 128], trials: 2}",
        ),
        ("eval: {recall: null}\n", "eval.recall: tasks are a list now, and one that eval.tasks does not list"),
    ],
)
def test_the_former_spelling_in_a_file_is_refused_with_the_new_one(refuse, minimal, text, said):
    assert said in refuse(minimal + text)


@pytest.mark.parametrize("rest", ["passkey.lengths=[4096]", "perplexity={lengths: [64]}", "recall=null"])
def test_the_former_spelling_on_the_command_line_is_refused_with_the_new_one(refuse, minimal, rest):
    said = refuse(minimal, f"eval.{rest}")
    assert said == f"command line override eval.{rest}: tasks are a list now; write eval.tasks.{rest}"
