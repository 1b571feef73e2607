"""What other libraries call our commands, for messages about commands that do not exist."""

from __future__ import annotations

_WORDS = {
    "run": "train finetune fine-tune sft pt dpo pretrain",
    "recipe validate": "validate check lint",
    "recipe copy": "copy cp init fetch",
    "recipe list": "list ls recipes",
    "recipe show": "show",
    "recipe schema": "config-schema schema",
    "data preview": "preview preprocess",
    "export --merge": "merge merge-lora",
    "export RUN OUT --push ORG/NAME": "push upload publish",
    "generate": "inference infer predict",
    "generate --chat": "chat",
    "eval": "evaluate eval-model lm-eval",
    "run RECIPE --resume": "resume",
    "logs": "log tail",
    "doctor": "env info",
}
_BY_WORD = {word: ours for ours, words in _WORDS.items() for word in words.split()}


def other_command(word: str) -> str | None:
    """The command for what ``word`` is elsewhere; None if that is not known."""
    return _BY_WORD.get(word)
