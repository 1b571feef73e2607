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


@dataclass(frozen=True)
class _Layers:
    """Activations of all layers, in bytes."""

    kept: float
    """On the device between forward and backward."""
    beside: float
    """Of these, what is kept beside the layer that backward works on."""
    working: float
    """Of that layer."""
    host: float
    """In host memory."""


def _layers(setting: Setting) -> _Layers:
    layer, count = layer_bytes(setting), setting.shape.layers
    each, working, host = layer.saved, layer.backward, 0.0
    if setting.checkpointing != "none":
        each = layer.input + layer.selection
        working -= layer.selection
        if setting.checkpointing == "selective":
            each += layer.attention_result
            working -= layer.attention_result
    kept = each * count
    if setting.recipe.train.offload_activations:
        # Two at a time are on the device; the others wait in host memory.
        host = layer.input * count
        kept = (each - layer.input) * count + 2 * layer.input
    kept += rotary_bytes(setting)
    # Without checkpointing the layer that is worked on is one of those that are kept.
    beside = kept if setting.checkpointing != "none" else kept - layer.saved
    return _Layers(kept, beside, working, host)


def estimate_memory(setting: Setting) -> Memory:
    """The phases of a run on one of its ranks."""
    states, layers, loss = count_states(setting), _layers(setting), loss_bytes(setting)
    stage = setting.stage
    bucket, flowing = states.bucket, states.bucket + states.reducing
    early = _early_gradients(setting, states)
    phases = [
        Phase("load", {"weights": states.loading}),
        Phase(
            "loss",
            {
                "weights": states.weights + states.gathered_head,
                "gradients": early + loss.weight_gradient,
                "optimizer": states.optimizer,
                "buffers": bucket if stage == 3 else 0.0,
                "kept": layers.kept,
                "loss": loss.kept + loss.chunk,
            },
        ),
        Phase(
            "last layer",
            {
                "weights": states.weights + states.gathered,
                "gradients": max(early + loss.weight_gradient, states.gradients if stage >= 2 else 0.0),
                "optimizer": states.optimizer,
                "buffers": flowing if stage >= 2 else bucket,
                "kept": layers.beside,
                "layer": layers.working,
            },
        ),
        Phase(
            "first layer",
            {
                "weights": states.weights + states.gathered,
                "gradients": _late_gradients(setting, states),
                "optimizer": states.optimizer,
                "buffers": flowing,
                "kept": rotary_bytes(setting),
                "layer": layers.working + layer_bytes(setting).input,
            },
        ),
        _step(setting, states),
    ]
    second = max((model.size or 0.0 for model in setting.second_models), default=0.0)
    if second:
        # The passes of evaluations are not counted; the second model is held beside all that waits for the next step.
        parts = {"weights": states.weights, "gradients": early}
        parts |= {"optimizer": states.optimizer, "second model": second}
        phases.append(Phase("evaluation", parts))
    return Memory(tuple(phases), states.host + layers.host)


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
