"""What keys of axolotl, LLaMA-Factory, TRL and transformers are called in a recipe, for messages about unknown keys."""

from __future__ import annotations

_NAMES = {
    "model.path": "base_model model_name model_name_or_path pretrained_model_name_or_path model.name model.id",
    "model.chat_template": "template chat_template_jinja",
    "model.dtype": "torch_dtype bf16 fp16",
    "model.add_tokens": "special_tokens new_special_tokens tokens",
    "data.sources": "datasets dataset train_dataset dataset_name",
    "sequence.length": "sequence_len max_seq_length max_seq_len cutoff_len model_max_length max_length",
    "sequence.packing": "sample_packing",
    "sequence.parallel": "sequence_parallel_degree context_parallel_size",
    "train.steps": "max_steps",
    "train.epochs": "num_epochs num_train_epochs",
    "train.lr": "learning_rate",
    "train.schedule": "lr_scheduler lr_scheduler_type",
    "train.warmup": "warmup_ratio warmup_steps",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size batch_size",
    "train.global_batch_sequences": "gradient_accumulation_steps global_batch_size train_batch_size",
    "train.max_grad_norm": "gradient_clipping",
    "train.optimizer.weight_decay": "weight_decay",
    "train.optimizer.name": "optim",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.log_every": "logging_steps",
    "train.neftune": "neftune_noise_alpha",
    "train.liger": "use_liger_kernel liger_kernel",
    "train.start": "adapter_name_or_path lora_model_dir",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target lora_target_modules target_modules lora_target_linear",
    "lora.dora": "use_dora peft_use_dora",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.quantize_base": "load_in_4bit load_in_8bit quantization_bit",
    "lora": "adapter finetuning_type use_peft peft_config",
    "preference.loss": "rl pref_loss loss_type",
    "preference.beta": "pref_beta dpo_beta",
    "deepspeed.stage": "zero_stage zero_optimization",
    "checkpoint.every": "save_steps",
    "checkpoint.keep_last": "save_total_limit",
    "eval.every": "eval_steps",
    "eval.early_stopping": "early_stopping_patience",
    "output": "output_dir",
    "tracking": "report_to",
    "wandb.project": "wandb_project",
    "wandb.name": "run_name wandb_name",
}
_SOURCE_NAMES = {
    "path": "file file_name data_files dataset dataset_name",
    "form": "type ds_type formatting",
    "messages_field": "field_messages",
    "validation": "val_size val_set_size test_size",
    "max_rows": "max_samples",
}

_BY_NAME = {name: ours for ours, names in _NAMES.items() for name in names.split()}
_BY_SOURCE_NAME = {name: ours for ours, names in _SOURCE_NAMES.items() for name in names.split()}

_REMARKS = {
    "gradient_accumulation_steps": "accumulation follows from it, train.micro_batch and the ranks",
    "type": "auto finds it by the columns",
}


def other_name(path: tuple[str | int, ...]) -> str | None:
    """The key of a recipe that is called like the last key of ``path`` elsewhere; None if none is known."""
    key = str(path[-1])
    if path[:2] == ("data", "sources") and len(path) == 4:
        ours = _BY_SOURCE_NAME.get(key)
        ours = None if ours is None else f"data.sources.{path[2]}.{ours}"
    elif path[0] == "attention" or len(path) > 3:
        return None
    else:
        ours = _BY_NAME.get(f"{path[0]}.{key}") or _BY_NAME.get(key)
    if ours is None:
        return None
    return f"{ours} ({_REMARKS[key]})" if key in _REMARKS else ours
