"""Every optimizer trains in a real engine, keeps its state in the form that the recipe names, and resumes bit for bit.

Beyond these, each was tried at every ZeRO stage that it is allowed at, in fp32 and bf16.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from sparsetrain.cli import main
from sparsetrain.plan.disk import room_of
from sparsetrain.recipe import load_recipe, plan_batch
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config
from sparsetrain.training.distributed.engine import destroy, own_linear

MUON = "train.optimizer={name: muon, adam_lr: 0.01, weight_decay: 0.1}"
BRIEF = ("train.steps=4", "checkpoint.every=2")


@pytest.fixture
def state():
    """``state(run, step)``: all tensors of a checkpoint, by kind, first element and parameter."""

    def read(run, step):
        found = {}
        for file in sorted((run.path / f"checkpoints/step-{step:06d}").glob("*.safetensors")):
            found |= load_file(file)
        return found

    return read


@pytest.fixture
def halved(tmp_path, run_folder):
    """``halved(run)``: a copy of a run that ended half-way."""

    def copy(run):
        shutil.copytree(run.path, tmp_path / "halved")
        shutil.rmtree(tmp_path / "halved/checkpoints/step-000004")
        shutil.rmtree(tmp_path / "halved/final", ignore_errors=True)
        return run_folder(tmp_path / "halved")

    return copy


def kinds(state, name):
    """What a checkpoint keeps of a parameter: the dtype by kind."""
    return {key.split("/")[0]: tensor.dtype for key, tensor in state.items() if key.endswith(name)}


F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
ADAM = {"weight": F32, "exp_avg": F32, "exp_avg_sq": F32, "step": F32}
QUERY, NORM, HEAD = "layers.0.self_attn.q_proj.weight", "layers.0.input_layernorm.weight", "lm_head.weight"
CASES = {
    "bf16 states": (
        ("model.dtype=bfloat16", "train.optimizer.states=bfloat16", "deepspeed.stage=3"),
        {QUERY: ADAM | {"weight": BF16, "exp_avg": BF16, "exp_avg_sq": BF16}},
        "AdamW, master weights in bfloat16, gradients summed in float32",
    ),
    "8 bits": (
        ("train.optimizer={name: adamw_8bit, eps: 1e-3}", "deepspeed.stage=2"),
        # The group without decay is a single tensor to it, of more than 4,096 elements.
        {name: {"weight": F32, "state1": U8, "state2": U8} for name in (QUERY, HEAD)},
        "AdamW8bit, master weights in float32, gradients summed in float32",
    ),
    "muon": (
        ("model.dtype=bfloat16", MUON, "deepspeed.stage=1"),
        {QUERY: {"weight": F32, "momentum_buffer": F32}, NORM: ADAM, HEAD: ADAM, "embed_tokens.weight": ADAM},
        "MuonWithAuxAdam, master weights in float32, gradients summed in float32",
    ),
    "adafactor": (
        ("train.optimizer={name: adafactor, weight_decay: 0.1}", "deepspeed.stage=0"),
        {QUERY: {"weight": F32, "exp_avg_sq_row": F32, "exp_avg_sq_col": F32, "step": F32}},
        "FiniteAdafactor, master weights in float32, gradients summed in float32",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_same_state_bit_for_bit(tmp_path, tiny, run_folder, state, halved, capfd, case):
    overrides, kept, said = CASES[case]
    if case == "8 bits" and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    command = ["run", str(tiny), *overrides, *BRIEF, "checkpoint.export=false", "--output"]
    whole = run_folder(tmp_path / "whole")
    assert main([*command, str(whole.path)]) == 0
    assert f"optimizer: {said}\n" in capfd.readouterr().err
    resumed = halved(whole)
    assert main([*command, str(resumed.path), "--resume"]) == 0
    found, wanted = state(resumed, 4), state(whole, 4)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for name, dtypes in kept.items():
        assert dtypes.items() <= kinds(wanted, name).items()
    assert whole.values("loss")[-1] < whole.values("loss")[0] - 0.5
    # Counts of steps are left out, and rows and columns of Adafactor: of so small a model they are a twentieth.
    planned = room_of(load_recipe(tiny, [*overrides, *BRIEF]).recipe).checkpoint
    saved = sum(tensor.nbytes for tensor in wanted.values())
    assert saved == pytest.approx(planned, rel=0.05 if case == "adafactor" else 1e-3)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_8_bit_states_of_another_division_are_refused_with_the_division(
    tmp_path, tiny, refused, of_two_ranks, no_model
):
    command = ["run", str(tiny), "train.optimizer={name: adamw_8bit, eps: 1e-3}", "checkpoint.export=false"]
    given = [*command, "--output", str(tmp_path / "run")]
    assert main([*given, "train.steps=2", "deepspeed.stage=2"]) == 0
    other = "deepspeed={stage: 3, config: {zero_optimization: {sub_group_size: 5000}}}"
    told = refused(*given, "train.steps=3", other, "--resume")
    assert "step-000002 has 8-bit optimizer states" in told
    assert "resume on 1 rank with deepspeed.stage=2 and the same deepspeed.config" in told
    # Another number of ranks divides them otherwise in any case, which is seen without a model.
    of_two_ranks(tmp_path / "run/checkpoints/step-000002")
    no_model()
    told = refused(*given, "train.steps=3", "--resume")
    assert "resume on 2 ranks with deepspeed.stage=2 and the same deepspeed.config" in told


def test_muon_on_two_ranks_is_that_on_one_and_resumes_on_one(tmp_path, tiny, start, run_folder, halved):
    """Half of a matrix on each rank: Muon needs it whole."""
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    start(two.path, MUON, *BRIEF, "deepspeed.stage=2", "checkpoint.export=false", ranks=2).wait()
    assert main(["run", str(tiny), MUON, *BRIEF, "deepspeed.stage=3", "--output", str(one.path)]) == 0
    assert two.values("loss") == pytest.approx(one.values("loss"), rel=1e-4)
    resumed = halved(two)
    command = ["run", str(tiny), MUON, *BRIEF, "deepspeed.stage=1", "--resume", "checkpoint.export=false"]
    assert main([*command, "--output", str(resumed.path)]) == 0
    assert resumed.values("loss") == pytest.approx(two.values("loss"), rel=1e-4)
    assert (one.path / "final/model.safetensors").is_file()


WITHOUT_A_COMPILER = """
import sys
from sparsetrain.cli import main
assert main(sys.argv[1:]) == 0
from deepspeed.runtime.zero.muon import original_muon
assert not hasattr(original_muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="Muon is compiled on a GPU")
def test_zero_compiles_no_muon_where_it_imports_it(tmp_path, tiny, ranks_of):
    command = ["-c", WITHOUT_A_COMPILER, "run", str(tiny), "train.steps=2", "checkpoint.export=false"]
    ranks_of([*command, "--output", str(tmp_path / "run")], tmp_path / "log").wait()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "total"), [("auto", 263.0), ("model", 256.0)])
