from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

import pytest

from sparsetrain.cli import main
from sparsetrain.doctor import diagnosis, installation, machine, needs
from sparsetrain.doctor.finding import Finding
from sparsetrain.errors import RecipeError
from sparsetrain.plan import disk
from sparsetrain.plan.disk import count_parameters
from sparsetrain.plan.shape import find_shape
from sparsetrain.recipe import load_recipe

ROOT = Path(__file__).parents[1]
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Embedding and output, then per layer q and o, k and v, the MLP and two norms; and the last norm.
PARAMETERS = 2 * 100 * 16 + 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16) + 16


@pytest.fixture
def recipe(tmp_path):
    def load(*overrides: str):
        return load_recipe("qwen3-0.6b-power-32k", [f"output={tmp_path}/runs/x", *overrides]).recipe

    return load


def test_the_tested_range_is_the_one_that_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    floors = dict(
        re.findall(r"^([\w-]+) >= ([\d.]+)", setup["options"]["install_requires"].strip(), flags=re.MULTILINE)
    )
    assert setup["options"]["python_requires"] == f">={installation.PYTHON[0]}"
    for package, (oldest, newest) in installation.TESTED.items():
        assert floors[package] == oldest
        assert tuple(map(int, oldest.split("."))) <= tuple(map(int, newest.split(".")))


