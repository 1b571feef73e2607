"""transformers' Trainer and TRL's SFTTrainer train a sparsified model, packed and padded; accelerate launches them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

import sparsetrain
from sparsetrain.modeling import sparse_layers

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCUMENTS = [list(range(3, 40)), list(range(50, 60)), list(range(20, 75)), list(range(5, 9))]


def padded(features):
    """Rows of one length, padded on the right; as collators of TRL and others make them."""
    length = max(len(each["input_ids"]) for each in features)
    rows = [(each["input_ids"], length - len(each["input_ids"])) for each in features]
    batch = {
        "input_ids": [[*ids, *[0] * short] for ids, short in rows],
        "attention_mask": [[1] * len(ids) + [0] * short for ids, short in rows],
        "labels": [[*ids, *[-100] * short] for ids, short in rows],
    }
    return {name: torch.tensor(value) for name, value in batch.items()}


@pytest.mark.parametrize("method", [{"method": "power", "block": 4, "window": 2, "sinks": 1}, {"method": "sparsek"}])
def test_trainer_learns_the_same_from_packed_and_from_padded_batches(method, tmp_path):
    losses, models = [], []
    for collator in (DataCollatorWithFlattening(), padded):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, use_cache=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = sparsetrain.sparsify(AutoModelForCausalLM.from_config(config, dtype=torch.float32), method)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, learning_rate=1e-2,
        )  # fmt: skip
        data = [{"input_ids": document} for document in DOCUMENTS]
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        models.append(model)
    packed, beside = losses
    assert packed == pytest.approx(beside, rel=1e-4)
    assert packed[1] < packed[0]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_sft_trainer_trains_packed_rows(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft_trainer.py", "1"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = runpy.run_path(str(EXAMPLES / "sft_trainer.py"))["trainer"]
    assert trainer.state.global_step == 1
    assert sparsified(Path("runs/sft_trainer")) == 5


def test_ranks_that_accelerate_launches_run_the_example(tmp_path, monkeypatch, ranks_of):
    """In the environment that ``accelerate launch --cpu --num_processes 2`` makes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    program = f"""
import os, runpy, sys
os.chdir({str(tmp_path)!r})
sys.argv = ["trainer.py", "1"]
trainer = runpy.run_path({str(EXAMPLES / "trainer.py")!r})["trainer"]
assert trainer.accelerator.num_processes == 2 and trainer.state.global_step == 1
"""
    ranks_of(["-c", program], tmp_path / "log", 2).wait()
    assert sparsified(tmp_path / "runs/trainer") == 5


def sparsified(folder):
    """Layers of a saved model that take the method."""
    return sum(method is not None for _, _, method in sparse_layers(sparsetrain.load(folder)))
