from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsetrain.evaluation.html import svg
from sparsetrain.modeling import save, sparsify
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer

# Tiny tensors are slower on several threads, and much slower when other processes want the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    """Two random Llama layers on the byte vocabulary, with full attention through our own path."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return sparsify(LlamaForCausalLM(config), {"method": "full"})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model with a small attention pattern and a real tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    model = sparsify(LlamaForCausalLM(config).eval(), {"method": "power", "block": 32, "window": 2})
    save(model, folder, tokenizer)
    return folder


@pytest.fixture
def drafts(monkeypatch):
    """Pictures of pages are made in full, but not laid out and rendered, which takes longest."""
    monkeypatch.setattr(svg, "render", lambda figure: '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>')