def test_the_newest_version_tried_is_the_pinned_one():
    # torch says which triton it wants, so that has an upper end only.
    pins = dict(re.findall(r"^([\w-]+)[=<]=([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for package, (_, newest) in installation.TESTED.items():
        assert f"{pins[package]}.".startswith(f"{newest}.")


@pytest.mark.parametrize(
    ("found", "status"),
    [("2.5.1", "fail"), ("2.6.0", "ok"), ("2.13.0+cpu", "ok"), ("2.13.4", "ok"), ("2.14.0", "warn"), ("3.0", "warn")],
)
def test_versions_are_held_against_the_range(found, status):
    finding = installation.check_version("torch", found, "2.6", "2.13")
    assert finding.status == status
    assert bool(finding.fix) == (status != "ok")


def test_versions_of_this_environment_are_found():
    findings = {finding.check: finding for finding in installation.check_versions()}
    assert findings["python"].status == "ok"
    assert findings["torch"].status in ("ok", "warn")
    assert {"transformers", "deepspeed", "datasets"} <= set(findings)


def test_a_missing_package_is_found(monkeypatch):
    monkeypatch.setitem(installation.TESTED, "no-such-package", ("1.0", "2.0"))
    (finding,) = [finding for finding in installation.check_versions() if finding.check == "no-such-package"]
    assert finding.status == "fail"
    assert finding.fix == "pip install 'no-such-package>=1.0'"


def test_old_locks_fail_and_young_ones_warn(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine.check_extension_locks().status == "ok"
    old, young = tmp_path / "py311_cpu" / "a" / "lock", tmp_path / "py311_cpu" / "b" / "lock"
    for lock in (old, young):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    first, second = machine.check_extension_locks()
    assert (first.status, first.fix) == ("fail", f"rm '{old}'")
    assert (second.status, str(young) in second.found) == ("warn", True)


def test_a_shadowed_kernels_package_is_found(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "op.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert installation.check_kernels_package().status == "ok", "a folder without __init__.py is no package"
    (tmp_path / "kernels" / "__init__.py").touch()
    finding = installation.check_kernels_package()
    assert finding.status == "fail"
    assert str(tmp_path / "kernels") in finding.found


def test_the_genuine_kernels_package_is_accepted(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert installation.check_kernels_package() == Finding("ok", "kernels package", "Hugging Face's, 0.18.2")


def test_a_busy_port_is_found(monkeypatch):
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        finding = machine.check_port()
        assert finding.status == "warn"
        assert str(port) in finding.found
        assert f"--master_port {port + 1}" in finding.fix
    assert machine.check_port().status == "ok"


def test_caches_need_a_folder_that_can_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert machine.check_caches().status == "ok"
    # There not even root may write.
    (tmp_path / "not").symlink_to("/proc")
    finding = machine.check_caches()
    assert finding.status == "fail"
    assert str(tmp_path) in finding.found
    assert "export HF_HOME=" in finding.fix


@pytest.mark.parametrize(("gpus", "size", "status"), [(8, 2**26, "warn"), (8, 2**34, "ok"), (1, 2**26, "ok")])
def test_several_gpus_need_shared_memory(monkeypatch, tmp_path, gpus, size, status):
    import torch

    usage = shutil.disk_usage("/")._replace(total=size)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(machine, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert machine.check_shared_memory().status == status


def test_sparse_attention_agrees_with_dense_on_this_machine():
    finding = installation.check_attention()
    assert finding.status == "ok", finding.found
    assert float(re.search(r"error (\S+)", finding.found)[1]) < 2e-3


def test_wrong_attention_is_found(monkeypatch):
    import sparsetrain_kernels

    correct = sparsetrain_kernels.block_pattern_attention
    monkeypatch.setattr(sparsetrain_kernels, "block_pattern_attention", lambda *a: correct(*a) * 1.01)
    assert installation.check_attention().status == "fail"


def test_offload_needs_a_compiler(monkeypatch, tmp_path, recipe):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.check_compiler(recipe()).status == "ok"
    assert machine.check_compiler(recipe("deepspeed.offload_optimizer=cpu")).status == "fail"


def test_wandb_login_matters_only_online(monkeypatch, tmp_path, recipe):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert machine.check_wandb(recipe("wandb.mode=offline")).found.startswith("offline in the recipe")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert machine.check_wandb(recipe("wandb.mode=online")).found == "login found in WANDB_API_KEY"


@pytest.mark.parametrize(
    ("dtype", "keep", "export", "bytes_a_parameter"),
    [("bfloat16", 2, "true", 12 * 3 + 2), ("float32", 1, "false", 12 * 2)],
)
def test_disk_room_is_what_the_checkpoints_take(monkeypatch, recipe, dtype, keep, export, bytes_a_parameter):
    settings = recipe(f"model.dtype={dtype}", f"checkpoint.keep_last={keep}", f"checkpoint.export={export}")
    needed = 600_000_000 * bytes_a_parameter
    usage = shutil.disk_usage("/")
    for free, status in ((needed - 1, "fail"), (needed + 1, "warn"), (2 * needed, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        finding = needs.check_disk(settings)
        assert finding.status == status
        assert "0.6B parameters (by its name)" in finding.found


def test_a_run_folder_that_cannot_be_written_is_named(recipe):
    finding = needs.check_disk(recipe("output=/proc/x"))
    assert (finding.status, finding.fix) == ("fail", "choose another with output=...")
    assert finding.found.startswith("nothing can be written in /proc (No such file or directory), and the run folder")


@pytest.mark.parametrize(
    ("optimizer", "overrides", "saved"),
    [
        ("{states: bfloat16}", ["model.dtype=bfloat16"], "10.1 GiB"),
        ("{name: adamw_8bit}", [], "10.1 GiB"),
        ("{name: adafactor}", ["deepspeed.stage=0"], "6.7 GiB"),
        ("{name: muon}", [], "15.2 GiB"),
        ("{name: muon}", ["model.path=a/base-0.6B"], "20.1 GiB"),  # how much of it are matrices is not known
    ],
)
def test_disk_room_is_that_of_the_optimizers_states(recipe, optimizer, overrides, saved):
    few = ["checkpoint.keep_last=2", "checkpoint.export=false", f"train.optimizer={optimizer}"]
    assert needs.check_disk(recipe(*few, *overrides)).found.startswith(f"{saved} for 3 checkpoints of 0.6B parameters")


def test_the_batch_is_that_of_so_many_gpus(monkeypatch, recipe, capsys):
    settings = recipe("train.global_batch_sequences=8", "train.global_batch_tokens=null")
    batch = "1 row x 2 accumulation x 4 ranks = 8 rows"
    assert batch in needs.check_machine(settings, 4).found
    for here, status, end in ((0, "warn", "this machine has no GPU that torch can use, of 4"), (4, "ok", batch[-6:])):
        monkeypatch.setattr("torch.cuda.device_count", lambda here=here: here)
        finding = needs.check_machine(settings, 4)
        assert finding.status == status
        assert end in finding.found
    with pytest.raises(RecipeError, match=r"is not a multiple of train\.micro_batch=1 x 3 ranks"):
        needs.check_machine(settings, 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    finding = needs.check_machine(settings, 4)
    assert (finding.status, finding.found.endswith("this machine has 2 GPUs of 4")) == ("warn", True)
    assert main(["doctor", "--gpus", "4"]) == 2
    assert "--gpus is of a run: name its recipe too" in capsys.readouterr().err


def test_disk_room_of_adapters_is_that_of_what_is_trained(monkeypatch, tmp_path):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40 * 2**30))
    asked = []
    monkeypatch.setattr(disk, "find_shape", lambda section: asked.append(section.path) or find_shape(section))
    few = ["lora.train_embeddings=false", "lora.train_norms=false", f"output={tmp_path}"]
    known = load_recipe("qwen3-8b-power-dpo-32k", few).recipe
    finding = needs.check_disk(known)
    assert finding.status == "ok"
    assert "M trained parameters of 8B parameters (by its name)" in finding.found
    assert asked == [known.model.path], "a config is read once"
    unknown = load_recipe("qwen3-8b-power-dpo-32k", [*few, "model.path=a/base-8B"]).recipe
    finding = needs.check_disk(unknown)
    assert finding.status == "warn"
    assert "if all were trained" in finding.found


def test_parameters_are_counted_in_the_files_of_a_local_model(tmp_path, recipe):
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    assert count_parameters(recipe(f"model.path={tmp_path}")) == (24, "counted in its files")


def test_parameters_are_counted_by_config_and_architecture(tmp_path, recipe):
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE))
    assert count_parameters(recipe(f"model.path={tmp_path}", "attention.dense_layers=[]")) == (
        PARAMETERS,
        "by its config",
    )
    model = json.dumps({"architecture": ARCHITECTURE, "tokenizer": "t"})
    assert count_parameters(recipe(f"model={model}", "attention.dense_layers=[]")) == (
        PARAMETERS,
        "by its architecture",
    )


@pytest.mark.parametrize(("path", "count"), [("a/Llama-3.1-8B", 8e9), ("a/SmolLM-135M-x", 135e6), ("a/gpt-oss", None)])
def test_parameters_are_read_from_the_name_at_last(recipe, path, count):
    found = count_parameters(recipe(f"model.path={path}"))
    assert found == (None if count is None else (int(count), "by its name"))


def test_a_broken_check_is_a_finding(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "no number")
    findings = {finding.check: finding for finding in diagnosis.run_checks()}
    assert findings["port"].status == "fail"
    assert "ValueError" in findings["port"].found


def test_diagnose_prints_fixes_and_fails_if_one_check_does(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / ("long" * 30) / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    assert diagnosis.diagnose() == 2
    assert f"fail extension locks: rm '{lock}'\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("model.dtype=float16", "model.dtype=float16 cannot be trained on a cpu"),
        ("deepspeed.offload_optimizer=cpu", "deepspeed.offload_optimizer: cpu moves"),
        ("lora={quantize_base: 4bit}", "lora.quantize_base=4bit: bitsandbytes computes on CUDA"),
    ],
)
def test_what_this_machine_cannot_train_is_found(monkeypatch, recipe, change, fault):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match=re.escape(fault)):
        needs.check_machine(recipe(change))


def test_an_engine_that_would_run_the_dense_model_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finding = installation.check_serving()
    assert finding.status == "ok"
    assert finding.found.startswith(
        "vLLM, SGLang and `transformers serve` load an exported folder, but attend to every"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name == "vllm" else find(name))
    finding = installation.check_serving()
    assert finding.status == "warn"
    assert "Installed: vLLM" in finding.found
    assert "sparsetrain.load(folder).generate" in finding.fix