def test_bfloat16_sums_lose_small_gradients(tiny_recipe, world, stage, dtype, total):
    """A gradient of 256 and seven of 1: between 256 and 258, bfloat16 has no number."""
    import deepspeed

    overrides = ["model.dtype=bfloat16", "train.max_grad_norm=null", "train.global_batch_sequences=8"]
    recipe = tiny_recipe(*overrides, f"deepspeed={{stage: {stage}, gradient_dtype: {dtype}}}")
    module = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    config = deepspeed_config(recipe, plan_batch(recipe, 1), 1)
    with own_linear():
        engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
        for gradient in [256.0] + 7 * [1.0]:
            loss = engine(torch.full((1, 1), gradient, dtype=BF16)).sum()
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
    assert float(engine.get_global_grad_norm()) == total
    destroy(engine)


REFUSED = [
    (("train.optimizer.name=muon", "deepspeed.stage=0"), "muon is an optimizer of ZeRO here, and deepspeed.stage=0"),
    (("train.optimizer.name=adamw_8bit", "deepspeed.stage=0"), "set that to 1, which on one GPU shards nothing"),
    (("train.optimizer.name=adafactor",), "deepspeed.stage=2 gives an optimizer flat parts of matrices"),
    (("train.optimizer.name=muon", "deepspeed.offload_optimizer=cpu"), "muon has no version for a CPU"),
    (("train.optimizer.states=bfloat16",), "bfloat16 weights, and model.dtype=float32"),
    (("train.optimizer={name: muon, states: bfloat16}",), "bfloat16 states are those of adamw"),
    (("train.optimizer.momentum=0.9",), "momentum is a setting of muon, and train.optimizer.name=adamw"),
    (("train.optimizer={name: adafactor, eps: 1e-4}", "deepspeed.stage=0"), "eps is a setting of adamw"),
    (("deepspeed={stage: 0, gradient_dtype: float32}",), "float32 needs deepspeed.stage 1, 2 or 3, not 0"),
    (("model.dtype=float16", "deepspeed.gradient_dtype=float32"), "float32 sums are for model.dtype=bfloat16"),
    (("train.cooldown=0.3",), "cooldown=0.3 belongs to train.schedule: wsd, and that is cosine"),
    (("train.schedule=wsd", "train.cooldown=5"), "take 2 and 5 steps of a run that has 6"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(tiny, refused, tmp_path, overrides, said):
    assert said in refused("run", str(tiny), *overrides, "--output", str(tmp_path / "run"))


def test_a_missing_bitsandbytes_is_named_with_the_extra(tiny, refused, tmp_path, monkeypatch):
    from sparsetrain.training.distributed import optimizers

    monkeypatch.setattr(optimizers.util, "find_spec", lambda name: None)
    overrides = ["train.optimizer.name=adamw_8bit", "--output", str(tmp_path / "run")]
    assert "pip install sparsetrain[quantize]" in refused("run", str(tiny), *overrides)
