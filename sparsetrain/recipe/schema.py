"""The recipe: one pydantic model per YAML section. The docstring under a field is its documentation everywhere."""

from __future__ import annotations

from math import frexp, ldexp
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.evaluation.base import TaskName, TaskSection
from sparsetrain.evaluation.registry import AnyTask
from sparsetrain.methods.registry import AttentionConfig
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.recipe.optimizer_section import OptimizerSection, Rate
from sparsetrain.recipe.preference_section import PreferenceSection
from sparsetrain.recipe.rows import RECORDED, TRAINED, Row, read_attention, read_decoding
from sparsetrain.section import MOST_LISTED, MOST_STEPS, Bounds, Changes, Section, Steps, Text, Tokens
from sparsetrain.source_section import DataSource

SCHEMA_VERSION = 1
"""Increased whenever the meaning of existing recipes changes; recipes of a newer version are refused."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Constant = Annotated[float, Field(gt=0), Bounds(1e30, "it is used in fp32", least=1e-30)]

MOST_SHARING = 1024
"""Maximum number of ranks that share a row."""


def _no_switch(value: Any) -> Any:
    """Refuse booleans as numbers: Python would accept ``true`` as 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


MOST_PROFILED = 20
"""Maximum number of steps in a trace."""


class ModelSection(Section):
    """The model to train. Give ``path`` (pretrained) or ``architecture`` (random weights), not both."""

    path: Text | None = None
    """Hub id (``Qwen/Qwen3-8B``), local folder, or ``sparsetrain:tiny`` for the shipped checkpoint."""
    architecture: dict[str, Any] | None = None
    """A transformers config as a mapping (``{model_type: llama, hidden_size: 256, ...}``): random weights."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub model."""
    tokenizer: Text | None = None
    """Hub id or folder of the tokenizer, if it is not in the model's folder."""
    chat_template: Text | None = None
    """Chat template in place of the tokenizer's: ``chatml``, ``gemma``, ``llama3``, ``mistral``, ``qwen3``, or a Jinja
    file. It is saved with the model."""
    add_tokens: Annotated[list[Text], Field(max_length=MOST_LISTED)] = []
    """Control tokens that are added to the tokenizer: each is one token, and never merged with text. The embedding and
    the head get rows for them, spare ones or new ones up to a multiple of 64. With ``lora``, the rows of all tokens
    named here are trained, also of those that the tokenizer has already."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the weights in forward and backward; the optimizer always keeps fp32 master weights."""
    config_overrides: Changes = {}
    """Fields of the transformers config to change at load, such as ``{max_position_embeddings: 131072}``; null drops
    those of a base."""
    trust_remote_code: bool = False
    """Allow a Hub model to run its own Python code on this machine."""

    @field_validator("add_tokens")
    @classmethod
    def _are_tokens(cls, tokens: list[str]) -> list[str]:
        for token in tokens:
            if token != token.strip() or not token.isprintable():
                raise ValueError(f"{token!r} has white space at its ends or characters that cannot be printed")
            if tokens.count(token) > 1:
                raise ValueError(f"{token!r} is named twice")
        return tokens

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if self.path is None and self.architecture is None:
            raise ValueError("give model.path (pretrained) or model.architecture (random weights)")
        if self.path is not None and self.architecture is not None:
            raise ValueError(
                f"model.path={self.path} (pretrained) and model.architecture (random weights) are both given; "
                "set one of them to null"
            )
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError(
                "model.architecture starts from random weights, so model.tokenizer must say which tokenizer"
            )
        if self.architecture is not None and not isinstance(self.architecture.get("model_type"), str):
            raise ValueError("model.architecture needs model_type, such as llama or qwen3")
        return self


SMALLEST_SHARE = 1e-9
"""Minimum fraction of a mixture's weights: a source below it would not be drawn in any run."""


