"""A deeper model that recalls: the two layers of recall-base with layers between them that do nothing yet.

    sparsetrain run recipes/evidence/recall.yaml attention.method=full checkpoint.export=true \\
        output=runs/evidence/recall-base
    python -m sparsetrain.recipes.evidence.relay_base runs/evidence/relay-base

The new layers' output projections are zero, so that the model gives what it gave; everything else in them is random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.entry import run_script


def grow(model: Path, folder: Path, layers: int, positions: int) -> None:
    """Write the deeper model and its tokenizer.

    Args:
        model: a folder of a run; its first layer comes first, its last one last.
        layers: of the deeper model.
        positions: tokens that it is for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = model / "final"
    torch.manual_seed(0)
    shallow = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source)
    last, new = config.num_hidden_layers - 1, layers - config.num_hidden_layers
    if new < 0:
        raise typer.BadParameter(f"--layers {layers}: {model} has {last + 1}; give no fewer")
    config.num_hidden_layers = layers
    config.layer_types = [*config.layer_types[:last], *(config.layer_types[last],) * (new + 1)]
    config.max_position_embeddings = positions
    del config.sparsetrain
    deep = AutoModelForCausalLM.from_config(config)
    weights = {
        name.replace(f"layers.{last}.", f"layers.{layers - 1}."): weight
        for name, weight in shallow.state_dict().items()
    }
    deep.load_state_dict(weights, strict=False)
    for layer in deep.model.layers[last:-1]:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(output.weight)
    deep.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the deeper model is written.")],
    model: Annotated[Path, typer.Option(help="The run that trained the shallow one.")] = Path(
        "runs/evidence/recall-base"
    ),
    layers: Annotated[int, typer.Option(help="Layers in all.")] = 5,
    positions: Annotated[int, typer.Option(help="Tokens that it is for.")] = 256,
) -> None:
    """Put layers that do nothing yet between those of a model that recalls."""
    if not (model / "final").is_dir():
        raise typer.BadParameter(f"--model {model} has no final model; train it first, as the head of this script says")
    grow(model, folder, layers, positions)
    print(f"{folder}: {layers} layers, {positions} positions")


if __name__ == "__main__":
    run_script(main)
