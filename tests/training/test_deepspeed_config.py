from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import plan_batch
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.distributed.deepspeed_config import IDLE, OWNED_BY_RECIPE, deepspeed_config


@pytest.fixture
def config():
    """``config(deepspeed, ranks=2, **train)``: the JSON of a recipe with micro batch 2 and global batch 8."""

    def build(deepspeed=None, ranks=2, dtype="bfloat16", trained=None, **train):
        recipe = Recipe.model_validate(
            {
                "model": {"path": "some/model", "dtype": dtype},
                "attention": {"method": "power", "block": 16},
                "data": {"sources": [{"synthetic": "passkey"}]},
                "sequence": {"length": 256},
                "train": {"steps": 5, "lr": 1e-3, "micro_batch": 2, "global_batch_sequences": 8, **train},
                "deepspeed": deepspeed or {},
            }
        )
        return deepspeed_config(recipe, plan_batch(recipe, ranks), trained)

    return build


@pytest.fixture
def refusal(config):
    """The message with which a DeepSpeed JSON is refused."""

    def message(given, **section):
        with pytest.raises(RecipeError) as refused:
            config({"config": given, **section})
        return str(refused.value)

    return message


def test_the_batch_follows_from_the_recipe(config):
    found = config()
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["train_batch_size"] == 8


def test_the_buffer_of_gradients_is_not_larger_than_what_is_trained(config):
    def bucket(trained, **given):
        return config({"config": {"zero_optimization": given}}, trained=trained)["zero_optimization"][
            "reduce_bucket_size"
        ]

    assert bucket(1000) == 1000
    assert bucket(8_000_000_000) == 500_000_000
    assert bucket(1000, reduce_bucket_size=20) == 20
    assert "reduce_bucket_size" not in config()["zero_optimization"]


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("bfloat16", True, False), ("float16", False, True), ("float32", False, False)]
)
def test_the_precision_follows_from_the_dtype(config, dtype, bf16, fp16):
    found = config(dtype=dtype)
    assert found["bf16"]["enabled"] is bf16
    assert found["fp16"]["enabled"] is fp16


def test_stage_offload_and_clipping_follow_from_the_recipe(config):
    found = config({"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, max_grad_norm=0.25)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert found["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert found["gradient_clipping"] == 0.25
    assert config(max_grad_norm=None)["gradient_clipping"] == 0.0


def test_deepspeeds_meter_of_speed_is_off_unless_it_is_asked_for(config):
    """It would wait for the device before each forward pass."""
    wanted = {"throughput": {"enabled": True}}
    assert config()["timers"] == {"throughput": {"enabled": False}}
    assert config({"config": {"timers": wanted}})["timers"] == wanted


def test_a_json_of_the_users_own_is_completed(config, tmp_path):
    given = {"wall_clock_breakdown": True, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    inline, read = config({"config": given}), config({"config": str(file)})
    assert inline == read
    assert inline["wall_clock_breakdown"] is True
    assert inline["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "offload_param" not in inline["zero_optimization"]
    assert {**config(), "wall_clock_breakdown": True}.keys() == inline.keys()
    assert given == {"wall_clock_breakdown": True, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}


@pytest.mark.parametrize(
    ("given", "place", "there", "here"),
    [
        ({"train_batch_size": 16}, "train_batch_size", "16", "8"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps", "1", "2"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", "4", "2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping", "0.5", "1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled", "False", "True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "True", "False"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "3", "2"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "'cpu'",
            "'none'",
        ),
    ],
)
def test_a_contradiction_names_both_sides(refusal, given, place, there, here):
    assert f"{place} is {there} there, but the recipe makes it {here}" in refusal(given)


@pytest.mark.parametrize("given", [{"train_batch_size": "auto"}, {"zero_optimization": {"reduce_bucket_size": "auto"}}])
def test_auto_is_refused_wherever_it_stands(refusal, given):
    assert "'auto', which only Hugging Face's Trainer understands" in refusal(given)


@pytest.mark.parametrize("key", OWNED_BY_RECIPE)
def test_what_the_recipe_decides_is_refused(refusal, key):
    assert f"has {key}, which the recipe decides: use {OWNED_BY_RECIPE[key]}" in refusal({key: {}})


@pytest.mark.parametrize("key", IDLE)
def test_what_would_do_nothing_is_refused(refusal, key):
    assert f"has {key}, which has no use in a run: {IDLE[key]}; leave it out" in refusal({key: {}})


def test_an_unknown_key_is_answered_with_the_nearest(refusal):
    assert "did you mean zero_optimization?" in refusal({"zero_optimisation": {}})
    message = refusal({"xyzzy": 1})
    assert "xyzzy, which is not supported here" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, "ratio is 0.3, under which checkpoints"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "is True, under which checkpoints"),
        ({"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow is {}, under which checkpoints"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "is False, under which train.on_nonfinite"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow is False, under which train.on_nonfinite"),
    ],
)
def test_what_a_run_relies_on_cannot_be_switched_off(config, refusal, given, said):
    section = {"stage": 3, "offload_optimizer": "cpu"}
    assert said in refusal(given, **section)
    config({"config": {"zero_optimization": {"offload_optimizer": {"ratio": 1.0}}}, **section})


def test_a_section_must_be_an_object(refusal):
    assert "zero_optimization must be an object, not 2" in refusal({"zero_optimization": 2})
    assert "zero_optimization.offload_param must be an object" in refusal(
        {"zero_optimization": {"offload_param": "cpu"}}
    )


def test_a_file_that_is_no_json_is_named_with_its_line(refusal, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{\n  "bf16": {"enabled": true},\n  fp16\n}')
    assert f"{file} line 3 is not JSON" in refusal(str(file))
    file.write_text("[]")
    assert "must hold a JSON object, not list" in refusal(str(file))
    assert f"{tmp_path}/none.json: cannot be read" in refusal(str(tmp_path / "none.json"))


def test_it_is_made_without_torch():
    code = "import sys, sparsetrain.training.distributed.deepspeed_config; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"elastic_checkpoint": True}}, "under which nothing changes"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is True, under which deepspeed.offload_optimizer"),
        ({"zero_optimization": {"cpu_offload_param": True}}, "under which deepspeed.offload_parameters of the recipe"),
        ({"steps_per_print": 0}, "steps_per_print=0"),
        ({"steps_per_print": "often"}, "steps_per_print='often'"),
        ({"steps_per_print": True}, "steps_per_print=True"),
    ],
)
def test_a_setting_that_would_break_the_run_is_refused(refusal, given, said):
    assert said in refusal(given)


def test_linear_layers_keep_gathered_weights_where_a_layer_is_recomputed_at_a_time(config):
    def efficient(stage, checkpointing, **given):
        section = {"stage": stage, "config": {"zero_optimization": given}}
        return config(section, activation_checkpointing=checkpointing)["zero_optimization"].get(
            "memory_efficient_linear"
        )

    assert efficient(3, "layer") is efficient(3, "selective") is False
    assert efficient(3, "none") is efficient(2, "layer") is None
    assert efficient(3, "layer", memory_efficient_linear=True) is True
