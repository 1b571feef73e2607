"""A run that outgrows its CUDA device says how much it had, for which sequence, and settings that do help."""

from __future__ import annotations

import gc
import re

import pytest
import torch

from sparsetrain.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GIB = 2.5
# Eight MLPs that keep 0.5 GiB each, beside 0.5 GiB of weights and optimizer state: twice what there is.
WIDE = [
    *("model.architecture.hidden_size=128", "model.architecture.intermediate_size=8192"),
    *("model.architecture.num_attention_heads=2", "model.architecture.num_key_value_heads=1"),
    *("model.architecture.num_hidden_layers=8", "sequence.length=8192", "train.global_batch_sequences=1"),
    *("train.steps=2", "train.warmup=0", "train.loss_chunk=4096", "deepspeed.stage=0"),
]


@pytest.fixture(autouse=True)
def _limited():
    """torch's allocator refuses what this process asks for beyond ``GIB``; other processes have the rest."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + GIB * 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def test_the_message_names_peak_sequence_and_settings(tiny, tmp_path, capfd):
    earlier = torch.cuda.memory_reserved() / 2**30
    assert main(["run", str(tiny), *WIDE, "--output", str(tmp_path / "run")]) == 3
    said = capfd.readouterr().err
    assert "Traceback" not in said
    message = f"\n{said}".partition("\nerror: ")[2]
    assert re.match(r"out of memory in step 1, (forward|backward) \(CUDA out of memory\. Tried to allocate ", message)
    peak, total = re.search(r"the peak was ([\d.]+) GiB of the ([\d.]+) GiB of ", message).groups()
    assert GIB / 2 < float(peak) < GIB + earlier + 0.1
    assert float(total) == pytest.approx(torch.cuda.mem_get_info()[1] / 2**30, abs=0.1)
    assert f"GiB of {torch.cuda.get_device_name()}" in message
    assert "with 1 row of 8,192 tokens at once" in message
    advised = message.partition("What would help most: ")[2].partition(". ")[0].split("; ")
    assert [setting.partition(": ")[0] for setting in advised] == [
        "train.activation_checkpointing",
        "train.loss_chunk",
        "train.mlp_chunk",
    ]


def test_the_first_setting_it_names_is_enough(tiny, tmp_path):
    advice = "train.activation_checkpointing=layer"
    assert main(["run", str(tiny), *WIDE, advice, "--output", str(tmp_path / "run")]) == 0
