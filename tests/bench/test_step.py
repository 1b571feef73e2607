"""``sparsetrain bench step`` on a CPU: a tiny model, every way that needs no GPU, files, and what it refuses."""

from __future__ import annotations

import csv
import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparsetrain.bench import case
from sparsetrain.bench.cases import step
from sparsetrain.bench.contenders import steps
from sparsetrain.bench.contenders.random_run import random_model, random_steps
from sparsetrain.bench.contenders.steps import Way
from sparsetrain.bench.stepping import Enough, StepCase, StepRow, StepTimes, settling_steps
from sparsetrain.bench.table import Report
from sparsetrain.cli import main
from sparsetrain.errors import BenchError
from sparsetrain.methods.sparsek.method import SparseKMethod
from sparsetrain.methods.sparsek.scorer import SparseKScorer
from sparsetrain.recipe import batch_shape, load_recipe
from sparsetrain.world import World


def run_step(recipe: str, settings: list[str], **options) -> list[StepRow]:
    return case.run(step.case(step.Options(recipe=recipe, overrides=settings, **options))).rows


def test_every_way_takes_the_steps_of_a_recipe(tmp_path: Path, capsys) -> None:
    ways = "recipe,dense,bare,plain,hf,flex"
    rows = run_step("tiny-sparsek", ["lora.rank=4"], ways=ways, lengths="96", repeats=1, output=tmp_path)
    assert [row.way for row in rows] == ways.split(",")
    assert [row.attention for row in rows] == ["sparsek", "full", "none", "full", "full", "sparsek"]
    measured = {row.way: row for row in rows if not row.reason}
    assert list(measured) == ["recipe", "dense", "bare", "plain"]
    for row in measured.values():
        assert row.tokens_per_second == pytest.approx(4 * 96 / row.seconds)
    assert "train.liger=on" in rows[4].reason, "Liger's kernels need CUDA"
    assert "no block pattern" in rows[5].reason
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert shown.count("no block pattern") == 1
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["recipe"]["lora"]["rank"] == 4
    assert [row["seconds"] for row in written["rows"]] == [row.seconds for row in rows]
    assert len(list(csv.DictReader((tmp_path / "step.csv").open()))) == 6


