"""Time of each kernel of a decode step, in the layers of ``sparsetrain bench decode``, by PyTorch's profiler on a GPU.

python -m sparsetrain.bench.decode_kernels --batch 8 --length 131072 --step twilight
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from sparsetrain.bench.contenders.listed import STEPS
from sparsetrain.bench.decoding import DecodeProblem
from sparsetrain.patterns import PowerPattern

LAYERS = 3
"""Caches that are read in turn, so that none stays in the L2 cache."""
SETTLING = 2
"""Steps that compile and are not measured."""


@torch.no_grad()
def main(
    batch: Annotated[int, typer.Option(help="Sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Keys of a sequence.")] = 131072,
    step: Annotated[str, typer.Option(help="A way to choose keys: " + ", ".join(each.name for each in STEPS))] = (
        "twilight"
    ),
    p: Annotated[float, typer.Option(help="Of top-p selection.")] = 0.95,
    candidates: Annotated[int, typer.Option(help="Keys that a selector passes on.")] = 8192,
    every: Annotated[int, typer.Option(help="Steps between two choices where lists are used again.")] = 8,
    repeats: Annotated[int, typer.Option(help="Steps measured.")] = 6,
) -> None:
    """Print the microseconds of every kernel, in a layer and a step."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a CUDA device")
    found = next((each for each in STEPS if each.name == step), None)
    if found is None:
        raise typer.BadParameter(f"--step {step}: one of " + ", ".join(each.name for each in STEPS))
    problem = DecodeProblem(
        length=length,
        pattern=PowerPattern(256, 5, 1),
        topk=1024,
        layers=LAYERS,
        p=p,
        candidates=candidates,
        every=every,
        batch=batch,
        heads=32,
        kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    layers = problem.tensors()
    ways = [found.prepare(problem, each) for each in layers]
    steps = ways[0].steps

    def run(times: int) -> None:
        for _ in range(times * steps):
            for way, tensors in zip(ways, layers, strict=True):
                way.attend(*tensors)
        torch.cuda.synchronize()

    run(SETTLING)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run(repeats)
    counted = repeats * steps * LAYERS
    kernels = [each for each in profiled.key_averages() if each.self_device_time_total > 0]
    print(f"{torch.cuda.get_device_name()}: {step}, {batch} x {length:,} keys, microseconds of a layer in a step")
    for each in sorted(kernels, key=lambda each: -each.self_device_time_total):
        print(f"{each.self_device_time_total / counted:9.2f}  x{each.count / counted:5.2f}  {each.key[:100]}")
    print(f"{sum(each.self_device_time_total for each in kernels) / counted:9.2f}  in all")


if __name__ == "__main__":
    typer.run(main)
