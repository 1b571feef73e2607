"""Two processes on one CUDA device share a row, over gloo: loss, gradient and memory beside a process alone. A script.

    python shared_row.py FOLDER METHOD [FIELD=VALUE ...]

Adapters are trained, with attention outputs kept and layer inputs in host memory. Writes ``FOLDER/METHOD.RANK.json``.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain import sparsify
from sparsetrain.data import collate
from sparsetrain.data.batch import IGNORE, Row
from sparsetrain.data.sequence_part import collate_part
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.modeling.attention.passes import planned_arguments
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.training.loss import CausalLMLoss, pass_tensors
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.tiled_mlp import tile_mlps

RANKS = 2
METHODS = {
    "power": {"method": "power", "block": 128, "window": 2, "sinks": 1, "dense_layers": [0]},
    "sparsek": {"method": "sparsek", "topk": 256, "window": 256, "sinks": 4},
    "recycled": {"method": "recycled", "every": [32], "keep": 128, "sinks": 1, "recent": 16, "text_prefix": "none"},
}
SIZE = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tokens": 8192,
}
DEVICE = torch.device("cuda", 0)


def main(folder: Path, method: str, size: dict[str, int]) -> None:
    """Run both processes to their end."""
    with tempfile.TemporaryDirectory() as meeting:
        processes.spawn(_rank, (folder, method, size, f"{meeting}/store"), RANKS)


def _rank(rank: int, folder: Path, method: str, size: dict[str, int], meeting: str) -> None:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    tokens = size.pop("tokens")
    row, half = _row(tokens, size["vocab_size"]), _row(tokens // RANKS, size["vocab_size"])
    ulysses = Ulysses(dist.group.WORLD)
    shared, gradient, peak = _step(method, size, row, ulysses)
    for number in (shared, gradient):
        dist.all_reduce(number)
    found: dict[str, Any] = {"loss": shared.item(), "norm": gradient.norm().item(), "peak": peak}
    # One after the other: each stands for a process that is alone.
    for turn in range(RANKS):
        if turn == rank:
            loss, wanted, _ = _step(method, size, row, None)
            found |= {"loss_alone": loss.item(), "error": ((gradient - wanted).norm() / wanted.norm()).item()}
            found["peak_of_half"] = _step(method, size, half, None)[2]
        dist.barrier()
    (folder / f"{method}.{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _row(tokens: int, vocabulary: int) -> Row:
    """Two documents, of which the second begins on the first rank."""
    ids = np.random.default_rng(1).integers(vocabulary, size=tokens)
    labels = ids.copy()
    cut = 3 * tokens // 8
    labels[[0, cut]] = IGNORE
    return Row(ids, labels, [cut, tokens - cut], ["a", "b"])


def _step(
    method: str, size: dict[str, int], row: Row, ulysses: Ulysses | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The loss of this process's part, the gradient of all adapters, and the most bytes on the device."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **size, max_position_embeddings=len(row.input_ids), tie_word_embeddings=False
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = sparsify(model, METHODS[method]).train()
    add_adapters(model, LoraSection(rank=4, targets="linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tile_mlps(model, 4)
    enable_activation_checkpointing(model, "selective", ActivationOffload(DEVICE))
    loss = CausalLMLoss(model, 2048, ulysses=ulysses)
    batch = collate([row]) if ulysses is None else collate_part([row], ulysses.rank, ulysses.size)
    methods = {id(each): each for _, _, each in sparse_layers(model) if each is not None}.values()
    arguments: dict[str, Any] = {name: tensor.to(DEVICE) for name, tensor in pass_tensors(batch).items()}
    arguments |= {"num_chunks": 4, "planned": planned_arguments(methods, batch, seed=0)}
    for _ in range(2):  # kernels are compiled, and buffers made, in the first
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        value = loss(**arguments)
        (value / len(row.input_ids)).backward()
    torch.cuda.synchronize()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).cpu()
    peak = torch.cuda.max_memory_allocated()
    value = value.detach().double().cpu()
    del model, loss, arguments
    gc.collect()
    torch.cuda.empty_cache()
    return value, gradient, peak


if __name__ == "__main__":
    given = dict(each.split("=") for each in sys.argv[3:])
    main(Path(sys.argv[1]), sys.argv[2], SIZE | {name: int(value) for name, value in given.items()})