def test_the_command_line_takes_settings_and_options(tmp_path: Path, capsys) -> None:
    arguments = ["bench", "step", "tiny-sparsek", "sequence.length=64", "--ways", "bare", "--repeats", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    heads = "tokens way attention seconds tokens/s peak GiB"
    assert any(" ".join(line.split()) == heads for line in shown.out.splitlines())
    assert "A training step of tiny-sparsek, random weights, 1 rank" in shown.out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["step.csv", "step.json"]


def test_steps_with_deepspeeds_offload_are_those_of_the_recipe() -> None:
    """On a CPU nothing is moved; its checkpoints and hooks are the same."""
    settings = ["train.offload_activations=true", "train.activation_checkpointing=layer", "sequence.length=64"]
    settings += ["train.micro_batch=1", "train.global_batch_sequences=2"]
    shape = {"model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sharded = ["deepspeed.stage=3", f"model={json.dumps({'architecture': shape, 'tokenizer': 'sparsetrain:tiny'})}"]
    ways = {"lengths": None, "repeats": 1, "output": None, "ways": "recipe,ds-cpu,ds-hidden"}
    for more in (["lora.rank=4"], sharded):
        rows = run_step("quickstart", [*settings, *more], **ways)
        assert [row.reason for row in rows] == [""] * 3
        assert [row.loss for row in rows] == [rows[0].loss] * 3
        assert [row.grad_norm for row in rows] == [pytest.approx(rows[0].grad_norm, rel=1e-6)] * 3
    (row,) = run_step("tiny-sparsek", settings, **(ways | {"ways": "ds-cpu"}))
    assert "cannot keep what attention.method=sparsek selects" in row.reason
    for name, kept, said in (
        ("recipe,ds-hidden", "none", "ds-hidden: no layer is checkpointed .* set train.activation_checkpointing=layer"),
        ("recipe, ds-cpu", "selective", "ds-cpu: DeepSpeed's .* cannot keep outputs of attention"),
    ):
        checkpointed = [f"train.activation_checkpointing={kept}", "sequence.length=64"]
        with pytest.raises(BenchError, match=f"--ways {said}"):
            step.case(step.Options(recipe="quickstart", overrides=checkpointed, ways=name))


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_of_a_way_is_left_when_the_next_one_is_measured(stage: int) -> None:
    """Memory is measured in it. DeepSpeed's own destroy() leaves an engine of ZeRO-3 where it was."""

    def alive() -> set[int]:
        gc.collect()
        return {id(found) for found in gc.get_objects() if isinstance(found, DeepSpeedEngine | SparseKScorer)}

    before = alive()
    settings = [f"deepspeed.stage={stage}", "sequence.length=64", "train.activation_checkpointing=layer"]
    run_step("tiny-sparsek", settings, ways="recipe", lengths=None, repeats=1, output=None)
    assert alive() <= before


def test_a_way_whose_loss_is_not_finite_says_so_and_leaves_no_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["train.lr=1000", "train.warmup=0", "train.optimizer.weight_decay=1000", "sequence.length=64"]
    (row,) = run_step("tiny-sparsek", settings, ways="recipe", lengths=None, repeats=9, output=None)
    assert "with a gradient norm of" in row.reason
    assert list(tmp_path.iterdir()) == []


def test_the_warm_up_of_a_method_is_over(monkeypatch) -> None:
    """Its first steps read eight times the keys, and their number would decide what is timed."""
    selected = []
    begin = SparseKMethod.begin_step

    def watched(method: SparseKMethod, step: int, steps: int) -> None:
        begin(method, step, steps)
        selected.append(method.training_topk)

    monkeypatch.setattr(SparseKMethod, "begin_step", watched)
    settings = ["sequence.length=64", "attention.topk=8", "attention.topk_start=32", "attention.topk_steps=0.5"]
    run_step("tiny-sparsek", settings, ways="recipe", lengths=None, repeats=1, output=None)
    assert len(selected) > 0
    assert set(selected) == {8}


def test_rows_are_documents_that_ranks_sharing_a_sequence_cut_alike() -> None:
    recipe = load_recipe("tiny-sparsek", ["sequence.length=96", "sequence.parallel=3", "train.micro_batch=3"]).recipe
    plan = batch_shape(recipe, 3).with_steps(1)
    parts = [next(random_steps(512, plan, World(rank, 3, torch.device("cpu")))).micro_batches[0] for rank in range(3)]
    assert [part.input_ids.shape[1] for part in parts] == [96, 96, 96]
    assert all(part.cu_seqlens.tolist() == [0, 96, 192, 288] for part in parts)
    assert not torch.equal(parts[0].input_ids, parts[1].input_ids)
    assert [part.num_target_tokens for part in parts] == [95, 95, 95]


def test_ranks_stop_a_long_way_at_the_same_step(monkeypatch) -> None:
    """Where one rank of several measures more than 20 s, the others stop too."""
    watch = StepTimes(World(0, 2, torch.device("cpu")), settling=1)
    monkeypatch.setattr(World, "largest", lambda world, seconds: seconds + 2.0)
    watch(30.0)
    watch(17.0)
    with pytest.raises(Enough):
        watch(19.0)
    assert watch.seconds == [19.0, 21.0]


def test_steps_that_settle_are_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(World, "largest", lambda world, seconds: seconds)
    plain, sharded = (load_recipe("tiny-sparsek", [f"deepspeed.stage={stage}"]).recipe for stage in (2, 3))
    assert (settling_steps(plain), settling_steps(sharded)) == (1, 2)
    watch = StepTimes(World(0, 1, torch.device("cpu")), settling=2)
    for seconds in (9.0, 5.0, 2.0):
        watch(seconds)
    assert watch.seconds == [2.0]
    # However long they take: a first step of 41.4 s was shown once where a step takes 11.2.
    watch = StepTimes(World(0, 1, torch.device("cpu")), settling=2)
    for seconds in (41.4, 25.0, 11.2):
        watch(seconds)
    assert watch.seconds == [11.2]


def test_no_length_shows_a_step_that_settles(monkeypatch) -> None:
    """At a second length the kernels are compiled, but memory is not allocated yet."""
    told = []

    def loop(recipe, plan, world, after_step) -> None:
        told.append(plan.steps)
        for seconds in [1000.0] * (plan.steps - 1) + [30.0]:
            after_step(seconds)

    monkeypatch.setattr(steps, "WAYS", (Way("recipe", loop),))
    rows = run_step("tiny-sparsek", [], ways="recipe", lengths="64,96", repeats=1, output=None)
    assert [row.seconds for row in rows] == [30.0, 30.0]
    assert told == [2, 2]


def test_a_way_that_is_asked_for_twice_is_measured_twice(monkeypatch) -> None:
    times = iter([1.0, 1.0, 2.0, 3.0, 3.0, 4.0])

    def loop(recipe, plan, world, after_step) -> None:
        for _ in range(plan.steps):
            after_step(next(times))

    monkeypatch.setattr(steps, "WAYS", (Way("recipe", loop),))
    rows = run_step("tiny-sparsek", [], ways="recipe,recipe", lengths="64", repeats=2, output=None)
    assert [row.seconds for row in rows] == [1.5, 3.5]


def test_a_rank_that_fails_among_others_ends_the_benchmark(monkeypatch) -> None:
    """Going on to the next way would leave the others waiting for it in a collective."""

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "WAYS", (Way("recipe", out_of_memory),))
    bench = step.case(step.Options(recipe="tiny-sparsek", ways="recipe"))

    def measured(bench: StepCase) -> list[StepRow]:
        report = Report("step", bench.facts())
        list(case.fill(report, bench, lambda line: None))
        return report.rows

    assert [row.reason for row in measured(bench)] == ["out of memory"]
    with pytest.raises(BenchError, match="recipe at 1,024 tokens, rank 1: out of memory"):
        measured(replace(bench, world=World(1, 2, torch.device("cpu"))))


def test_the_model_measured_has_what_the_recipe_overrides() -> None:
    recipe = load_recipe("pretrain-tiny", ["model.config_overrides={num_hidden_layers: 2}"]).recipe
    assert random_model(recipe, torch.device("cpu")).config.num_hidden_layers == 2


def test_weights_in_four_bits_are_refused() -> None:
    with pytest.raises(BenchError, match=r"lora.quantize_base=4bit: .* set it to none"):
        run_step("qwen3-32b-sparsek-qlora-32k", [], ways="recipe", lengths=None, repeats=1, output=None)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"ways": "recipe,flash"}, "--ways flash: .*hf-bare"), ({"lengths": "many"}, "--lengths many")],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(BenchError, match=named):
        run_step("tiny-sparsek", [], **{"ways": "recipe", "lengths": None, "repeats": 1, "output": None, **options})
