"""Finetune on conversations with tools: the loss is on what the assistant writes, its calls included. On a CPU.

    python examples/chat_with_tools.py [KEY=VALUE ...]

Writes conversations.jsonl, in OpenAI's form, and trains the embedded model on it, for which the recipe names a chat
template and adds its control tokens, as it has neither. Your own conversations take the place of the file. A tenth is
held out, and the perplexity of what the assistant writes there is measured. To see what is learned of a row:
sparsetrain data preview quickstart 'data.sources=[{path: conversations.jsonl}]' model.chat_template=qwen3
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from sparsetrain.cli import main

FILE, ROWS = Path("conversations.jsonl"), 200
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOL = {"name": "add", "description": "The sum of two numbers.", "parameters": PARAMETERS}


def conversation(a: int, b: int) -> list[dict]:
    """A question, the call that it needs, the tool's answer and the assistant's."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
    return [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(a + b)},
        {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
    ]


def write_conversations() -> None:
    """Write rows with ``messages`` and ``tools``."""
    rng = random.Random(0)
    with FILE.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            messages = conversation(rng.randrange(1000), rng.randrange(1000))
            file.write(json.dumps({"messages": messages, "tools": [{"type": "function", "function": TOOL}]}) + "\n")


if __name__ == "__main__":
    if not FILE.exists():
        write_conversations()
    source = {"path": str(FILE), "validation": 0.1}
    measured = {"task": "perplexity", "lengths": [512], "tokens": 4096}
    recipe = {
        "model.chat_template": "qwen3",
        "model.add_tokens": ["<|im_start|>", "<|im_end|>"],
        "data.sources": [source],
        "eval.tasks": [{**measured, "source": {**source, "split": "validation"}}],
        "output": "runs/chat",
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
    sys.exit(main(["run", "quickstart", *settings, *sys.argv[1:]]))