class DataSection(Section):
    """The training data: one source, or a weighted mixture."""

    sources: Annotated[list[DataSource], Field(min_length=1, max_length=MOST_LISTED)]
    """The mixture. Each draw takes from one source, with probability proportional to its ``weight``."""
    on_malformed: Literal["stop", "skip"] = "stop"
    """Handling of an unreadable row: stop and name it, or skip and count it (the log names the first few)."""
    long_documents: Literal["split", "truncate", "drop"] = "split"
    """Handling of documents longer than ``sequence.length``: split over several rows, truncate, or drop. A document
    that fits into a row is never split."""
    num_workers: Annotated[int, Field(gt=0), Bounds(1024, "each is a process")] = 1
    """Processes that tokenise mapped sources."""

    @model_validator(mode="after")
    def _all_are_drawn(self) -> DataSection:
        shares = self.shares()
        for source, share in zip(self.sources, shares):
            if share < SMALLEST_SHARE:
                raise ValueError(
                    f"sources: weight={source.weight:g} of {source.label} is {share:.1g} of all weights, so it would "
                    f"never be drawn; give it at least {SMALLEST_SHARE:g} of them, or leave it out"
                )
        return self

    def shares(self) -> list[float]:
        """The probability of each source in a draw; weights of any size are summed without overflow."""
        exponent = frexp(max(source.weight for source in self.sources))[1]
        # Scaling by powers of two is exact.
        scaled = [ldexp(source.weight, -exponent) for source in self.sources]
        return [weight / sum(scaled) for weight in scaled]


class SequenceSection(Section):
    """The shape of a training row."""

    length: Tokens
    """Tokens in a row: the context length of training."""
    packing: bool = True
    """Fill each row with several documents. They are isolated: positions restart and attention stops at the boundary.
    Without packing a row holds one document and may be shorter than ``length``."""
    parallel: Annotated[int, Field(gt=0), Bounds(MOST_SHARING, "each needs heads of its own")] = 1
    """Number of ranks that share each row (DeepSpeed-Ulysses): each holds an equal part of the tokens, and in attention
    all tokens for a part of the heads. The number of heads must be divisible by it; with more ranks than key/value
    heads, these are replicated."""


class ProfileSection(Section):
    """A trace of some steps by torch's profiler, on rank 0: ``profile-000010-000012.json.gz`` in the run folder."""

    steps: tuple[Steps, Steps]
    """The first and the last step. The first steps of a run compile and fill caches: begin at 5 or later."""

    @model_validator(mode="after")
    def _in_order(self) -> ProfileSection:
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"steps={list(self.steps)}: the first step comes after the last")
        if self.steps[1] - self.steps[0] >= MOST_PROFILED:
            raise ValueError(f"steps={list(self.steps)}: a trace of more than {MOST_PROFILED} steps cannot be opened")
        return self


