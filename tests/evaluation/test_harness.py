"""lm-evaluation-harness measures a model with its attention method: nothing is padded, cut or scored otherwise."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sparsetrain[eval]'")

from sparsetrain.evaluation import harness  # noqa: E402
from sparsetrain.evaluation.harness import HarnessModel  # noqa: E402

POWER = {"method": "power", "block": 16, "window": 1, "sinks": 1}
SPARSEK = {"method": "sparsek", "topk": 8, "window": 4, "sinks": 1}


def requests(*arguments):
    return [SimpleNamespace(args=each, task_name="test") for each in arguments]


def one_by_one(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0, len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    likelihood = logits.double().log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("attention", [{"method": "full"}, POWER, SPARSEK])
def test_likelihoods_are_those_of_each_text_alone(tiny_model, byte_tokenizer, monkeypatch, attention):
    model = sparsify(tiny_model, attention).eval()
    monkeypatch.setattr(harness, "TOKENS", 400)
    monkeypatch.setattr(harness, "CHUNK", 7)
    texts = [
        ("It rained. " * count, each) for count in (1, 9, 30) for each in ("Yes", "Nes", "no, it did not", "a", "b")
    ]
    found = HarnessModel(model, byte_tokenizer).loglikelihood(requests(*texts), disable_tqdm=True)
    for (context, continuation), (likelihood, greedy) in zip(texts, found, strict=True):
        ids = [byte_tokenizer.encode(text) for text in (context.rstrip(), " " + continuation)]
        wanted, is_greedy = one_by_one(model, *ids)
        assert likelihood == pytest.approx(wanted, rel=1e-5)
        assert greedy == is_greedy


def test_what_greedy_decoding_writes_is_told(tiny_model, byte_tokenizer):
    model = sparsify(tiny_model, POWER).eval()
    lm = HarnessModel(model, byte_tokenizer, batch_size=3)
    prompts = ["It rained. " * count for count in (1, 12, 40)]
    settings = {"until": ["\0\0"], "max_gen_toks": 6, "do_sample": False}
    texts = lm.generate_until(requests(*((prompt, settings) for prompt in prompts)), disable_tqdm=True)
    ids = [byte_tokenizer.encode(prompt) for prompt in prompts]
    alone = [model.generate(torch.tensor([each]), max_new_tokens=6, do_sample=False)[0, len(each) :] for each in ids]
    assert texts == [byte_tokenizer.decode(each, skip_special_tokens=True) for each in alone]
    pairs = [(None, each, written.tolist()) for each, written in zip(ids, alone, strict=True)]
    assert all(greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True))
    pairs[1][2][-1] ^= 1
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False, True]


def test_too_long_texts_are_refused_or_cut_as_asked(tiny_model, byte_tokenizer):
    long = requests(("x" * 60 + "It rained", " today"))
    prompt = requests(("x" * 60 + "It rained", {"until": ["\0"], "max_gen_toks": 4}))
    lm = HarnessModel(tiny_model, byte_tokenizer, max_length=32)
    with pytest.raises(ModelError, match="context of 69 tokens and its continuation of 6 are longer than max_len"):
        lm.loglikelihood(long, disable_tqdm=True)
    with pytest.raises(ModelError, match="a prompt of 69 tokens leaves no room for its answer: max_length=32 has 28"):
        lm.generate_until(prompt, disable_tqdm=True)
    lm = HarnessModel(tiny_model, byte_tokenizer, max_length=32, truncate=True)
    ids = byte_tokenizer.encode("x" * 60 + "It rained today")[-33:]
    ((likelihood, _),) = lm.loglikelihood(long, disable_tqdm=True)
    assert likelihood == pytest.approx(one_by_one(tiny_model.eval(), ids[:-6], ids[-6:])[0], rel=1e-5)
    assert len(lm.generate_until(prompt, disable_tqdm=True)) == 1


def test_what_cannot_work_is_refused(tiny_model, byte_tokenizer, monkeypatch):
    for given, said in (
        ({"batch_size": "auto"}, "batch_size='auto' is no number of prompts"),
        ({"batch_size": 0}, "batch_size=0 is no number of prompts"),
        ({"max_length": 1}, "max_length=1 has no room for a context and a continuation"),
    ):
        with pytest.raises(ModelError, match=said):
            HarnessModel(tiny_model, byte_tokenizer, **given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="each of several ranks would measure everything"):
        HarnessModel(tiny_model, byte_tokenizer)


def test_a_local_task_of_the_harness_runs(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"text": f"It was {number} years ago, and it rained."} for number in range(3)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    (tmp_path / "rain.yaml").write_text(
        f"""
task: rain
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "text.jsonl"}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = sparsify(tiny_model, POWER)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = HarnessModel(model, byte_tokenizer)
    results = simple_evaluate(model=lm, tasks=["rain"], task_manager=manager, bootstrap_iters=0)["results"]
    ids = [byte_tokenizer.encode(each["text"]) for each in documents]
    nats = sum(one_by_one(model, [lm.prefix_token_id], each)[0] for each in ids)
    expected = -nats / sum(map(len, ids)) / torch.log(torch.tensor(2.0)).item()
    assert results["rain"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
