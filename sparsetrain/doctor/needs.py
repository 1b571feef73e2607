"""Checks of what a recipe needs of this machine: device and batch, model, disk, data."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparsetrain.counted import counted
from sparsetrain.data.check import check_data
from sparsetrain.doctor.finding import Finding, gib
from sparsetrain.durable import existing_part, folder_fault
from sparsetrain.plan.disk import room_of, saved_a_parameter
from sparsetrain.plan.public import check_public
from sparsetrain.recipe.batch import batch_shape
from sparsetrain.recipe.local_model import is_own, model_folder
from sparsetrain.recipe.schema import Recipe


def check_machine(recipe: Recipe, gpus: int | None = None) -> Finding:
    """Whether this machine has what the recipe's dtype, quantised base and offloading need, and the batch can be made
    on so many GPUs."""
    import torch

    from sparsetrain.training import preflight

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = gpus or recipe.sequence.parallel
    preflight.check_machine(recipe, device, ranks)
    kind = "GPU" if device.type == "cuda" else "CPU"
    found = f"a {kind} can do what the recipe asks of it: {batch_shape(recipe, ranks).describe()}"
    here = torch.cuda.device_count()
    if gpus is not None and here == 0:
        fix = "run doctor where the GPUs are; processes of a CPU are for small models, such as the quickstart's"
        return Finding("warn", "machine", f"{found}; this machine has no GPU that torch can use, of {gpus}", fix)
    if gpus is not None and 0 < here < gpus:
        fix = "start it on several machines (docs/launching.md), or with fewer GPUs"
        return Finding("warn", "machine", f"{found}; this machine has {counted(here, 'GPU')} of {gpus}", fix)
    return Finding("ok", "machine", found)


def check_model(recipe: Recipe) -> Finding:
    """Whether a model that is on this machine can be built as the recipe says, and its files can be read."""
    from sparsetrain.training import preflight

    check_public(recipe.model)
    if not is_own(recipe) and model_folder(recipe.model) is None:
        return Finding(
            "ok", "model", f"{recipe.model.path} is not on this machine: the run downloads it, and checks it then"
        )
    preflight.check_model(recipe)
    return Finding("ok", "model", "it can be built as the recipe says, and its files can be read")


def check_disk(recipe: Recipe) -> Finding:
    """Room for what a run writes: its checkpoints, one more than is kept, and the trained model."""
    output = Path(recipe.output or "runs").absolute()
    if (fault := folder_fault(output)) is not None:
        return Finding("fail", "disk", f"{fault}, and the run folder is {output}", "choose another with output=...")
    folder = existing_part(output)
    free = shutil.disk_usage(folder).free
    room = room_of(recipe)
    if room is None:
        found = f"{gib(free)} free; {recipe.model.path} is not on this machine yet, so its size is unknown"
        held = saved_a_parameter(recipe)
        return Finding(
            "warn", "disk", found, f"a checkpoint takes {held:.3g} bytes a trained parameter, none a frozen one"
        )
    found = f"{gib(room.needed)} for {room.describe()}; {gib(free)} free"
    if room.needed > free and not room.certain:
        return Finding("warn", "disk", found, "a checkpoint holds what is trained, and nothing of a frozen parameter")
    if room.needed > free:
        fix = f"free {gib(room.needed - free)} on {folder}, set output= to a larger disk, or lower checkpoint.keep_last"
        return Finding("fail", "disk", found, fix)
    if room.needed > 0.8 * free:
        return Finding("warn", "disk", found, "little is left over; other writers on this disk may stop the run")
    return Finding("ok", "disk", found)


def check_recipe_data(recipe: Recipe) -> list[Finding]:
    """The files, columns and first rows of a recipe's data, and what its chat template writes."""
    data = check_data(recipe)
    unchecked = f"; not checked: {', '.join(data.unchecked)}" if data.unchecked else ""
    warned = [Finding("warn", "chat template", remark) for remark in data.remarks]
    return [Finding("ok", "data", f"what is on this machine can be read{unchecked}"), *warned]