class TrainSection(Section):
    """Length of the run, batch, learning rate and memory. Give one of ``steps``, ``epochs`` and ``tokens``."""

    steps: Steps | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(gt=0), Bounds(10**6, "no run reads its data so often")] | None = None
    """Passes over the data (mapped sources only)."""
    tokens: Annotated[int, Field(gt=0), Bounds(10**16, "no run is so long")] | None = None
    """Tokens to train on, counted as ``sequence.length`` times rows; rounded up to whole steps."""
    micro_batch: Annotated[int, Field(gt=0), Bounds(2**16, "a pass holds all its rows in memory")] = 1
    """Rows in one forward pass of one rank."""
    global_batch_sequences: Annotated[int, Field(gt=0), Bounds(2**24, "no step is so large")] | None = None
    """Rows in one optimizer step over all ranks. Gradient accumulation follows from it."""
    global_batch_tokens: Annotated[int, Field(gt=0), Bounds(2**40, "no step is so large")] | None = None
    """The same in tokens; must be a whole number of rows."""
    optimizer: OptimizerSection = OptimizerSection()
    """Optimizer and its constants."""
    lr: Rate
    """Peak learning rate."""
    new_modules_lr: Rate | None = None
    """Peak learning rate of the modules that the attention method adds (SparseK's scorers), which are not pretrained;
    null: ``lr``. The schedule is the same."""
    parameters: Literal["all", "new_modules"] = "all"
    """The trained parameters: all (with ``lora``, its adapters), or only the modules that the attention method adds,
    with the rest frozen."""
    start: Text | None = None
    """A folder of adapters to begin with: the ``final/`` of a run with ``lora`` on this ``model.path``. With ``lora``
    they are trained further. Without it they are merged into the weights first. A ``model.path`` that is such
    a folder means its base with this setting."""
    freeze: Annotated[list[Text], Field(max_length=MOST_LISTED)] = []
    """Parameters that stay as they are, by whole components of their names: ``[embed_tokens]``, ``[layers.0, mlp]``,
    ``[vision_tower]``. For training all parameters; a vision or audio tower is frozen in any case, as texts do not use
    it."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape of the learning rate after the warmup. ``wsd`` (warmup, stable, decay; 2404.06395) is constant until the
    cooldown: a constant rate with a cooldown. Only there does the rate depend on the length of the run, so that a run
    can be continued from a checkpoint before it."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a fraction of ``lr`` (all but constant)."""
    cooldown: Annotated[float, Field(gt=0), Bounds(MOST_STEPS, "no run has more steps")] = 0.2
    """Cooldown of ``wsd`` at the end of the run: a number of steps if 1 or more, a fraction of all steps if below 1."""
    cooldown_shape: Literal["sqrt", "linear"] = "sqrt"
    """Shape of the cooldown: ``sqrt`` falls by the square root of its progress, first fast and then slowly
    (2405.18392), or ``linear``."""
    warmup: Annotated[float, Field(ge=0), Bounds(MOST_STEPS, "no run has more steps")] = 0.0
    """Warmup: a number of steps if 1 or more, a fraction of all steps if below 1."""
    max_grad_norm: Constant | None = 1.0
    """Clip the global gradient norm; null switches clipping off."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: data order, synthetic tasks, initial weights of new modules, dropout."""
    neftune: Annotated[float, Field(gt=0), Bounds(1e4, "the noise would outweigh the embeddings")] | None = None
    """Noise on the embeddings of tokens in training (NEFTune, 2310.05914). It is uniform, of at most this over the
    square root of the elements of a row (``sequence.length`` times the hidden size). 5 to 15 in the paper; null: none.
    """
    activation_checkpointing: Literal["none", "layer", "selective"] = "none"
    """Activations saved for backward. ``none``: all are saved. ``layer``: only the input of each decoder layer is, and
    the layer is recomputed, in about a third more time. ``selective``: the outputs of attention are saved too, one more
    hidden state per layer, and attention is not recomputed. Selections of an attention method are always saved."""
    offload_activations: bool = False
    """Keep the inputs of checkpointed layers in pinned host memory until backward; the copies overlap with
    computation."""
    mlp_chunk: Tokens | None = None
    """Compute the MLP of each layer in chunks of about this many tokens, so that its wide intermediates never exist for
    the whole row; it is recomputed in backward. null: all tokens at once."""
    loss_chunk: Tokens | None = 4096
    """Compute the loss in chunks of this many tokens, so that logits of the whole row never exist; null: all at once.
    Liger's fused loss chooses its own chunks, whose logits are about as large as the hidden states."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's fused kernels for norms, MLP activation, rotary positions and the loss. ``auto`` uses them if there is a
    CUDA device and ``liger-kernel`` is installed. A module whose output would differ by more than rounding keeps its
    own code (experts in fp32: the kernel multiplies in TF32). The log says which were used."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Handling of a non-finite loss or gradient: stop the run or skip the step. The batch is recorded in
    ``nonfinite.jsonl``."""
    log_every: Steps = 1
    """Steps between log lines."""
    gradient_norms: bool = False
    """Also log the norm of the gradient by part of the model (``grad_norm/self_attn``, ``grad_norm/mlp``, ...), all
    layers together. In a logged step each gradient is gathered, which takes the time of another reduction. With Muon at
    ZeRO 1 and 2 it is the norm of Muon's update."""
    profile: ProfileSection | None = None
    """Trace some steps; null: none."""

    @model_validator(mode="after")
    def _one_of(self) -> TrainSection:
        given = [f"train.{name}" for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one and set the others to null")
        if not given:
            raise ValueError("the length of the run is missing: give one of train.steps, train.epochs and train.tokens")
        if self.global_batch_sequences is not None and self.global_batch_tokens is not None:
            raise ValueError(
                "train.global_batch_sequences and train.global_batch_tokens are given; keep one and set the other null"
            )
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ValueError(
                    f"train.{name}={value}: 1 or more is a number of steps and must be whole; below 1 is a fraction"
                )
        return self


class DeepSpeedSection(Section):
    """The DeepSpeed engine. Its JSON is generated from the recipe and saved in the run folder."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_switch)] = 2
    """ZeRO stage: the state sharded over ranks (1: optimizer state, 2: also gradients, 3: also parameters)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep the optimizer state in host memory (needs a C++ compiler and, here, CUDA)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Keep parameters in host memory (stage 3 only)."""
    gradient_dtype: Literal["auto", "float32", "model"] = "auto"
    """Dtype in which the gradients of the micro batches of a step are summed: ``float32``, or that of the ``model``. A
    sum in bfloat16 loses what is smaller than 1/256 of it. ``auto``: float32 for a bfloat16 model at stage 1, 2 or 3
    where a step has more than one micro batch. That takes up to 4 bytes a trained parameter (at stage 1 on each
    rank)."""
    timeout: Annotated[float, Field(gt=0), Bounds(100_000, "ranks answer one another within seconds", least=0.01)] = (
        30.0
    )
    """Timeout in minutes: if a rank does not answer, or no rank makes progress, all ranks stop and name that rank. Make
    it longer than the longest checkpoint, export or first step (which compiles)."""
    config: dict[str, Any] | str | None = None
    """A DeepSpeed JSON, inline or as a path, that is merged with the generated one. A value that contradicts the recipe
    is an error, and so is ``auto``."""

    @model_validator(mode="after")
    def _offload_stage(self) -> DeepSpeedSection:
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"deepspeed.offload_parameters needs deepspeed.stage: 3, not {self.stage}")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.stage 1, 2 or 3, not 0")
        if self.gradient_dtype == "float32" and self.stage == 0:
            raise ValueError("deepspeed.gradient_dtype: float32 needs deepspeed.stage 1, 2 or 3, not 0")
        return self


class CheckpointSection(Section):
    """Checkpoints and the export. A checkpoint is written atomically: in a temporary folder that is renamed."""

    every: Steps | None = None
    """Steps between checkpoints; null: only at the end and on interruption."""
    keep_last: Annotated[int, Field(gt=0), Bounds(10**6, "each is a folder of its own")] = 2
    """Number of complete checkpoints to keep."""
    keep_best: TaskName | None = None
    """Also keep the best checkpoint according to the evaluations (``eval.every``) of the task of this name: the lowest
    perplexity at the longest length, or the most passkeys or answers found. It is saved even at steps without a regular
    checkpoint, and named in ``best.json``."""
    asynchronous: bool = True
    """Write asynchronously: training waits only for a copy of the state to host memory, if there is enough; false: wait
    until the checkpoint is on the disk."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Handling of a checkpoint that cannot be written (full disk, read-only folder, lost mount): stop, or warn,
    continue and try again at the next one. The last complete checkpoint is kept in both cases."""
    export: bool = True
    """Write ``final/`` at the end: a transformers folder (safetensors, tokenizer, ``sparsetrain.json``), with ``lora``
    a peft adapter folder."""


def _named_apart(tasks: list[TaskSection]) -> list[TaskSection]:
    labels = [task.label for task in tasks]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{labels.count(label)} tasks are called {label}; give each its own name")
    return tasks


class EarlyStopping(Section):
    """End the training when an evaluation no longer improves; the run is then finished as if it had no more steps."""

    task: TaskName
    """The task of ``eval.tasks`` that decides, by the score that ``checkpoint.keep_best`` goes by."""
    patience: Annotated[int, Field(gt=0), Bounds(10**6, "no run is evaluated so often")] = 3
    """Evaluations without a new best after which training ends."""


def _rows_apart(rows: list[EvalRow]) -> list[EvalRow]:
    labels = [row.read().label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label} is there {labels.count(label)} times; give it once")
    return rows


class EvalRow(Section):
    """The trained model in another way: with another attention method, a decode setting, or both, as a row of
    ``sparsetrain eval``."""

    attention: Text | dict[str, Any] = TRAINED
    """``trained``, as it was trained; ``dense``, with full attention; a method with its usual settings (``power``); or
    with others (``{method: power, block: 64}``)."""
    decode: Text = RECORDED
    """What a step of generation reads: ``none`` (all keys), ``recorded``, or a setting of ``sparsetrain generate
    --decode`` with fields behind it (``twilight,prune.p=0.9``, ``select=quest,candidates=512``)."""

    @model_validator(mode="after")
    def _can_be_read(self) -> EvalRow:
        try:
            self.read()
        except (ModelError, RecipeError) as error:
            raise ValueError(str(error)) from error
        if self.attention == TRAINED and self.decode == RECORDED:
            raise ValueError("trained and recorded is the model itself, which is measured anyway; give one of the two")
        return self

    def read(self) -> Row:
        """The row."""
        return Row(read_attention(self.attention, "attention"), read_decoding(self.decode, "decode"))


class EvalSection(Section):
    """Evaluations before, during and after training."""

    every: Steps | None = None
    """Steps between evaluations during training; null = none."""
    early_stopping: EarlyStopping | None = None
    """End the training early; null: take all steps. With ``checkpoint.keep_best`` of the same task the best
    checkpoint is kept; the export has the last weights."""
    at_start: bool = True
    """Evaluate before the first step: the original dense model, and the model with the method."""
    at_end: bool = True
    """Evaluate after the last step."""
    rows: Annotated[list[EvalRow], Field(max_length=MOST_LISTED), AfterValidator(_rows_apart)] = []
    """The trained model in other ways, measured at the end of a run beside the model as it is, and by ``sparsetrain
    eval``: ``[{attention: dense}, {decode: twilight}]``."""
    tasks: Annotated[list[AnyTask], Field(max_length=MOST_LISTED), AfterValidator(_named_apart)] = []
    """The evaluation tasks. Each entry is a ``task`` with its settings, and a ``name`` if two are of one kind."""

    @property
    def by_name(self) -> dict[str, TaskSection]:
        """The tasks by name."""
        return {task.label: task for task in self.tasks}

    @property
    def empty(self) -> bool:
        """Whether there are no tasks."""
        return not self.tasks

    @property
    def measures_at_start(self) -> bool:
        """Whether the model is evaluated before the first step."""
        return self.at_start and not self.empty


class WandbSection(Section):
    """Weights & Biases. The same metrics always go to ``metrics.jsonl``."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online with a login and offline without one."""
    project: Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]+$")] = "sparsetrain"
    """Project of the run."""
    entity: Text | None = None
    """User or team; by default the login's."""
    name: Text | None = None
    """Display name; by default the recipe's name."""
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    """Tags of the run."""
    artifacts: bool = False
    """Upload each checkpoint as an artifact, ``checkpoint-RUN`` with the alias ``step-000120``. W&B copies the files
    first; the run's end waits up to an hour for the uploads."""


