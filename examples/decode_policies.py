"""Read fewer keys in each step of generation, with a model that was never finetuned.

    python examples/decode_policies.py [MODEL] [PROMPT_FILE]

Prints what each policy writes behind a long prompt, beside attention to all keys. To measure the difference over many
prompts and at equal bytes: sparsetrain compare-decode (docs/decode-quality.md).
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsetrain

MODEL = str(Path(sparsetrain.__file__).parent / "assets/tiny")
POLICIES = {
    "all keys": None,
    "Twilight, 90 % of the weight": {"select": "full", "prune": {"p": 0.9, "min_keys": 16}},
    "Quest, 128 keys": {"select": "quest", "candidates": 128, "recent": 16},
}

if __name__ == "__main__":
    parser = ArgumentParser(description="Read fewer keys in each step of generation.")
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or Hub id; by default the embedded model")
    parser.add_argument("prompt", nargs="?", type=Path, help="a file of text; by default one of Python's library")
    given = parser.parse_args()
    try:
        text = inspect.getsource(inspect)[:1200] if given.prompt is None else given.prompt.read_text("utf-8")
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not text.strip():
        parser.error(f"{given.prompt} is empty")
    sparsetrain.sparsify(model, {"method": "full"})
    prompt = tokenizer(text, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    for name, policy in POLICIES.items():
        sparsetrain.set_decode(model, policy)
        written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, length:]
        print(f"{name}: {tokenizer.decode(written)!r}")
