"""transformers' own Trainer around a model with sparse attention, on packed documents.

    python examples/trainer.py [STEPS]
    accelerate launch --cpu --num_processes 2 examples/trainer.py

DataCollatorWithFlattening joins the documents of a batch to one row without padding and lets positions restart: that is
how the model knows that they are several. A collator that pads works as well, only slower.
"""

from __future__ import annotations

import sysconfig
from argparse import ArgumentParser
from pathlib import Path

given = ArgumentParser(description="transformers' own Trainer around a model with sparse attention")
given.add_argument("steps", type=int, nargs="?", default=20, help="steps to train (20)")
STEPS = given.parse_args().steps
if STEPS < 1:
    given.error(f"steps: a whole number above 0, not {STEPS}")

# Behind the arguments: these imports take seconds.
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

import sparsetrain

MODEL = Path(sparsetrain.__file__).parent / "assets/tiny"  # or any folder or Hub id

tokenizer = AutoTokenizer.from_pretrained(MODEL)
library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
texts = [text[:1000] for file in library if (text := file.read_text("utf-8", "ignore"))]
data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])

model = AutoModelForCausalLM.from_pretrained(MODEL)
sparsetrain.sparsify(model, {"method": "power", "block": 32, "window": 4, "sinks": 1, "dense_layers": [-1]})
model.config.use_cache = False  # packed documents share no cache

trainer = Trainer(
    model,
    TrainingArguments(
        "runs/trainer",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorWithFlattening(),
)
trainer.train()
trainer.save_model()  # sparsetrain.load("runs/trainer") opens it with its method
tokenizer.save_pretrained("runs/trainer")
