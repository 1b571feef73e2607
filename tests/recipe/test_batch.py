from __future__ import annotations

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import batch_shape, plan_batch


@pytest.fixture
def plan(load, minimal):
    def plan_for(ranks: int, *overrides: str, rows_per_epoch: int | None = None):
        return plan_batch(load(minimal, *overrides).recipe, ranks, rows_per_epoch)

    return plan_for


def test_accumulation_follows_from_the_global_batch(plan):
    found = plan(2, "train.micro_batch=2", "train.global_batch_sequences=16")
    assert (found.micro_batch, found.accumulation, found.ranks) == (2, 4, 2)
    assert (found.global_batch_sequences, found.tokens_per_step, found.steps) == (16, 2048, 30)
    assert found.describe() == (
        "2 rows x 4 accumulation x 2 ranks = 16 rows = 2,048 tokens a step; 30 steps = 61,440 tokens"
    )


def test_a_global_batch_in_tokens_is_the_same_in_rows(plan):
    assert plan(4, "train.global_batch_tokens=1024") == plan(4, "train.global_batch_sequences=8")


def test_ranks_that_share_a_sequence_count_as_one(plan):
    found = plan(8, "sequence.parallel=4", "train.micro_batch=2", "train.global_batch_sequences=16")
    assert (found.micro_batch, found.accumulation, found.ranks, found.parallel) == (2, 4, 2, 4)
    assert found.describe().startswith("2 rows x 4 accumulation x 2 groups of 4 ranks = 16 rows = 2,048 tokens a step;")
    with pytest.raises(RecipeError, match=r"train.micro_batch=1 x 2 groups of 4 ranks = 2 rows; train.global_batch"):
        plan(8, "sequence.parallel=4", "train.global_batch_sequences=3")


def test_ranks_that_cannot_share_are_refused_with_those_that_the_heads_allow(plan):
    suggested = "sequence.parallel=4 ranks that share a sequence do not divide 6 ranks; set it to "
    with pytest.raises(RecipeError) as refused:
        plan(6, "sequence.parallel=4")
    assert str(refused.value) == (
        f"{suggested}1 or 2 or 3 or 6 (if the model's heads can be divided so), or start a multiple of 4 ranks"
    )
    built = (
        "model={architecture: {model_type: llama, num_attention_heads: 8, num_key_value_heads: 4}, tokenizer: some/t}"
    )
    with pytest.raises(RecipeError) as refused:
        plan(6, "sequence.parallel=4", built)
    assert str(refused.value) == f"{suggested}1 or 2, or start a multiple of 4 ranks"


def test_without_a_global_batch_it_grows_with_the_ranks(plan):
    assert plan(3, "train.micro_batch=2").global_batch_sequences == 6
    assert plan(3, "train.micro_batch=2").accumulation == 1


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_the_ranks(plan, ranks, accumulation):
    found = plan(ranks, "train.global_batch_sequences=4")
    assert (found.accumulation, found.tokens_per_step) == (accumulation, 512)


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (
            4,
            ["train.micro_batch=2", "train.global_batch_sequences=12"],
            "train.global_batch_sequences=8 or 16 works, and so does train.micro_batch=1",
        ),
        (3, ["train.global_batch_tokens=1024"], "train.global_batch_tokens=768 or 1152 works"),
        (8, ["train.global_batch_sequences=4"], "train.global_batch_sequences=8 works"),
        (2, ["train.micro_batch=4", "train.global_batch_sequences=12"], "so does train.micro_batch=3"),
    ],
)
def test_an_indivisible_batch_names_values_that_work(plan, ranks, overrides, expected):
    with pytest.raises(RecipeError) as refused:
        plan(ranks, *overrides)
    assert expected in str(refused.value)


@pytest.mark.parametrize("suggestion", ["train.global_batch_sequences=8", "train.micro_batch=1"])
def test_the_suggested_values_do_work(plan, suggestion):
    assert plan(4, "train.micro_batch=2", "train.global_batch_sequences=12", suggestion).ranks == 4


def test_tokens_are_rounded_up_to_whole_steps(plan):
    assert plan(1, "train.steps=null", "train.tokens=1280").steps == 10
    assert plan(1, "train.steps=null", "train.tokens=1281").steps == 11


def test_epochs_count_the_rows_of_the_data(plan):
    epochs = ("train.steps=null", "train.epochs=1.5", "train.global_batch_sequences=4")
    assert plan(2, *epochs, rows_per_epoch=10).steps == 4
    with pytest.raises(RecipeError, match=r"train\.epochs needs"):
        plan(2, *epochs)


@pytest.mark.parametrize(("warmup", "steps"), [("0", 0), ("7", 7), ("0.1", 3), ("0.001", 1), ("30", 30)])
def test_warmup_is_a_count_or_a_share(plan, warmup, steps):
    assert plan(1, f"train.warmup={warmup}").warmup_steps == steps


def test_a_warmup_longer_than_the_run_is_refused(plan):
    with pytest.raises(RecipeError, match=r"train\.warmup=50 steps is longer than the run, which has 2 steps"):
        plan(1, "train.steps=null", "train.tokens=256", "train.warmup=50")


def test_shape_needs_no_steps(load, minimal):
    recipe = load(minimal, "train.steps=null", "train.epochs=1").recipe
    assert batch_shape(recipe, 2).describe() == "1 row x 1 accumulation x 2 ranks = 2 rows = 256 tokens a step"
