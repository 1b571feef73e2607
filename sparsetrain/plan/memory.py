"""Peak memory of one rank over the phases of a step."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.plan.activations import layer_bytes, loss_bytes, rotary_bytes
from sparsetrain.plan.measured import CONTEXT
from sparsetrain.plan.setting import Setting
from sparsetrain.plan.states import States, count_states


@dataclass(frozen=True)
class Phase:
    """Memory in one phase, in bytes by component, in the order of the tables."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of the phase."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """The memory of one rank, in bytes."""

    phases: tuple[Phase, ...]
    host: float
    """Host memory of one rank for offloaded tensors."""

    @property
    def peak(self) -> Phase:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def needed(self) -> float:
        """Bytes of the device: torch's peak and what torch does not see."""
        return self.peak.total + CONTEXT


COMPONENTS = (
    "weights",
    "gradients",
    "optimizer",
    "buffers",
    "kept",
    "layer",
    "loss",
    "update",
    "second model",
)
"""Names of the components of a phase."""


def estimate_memory(setting: Setting) -> Memory:
    """The phases of a run on one of its ranks."""
    states = count_states(setting)
    layer, loss = layer_bytes(setting), loss_bytes(setting)
    layers, stage = setting.shape.layers, setting.stage
    head_gradient = loss.weight_gradient
    kept_each, working, host = layer.saved, layer.backward, states.host
    if setting.checkpointing != "none":
        kept_each = layer.input + layer.selection
        working -= layer.selection
        if setting.checkpointing == "selective":
            kept_each += layer.attention_result
            working -= layer.attention_result
    on_device = kept_each * layers
    if setting.recipe.train.offload_activations:
        # Two at a time are on the device; the others wait in host memory.
        host += layer.input * layers
        on_device = (kept_each - layer.input) * layers + 2 * layer.input
    kept = on_device + rotary_bytes(setting)
    # Without checkpointing the layer that is worked on is one of those that are kept.
    beside = kept if setting.checkpointing != "none" else kept - layer.saved

    bucket, flowing = states.bucket, states.bucket + states.reducing
    early = _early_gradients(setting, states)
    static = {"optimizer": states.optimizer}
    phases = [
        Phase("load", {"weights": states.loading}),
        Phase(
            "loss",
            {
                "weights": states.weights + states.gathered_head,
                "gradients": early + head_gradient,
                **static,
                "buffers": bucket if stage == 3 else 0.0,
                "kept": kept,
                "loss": loss.kept + loss.chunk,
            },
        ),
        Phase(
            "last layer",
            {
                "weights": states.weights + states.gathered,
                "gradients": max(early + head_gradient, states.gradients if stage >= 2 else 0.0),
                **static,
                "buffers": flowing if stage >= 2 else bucket,
                "kept": beside,
                "layer": working,
            },
        ),
        Phase(
            "first layer",
            {
                "weights": states.weights + states.gathered,
                "gradients": _late_gradients(setting, states),
                **static,
                "buffers": flowing,
                "kept": rotary_bytes(setting),
                "layer": working + layer.input,
            },
        ),
        _step(setting, states),
    ]
    second = max((model.size or 0.0 for model in setting.second_models), default=0.0)
    if second:
        # The passes of evaluations are not counted; the second model is held beside all that waits for the next step.
        parts = {"weights": states.weights, "gradients": early, **static, "second model": second}
        phases.append(Phase("evaluation", parts))
    return Memory(tuple(phases), host)


def _early_gradients(setting: Setting, states: States) -> float:
    """Bytes of gradients before backward: the sum over earlier micro batches; with ZeRO-3 always present."""
    if setting.stage == 3:
        return states.gradients
    if setting.batch.accumulation == 1:
        return 0.0
    return states.gradients / 2 if setting.stage == 2 else states.gradients


def _late_gradients(setting: Setting, states: States) -> float:
    """Bytes of gradients before those of the last layer are computed."""
    parameters = setting.parameters
    if setting.stage >= 2 or setting.batch.accumulation > 1 or not parameters.trains_matrices:
        return states.gradients
    embedding = 0 if setting.shape.tied else parameters.embedding
    return states.gradients - setting.element * (parameters.matrices / setting.shape.layers + embedding)


def _step(setting: Setting, states: States) -> Phase:
    gradients = states.gradients
    if setting.stage == 1:
        gradients /= setting.ranks
    return Phase(
        "step",
        {
            "weights": states.weights,
            "gradients": gradients,
            "optimizer": states.optimizer,
            "buffers": states.bucket if setting.stage == 3 else 0.0,
            "update": states.stepping,
        },
    )
