"""How a batch is cut into micro batches and ranks, and how ZeRO shards the run, changes nothing but rounding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.data import StepLoader, build_rows
from sparsetrain.modeling import load_model
from sparsetrain.recipe import plan_batch

RUNS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)] + [(4, 2)]


def equal_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_batches_hold_very_different_numbers_of_targets(tiny_recipe):
    """What makes the equivalence below a statement: a mean of means would differ."""
    recipe = tiny_recipe()
    _, tokenizer = load_model(recipe.model, recipe.attention, seed=0)
    rows = build_rows(recipe.data, recipe.sequence, tokenizer, recipe.train.seed)
    loader = StepLoader(rows, plan_batch(recipe, 1), 0)
    targets = [micro.num_target_tokens for micro in next(loader).micro_batches]
    loader.close()
    assert max(targets) > 2 * min(targets)


@pytest.mark.parametrize(("ranks", "stage"), RUNS[1:])
def test_every_split_and_stage_takes_the_same_steps(stages, ranks, stage):
    wanted, found = stages(1)[0], stages(ranks)[stage]
    assert len(wanted.steps) == 6
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=2e-6)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=1e-4)
    assert found.values("tokens") == wanted.values("tokens")
    equal_weights(found.weights, wanted.weights)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_the_size_of_the_micro_batch_takes_no_part(tmp_path, tiny, stages, run_folder, micro_batch):
    """Where only ranks and accumulation change, a mean of row means would pass; here it does not."""
    wanted, found = stages(1)[0], run_folder(tmp_path / "run")
    assert main(["run", str(tiny), f"train.micro_batch={micro_batch}", "--output", str(found.path)]) == 0
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=2e-6)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=1e-4)
    equal_weights(found.weights, wanted.weights)


def test_training_learns_and_clipping_bites(stages):
    run = stages(1)[0]
    assert run.values("loss")[-1] < run.values("loss")[0] - 0.3
    assert max(run.values("grad_norm")) > 0.5


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_the_exported_folder_loads_here_and_in_plain_transformers(stages, ranks, stage):
    run = stages(ranks)[stage]
    assert all(tensor.numel() for tensor in run.weights.values())
    sparse, dense = sparsetrain.load(run.path / "final"), AutoModelForCausalLM.from_pretrained(run.path / "final")
    for model in (sparse, dense):
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in run.weights.items())
        assert loaded.keys() == run.weights.keys()
    ids = torch.arange(200)[None] % 300
    with torch.no_grad():
        logits = [model(ids, use_cache=False).logits for model in (sparse, dense)]
    # The first blocks see everything; later ones do not.
    torch.testing.assert_close(logits[0][:, :32], logits[1][:, :32], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
