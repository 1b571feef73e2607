"""The ``train.optimizer`` section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sparsetrain.section import Bounds, Decay, Section

Rate = Annotated[float, Field(gt=0), Bounds(1e3, "the weights are updated in fp32", least=1e-20)]
"""A learning rate."""


class OptimizerSection(Section):
    """The optimizer. Norms, biases and embeddings get no weight decay."""

    name: Literal["adamw", "adamw_8bit", "muon", "adafactor"] = "adamw"
    """``adamw``: torch's own on CPU (nothing to compile), fused on CUDA, DeepSpeedCPUAdam when offloaded.
    ``adamw_8bit``: bitsandbytes' AdamW, whose moments take one byte each (2110.02861); ZeRO stages 1 to 3.
    ``muon``: DeepSpeed's Muon, which orthogonalises the momentum of each matrix; ZeRO stages 1 to 3. AdamW trains
    everything else (embeddings, output head, norms, biases, the modules that the attention method adds).
    ``adafactor``: transformers' Adafactor, whose second moment is a row and a column for each matrix (1804.04235); ZeRO
    stage 0, as the other stages keep no matrices."""
    states: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's moments and master weights. ``bfloat16`` takes 6 instead of 12 bytes a parameter (DeepSpeed's
    ``bf16_optimizer_states``, ZeRO 1 to 3), but an update smaller than about 1/256 of a weight is lost. It is for large
    learning rates, or when nothing else fits."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moment (AdamW)."""
    eps: Annotated[float, Field(gt=0), Bounds(1.0, "above it, it outweighs every gradient", least=1e-30)] = 1e-8
    """Term added to the denominator (AdamW)."""
    momentum: Decay = 0.95
    """Decay of Muon's momentum."""
    adam_lr: Rate | None = None
    """With Muon, the peak learning rate of what AdamW trains beside it; null: ``train.lr``. Muon's own rate is
    ``train.lr``; its updates have unit size, so it is usually about 0.02, 10 to 100 times that of AdamW."""
    weight_decay: Annotated[float, Field(ge=0), Bounds(1e3, "the weights are updated in fp32")] = 0.0
    """Decoupled weight decay."""

    def faults(self, *, stage: int, offloaded: bool, dtype: str) -> Iterator[tuple[str, str]]:
        """Settings that contradict one another or the recipe: the field of this section, and a sentence.

        Args:
            stage: The ZeRO stage.
            offloaded: Whether the optimizer's state is in host memory.
            dtype: That of the model.
        """
        name = self.name
        if name in ("adamw_8bit", "muon") and stage == 0:
            yield (
                "name",
                f"{name} is an optimizer of ZeRO here, and deepspeed.stage=0; set that to 1, which on one GPU shards "
                "nothing",
            )
        if name == "adafactor" and stage != 0:
            yield (
                "name",
                f"adafactor keeps a row and a column of each matrix, and deepspeed.stage={stage} gives an optimizer "
                "flat parts of matrices; set deepspeed.stage: 0",
            )
        if name != "adamw" and offloaded:
            yield (
                "name",
                f"{name} has no version for a CPU, which deepspeed.offload_optimizer=cpu needs; use adamw, or set that "
                "to none",
            )
        if name == "muon" and dtype == "float16":
            yield "name", "muon is not tried under model.dtype=float16 and its loss scale; set that to bfloat16"
        if self.states == "bfloat16":
            yield from self._states_faults(stage, offloaded, dtype)
        of_adam = ("adamw", "adamw_8bit", "muon")
        users = {"betas": of_adam, "eps": of_adam, "momentum": ("muon",), "adam_lr": ("muon",)}
        for field, names in users.items():
            if name not in names and field in self.model_fields_set:
                default = type(self).model_fields[field].default
                if getattr(self, field) != default:
                    yield field, f"{field} is a setting of {', '.join(names)}, and train.optimizer.name={name}"

    def _states_faults(self, stage: int, offloaded: bool, dtype: str) -> Iterator[tuple[str, str]]:
        if self.name != "adamw":
            yield "states", f"bfloat16 states are those of adamw, and train.optimizer.name={self.name}; set float32"
        if dtype != "bfloat16":
            yield "states", f"bfloat16 states belong to bfloat16 weights, and model.dtype={dtype}"
        if stage == 0:
            yield "states", "bfloat16 states are ZeRO's, and deepspeed.stage=0; set that to 1, 2 or 3"
        if offloaded:
            yield (
                "states",
                "DeepSpeedCPUAdam keeps fp32 states here; set deepspeed.offload_optimizer: none, or states: float32",
            )