class Recipe(Section):
    """A run: all settings that determine the training."""

    version: PositiveInt = SCHEMA_VERSION
    """Version of this schema the recipe was written for."""
    name: Annotated[str, Field(max_length=200)] | None = None
    """Name of the run; by default the recipe's file name."""
    output: Text | None = None
    """Run folder; by default ``runs/<name>``."""
    model: ModelSection
    """The model that is trained."""
    attention: AttentionConfig
    """The attention method and its parameters, which depend on ``method``."""
    data: DataSection
    """The documents."""
    sequence: SequenceSection
    """The shape of training rows."""
    train: TrainSection
    """The optimization."""
    lora: LoraSection | None = None
    """Low-rank adapters; null: train the weights themselves."""
    preference: PreferenceSection | None = None
    """Learning from pairs of answers; null: learn every document."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    """The DeepSpeed engine."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Checkpoints and the export."""
    eval: EvalSection = EvalSection()
    """Evaluations."""
    tracking: list[Literal["wandb", "tensorboard"]] = ["wandb"]
    """Where metrics go besides ``metrics.jsonl``. ``tensorboard``: event files in ``tensorboard/`` of the run folder
    (needs ``pip install sparsetrain[tensorboard]``)."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""

    @property
    def reference(self) -> Literal["none", "adapters_off", "precomputed"]:
        """``preference.reference`` with ``auto`` decided; ``none`` where nothing is compared with a reference."""
        if self.preference is None or not self.preference.has_reference:
            return "none"
        if self.preference.reference != "auto":
            return self.preference.reference
        alone = self.lora is not None and self.beside_adapters is None
        return "adapters_off" if alone else "precomputed"

    @property
    def beside_adapters(self) -> str | None:
        """The setting by which the model without LoRA's adapters is not the one that the run starts from; None if it
        is."""
        if self.lora is not None and self.lora.train_embeddings:
            return "lora.train_embeddings=true"
        if self.lora is not None and self.lora.train_norms:
            return "lora.train_norms=true"
        if self.lora is not None and self.model.add_tokens:
            return f"model.add_tokens={self.model.add_tokens}"
        if self.train.start is not None:
            return f"train.start={self.train.start}"
        return f"attention.method={self.attention.method}" if self.attention.new_modules else None

    @property
    def base_bits(self) -> Literal["none", "4bit", "8bit"]:
        """``lora.quantize_base``, or ``none`` without adapters."""
        return "none" if self.lora is None else self.lora.quantize_base

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        if name and (name != name.strip() or {".", ".."} & set(name.split("/"))):
            raise ValueError(f"{name!r} is not a valid folder name in runs, where the run writes by default")
        return name
