"""TRL's SFTTrainer around a model with sparse attention, on packed rows of prompts and completions.

    pip install trl
    python examples/sft_trainer.py [STEPS]

packing=True fills rows of max_length tokens with several documents and lets positions restart, which keeps them apart.
Loss is on the completions.
"""

from __future__ import annotations

import sysconfig
from argparse import ArgumentParser
from pathlib import Path

given = ArgumentParser(description="TRL's SFTTrainer around a model with sparse attention")
given.add_argument("steps", type=int, nargs="?", default=20, help="steps to train (20)")
STEPS = given.parse_args().steps
if STEPS < 1:
    given.error(f"steps: a whole number above 0, not {STEPS}")

# Behind the arguments: these imports take seconds.
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import sparsetrain

MODEL = Path(sparsetrain.__file__).parent / "assets/tiny"  # or any folder or Hub id

library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
texts = [text for file in library if len(text := file.read_text("utf-8", "ignore")) > 1000]
# A prompt ends with its line, before the line's end: elsewhere a token may reach over the cut, and TRL warns of each.
cuts = [text.find("\n", 200, 900) for text in texts]
rows = [{"prompt": text[:cut], "completion": text[cut:1000]} for text, cut in zip(texts, cuts) if cut > 0]
data = Dataset.from_list(rows)

model = AutoModelForCausalLM.from_pretrained(MODEL)
sparsetrain.sparsify(model, {"method": "power", "block": 32, "window": 4, "sinks": 1, "dense_layers": [-1]})

trainer = SFTTrainer(
    model,
    SFTConfig(
        "runs/sft_trainer",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        max_length=512,
        packing=True,
        learning_rate=5e-4,
        logging_steps=5,
        bf16=False,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
)
trainer.train()
trainer.save_model()  # sparsetrain.load("runs/sft_trainer") opens it with its method
