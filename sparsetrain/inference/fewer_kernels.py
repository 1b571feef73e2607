"""A model on a GPU made ready for steps: fewer and larger kernels for what is not attention."""

from __future__ import annotations

from typing import Any

from sparsetrain.modeling import fused_layers
from sparsetrain.modeling.merged import merge_projections


def ready_for_steps(model: Any) -> str | None:
    """Fuse norms, activations and rotations by Liger where it is installed and gives the same results, and merge the
    projections of one input. For inference, in place; on a CPU nothing happens.

    Returns:
        A sentence about what was done, or why not; None on a CPU.
    """
    if model.device.type != "cuda":
        return None
    if fused_layers.is_installed():
        try:
            said = fused_layers.fuse(model, model.device)
        except fused_layers.NotFused as error:
            said = f"{error}: its layers stay as they are, and steps are slower"
    else:
        said = "steps are faster with liger-kernel (pip install 'sparsetrain[liger]')"
    merge_projections(model)
    return said
