"""Losses of pairs of answers: those of TRL on the same batch, in one packed row."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsetrain.data import build_rows, collate
from sparsetrain.data.batch import IGNORE
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.preference_section import PreferenceSection
from sparsetrain.recipe.schema import DataSection, SequenceSection
from sparsetrain.training.preference.model import PreferenceLoss

PAIRS = [
    {"prompt": "The sky is", "chosen": " blue and the sun is green.", "rejected": " a key."},
    {"prompt": "What is the pass key? The pass key is 1 2 3.", "chosen": " 123", "rejected": " 321, or so it says."},
    {"prompt": "Here we go. There and back again.", "chosen": " Go on.", "rejected": " The grass is green. Go."},
]
ATTENTION = {"method": "power", "block": 4, "window": 2, "sinks": 1}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    made = AutoTokenizer.from_pretrained(tiny.parent / "tokenizer")
    made.pad_token = made.eos_token
    return made


@pytest.fixture(scope="module")
def batch(tokenizer, tmp_path_factory):
    """All pairs in one row."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    data = DataSection(sources=[{"path": str(path), "shuffle": False}], long_documents="drop")
    rows = build_rows(data, SequenceSection(length=512), tokenizer, 0, pairs=True)
    found = collate([next(rows)])
    assert len(found.cu_seqlens) == 2 * len(PAIRS) + 1
    return found


def build(vocabulary, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return sparsify(AutoModelForCausalLM.from_config(config, dtype=torch.float32), ATTENTION).train()


@pytest.fixture(scope="module")
def models(tokenizer):
    """The trained model, and another as its reference."""
    return build(len(tokenizer), 0), build(len(tokenizer), 1)


class OfModel:
    """A reference measured with a model."""

    def __init__(self, model, recipe):
        self.loss = PreferenceLoss(model, recipe)

    def of(self, batch):
        with torch.no_grad():
            return self.loss.log_likelihoods(**inputs_of(batch), **self.loss.answer_tokens(batch))


def inputs_of(batch):
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    return {
        **{name: getattr(batch, name) for name in ("input_ids", "position_ids", "cu_seqlens")},
        "positions": positions,
        "targets": batch.labels[0, positions + 1],
        "num_chunks": 3,
    }


def ours(section, models, batch, chunk):
    """Loss and gradients as a step computes them, and the metrics."""
    preference = PreferenceSection(**section)
    model, other = models
    referenced = "precomputed" if preference.has_reference else "none"
    recipe = SimpleNamespace(preference=preference, reference=referenced, train=SimpleNamespace(loss_chunk=chunk))
    loss = PreferenceLoss(model, recipe, OfModel(other, recipe) if preference.has_reference else None)
    counts = torch.tensor(loss.counts(batch), dtype=torch.float64)
    model.zero_grad()
    value = loss(**inputs_of(batch), **loss.arguments(batch), **loss.shares(counts)) / counts[0]
    value.backward()
    metrics = {name: float(total / counts[0]) for name, total in loss.sums.items()}
    return value.item(), gradients(model), metrics


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def dpo_trainer(tokenizer, models, tmp_path_factory):
    trl = pytest.importorskip("trl")
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=len(PAIRS), use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", dataloader_pin_memory=False, max_length=None,
    )  # fmt: skip
    model, reference = (copy.deepcopy(each) for each in models)
    return trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=tokenizer
    )


@pytest.mark.parametrize(
    ("section", "in_trl"),
    [
        ({"loss": "dpo"}, {"loss_types": ["sigmoid"]}),
        ({"loss": "dpo", "beta": 0.5, "nll_weight": 0.3}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1, 0.3]}),
        ({"loss": "robust", "label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
        ({"loss": "ipo"}, {"loss_types": ["ipo"]}),
        ({"loss": "hinge"}, {"loss_types": ["hinge"]}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "loss" in value else "",
)
def test_losses_with_a_reference_equal_those_of_trl(section, in_trl, models, batch, dpo_trainer):
    for name, value in {"loss_weights": [1.0], "beta": section.get("beta", 0.1), **in_trl}.items():
        setattr(dpo_trainer, name, value)
    dpo_trainer.model.zero_grad()
    padded = next(iter(dpo_trainer.get_train_dataloader()))
    theirs = dpo_trainer.compute_loss(dpo_trainer.model, padded)
    theirs.backward()
    logged = {name: values[-1] for name, values in dpo_trainer._metrics["train"].items()}
    for chunk in (8, None):
        value, found, metrics = ours(section, models, batch, chunk)
        assert value == pytest.approx(theirs.item(), rel=1e-5)
        for name, gradient in gradients(dpo_trainer.model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert metrics[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


def padded_logits(model, batch):
    """Logits and labels of the documents as a padded batch, the preferred ones first, as TRL's trainers have them."""
    bounds = batch.cu_seqlens.tolist()
    documents = [slice(*pair) for pair in pairwise(bounds)]
    documents = documents[::2] + documents[1::2]
    shape = (len(documents), max(each.stop - each.start for each in documents))
    ids, mask, labels = *torch.zeros(2, *shape, dtype=torch.long), torch.full(shape, IGNORE)
    for row, place in enumerate(documents):
        length = place.stop - place.start
        ids[row, :length], mask[row, :length] = batch.input_ids[0, place], 1
        labels[row, :length] = batch.labels[0, place]
    return model(ids, attention_mask=mask, use_cache=False).logits, labels


@pytest.mark.parametrize(
    ("section", "in_trl"),
    [
        ({"loss": "simpo", "gamma": 0.7}, {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0}),
        ({"loss": "cpo", "label_smoothing": 0.1}, {"loss_type": "sigmoid", "label_smoothing": 0.1, "nll": 1.0}),
        ({"loss": "cpo", "nll_weight": 0.0}, {"loss_type": "sigmoid"}),
        ({"loss": "orpo", "beta": 0.3}, {"beta": 0.3, "nll": 1.0}),
    ],
    ids=["simpo", "cpo", "cpo-without-likelihood", "orpo"],
)
def test_losses_without_a_reference_equal_those_of_trl(section, in_trl, models, batch):
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    value, found, metrics = ours(section, models, batch, 8)
    model = models[0]
    model.zero_grad()
    logits, labels = padded_logits(model, batch)
    by_token = section["loss"] in ("simpo", "orpo")
    chosen, rejected = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=by_token).chunk(2)
    trainer = SimpleNamespace(
        **{"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.0, "accelerator": SimpleNamespace(device="cpu")} | in_trl
    )
    if section["loss"] == "orpo":
        ratio, *rewards = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[:3]
        losses = -ratio
    else:
        losses, *rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    preferred = slice(len(PAIRS))
    likelihood = F.cross_entropy(logits[preferred, :-1].flatten(0, 1), labels[preferred, 1:].flatten())
    theirs = losses.mean() + in_trl.get("nll", 0.0) * likelihood
    theirs.backward()
    assert value == pytest.approx(theirs.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[0].mean().item(), rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(rewards[1].mean().item(), rel=1e-5)
