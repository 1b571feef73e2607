"""Train the tokenizer of the embedded checkpoint: byte-level BPE on the Python standard library, digits one by one.

    python -m sparsetrain.recipes.tiny_tokenizer OUT

The vocabulary is small because the embedding of a tiny model is most of its weight, and every digit is a token of its
own so that a passkey of n digits is n tokens. The prompts of the retrieval tasks are part of the corpus.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsetrain.data.files import read_documents, stamped, stdlib_files
from sparsetrain.data.synthetic import NOISE, WORDINGS

VOCABULARY = 2048
BOS, EOS = "<s>", "</s>"


def train() -> PreTrainedTokenizerFast:
    """The tokenizer, trained on the standard library of the Python that runs this."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _corpus() -> Iterator[str]:
    yield from (row["text"] for row in read_documents(stamped(stdlib_files("python-stdlib", "train"))))
    for wording in WORDINGS.values():
        prompt = f"{wording.introduction}\n{NOISE}\n{wording.needle}\n{wording.question} "
        yield from [prompt] * 1000


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the tokenizer to")
    train().save_pretrained(parser.parse_args().out)
