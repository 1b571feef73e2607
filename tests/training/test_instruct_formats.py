"""Instruct sets of the usual formats, trained and asked by the commands: what is learned is what the assistant says."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

FORMATS = ["alpaca", "sharegpt", "completions", "messages", "tools"]
SCHEMA = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
FUNCTION = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


ROWS = {
    "alpaca": [
        {"instruction": "Name a colour of the sky.", "input": "", "output": "Blue.", "text": "Below is an instruction"},
        {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hello.", "input": None, "output": "Hello."},
    ],
    "sharegpt": [
        {"id": "a_0", "conversations": [said("human", "the sun"), said("gpt", "is up"), said("human", "and the sky?")]},
        {"id": "b_0", "conversations": [said("gpt", "How can I help?"), said("human", "1 2"), said("gpt", "3")]},
        {
            "conversations": [said("system", "Be short."), said("human", "sky?"), {**said("gpt", "blue"), "weight": 1}],
            "system": None,
        },
    ],
    "completions": [
        {"prompt": "the pass key is", "completion": " 1 2 3"},
        {"prompt": "the sky is", "completion": " blue", "meta": {"source": "x"}},
    ],
    "messages": [
        {"prompt": "sky?", "prompt_id": "f0", "messages": [turn("user", "sky?"), turn("assistant", "blue")]},
        {"messages": [turn("system", ""), turn("user", "1?"), turn("assistant", "1"), turn("user", "2?"),
                      turn("assistant", "2")]},
    ],
    "tools": [
        {
            "messages": [
                turn("user", "Oslo?"),
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "call_1", "type": "function", "function": FUNCTION}]},
                {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": '{"sky": "blue"}'},
                turn("assistant", "blue"),
            ],
            "tools": [{"type": "function", "function": SCHEMA}],
        },
        {
            "conversations": [
                said("human", "Oslo?"), said("function_call", json.dumps(FUNCTION)), said("observation", "sun"),
                said("gpt", "sun"),
            ],
            "tools": json.dumps([SCHEMA]),
            "system": "",
        },
    ],
}  # fmt: skip
"""As published sets have them, each with columns of its own."""


def chat(*stretches: str) -> list[str]:
    """Stretches of ChatML, whose control tokens are short here."""
    return [text.replace("«", "<|im_start|>").replace("»", "<|im_end|>\n") for text in stretches]


INTRODUCTION = f"""«system
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{json.dumps({"type": "function", "function": SCHEMA})}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>»«user
Oslo?»«assistant
"""


def calling(result: str, answer: str) -> list[str]:
    returned = f"«user\n<tool_response>\n{result}\n</tool_response>»«assistant\n"
    return chat(INTRODUCTION, f"{CALLED}»", returned, f"<think>\n\n</think>\n\n{answer}»")


WRITTEN = {
    "alpaca": [
        chat("«user\nName a colour of the sky.»«assistant\n", "Blue.»"),
        chat("«user\nAdd the numbers.\n\n1 and 2»«assistant\n", "3»"),
        chat("«user\nSay hello.»«assistant\n", "Hello.»"),
    ],
    "sharegpt": [
        chat("«user\nthe sun»«assistant\n", "is up»", "«user\nand the sky?»"),
        chat("«assistant\n", "How can I help?»", "«user\n1 2»«assistant\n", "3»"),
        chat("«system\nBe short.»«user\nsky?»«assistant\n", "blue»"),
    ],
    "completions": [["the pass key is", " 1 2 3<eos>"], ["the sky is", " blue<eos>"]],
    "messages": [
        chat("«user\nsky?»«assistant\n", "blue»"),
        chat("«system\n»«user\n1?»«assistant\n", "1»", "«user\n2?»«assistant\n", "2»"),
    ],
    "tools": [calling('{"sky": "blue"}', "blue"), calling("sun", "sun")],
}
"""Each row's document in stretches; every other one is learned."""


@pytest.fixture(scope="module")
def trained(tiny, shared, ranks_of):
    """The base, and of each format its run of two steps, its export and what that answers; by one process."""

    def make(folder):
        tokenizer = AutoTokenizer.from_pretrained(tiny.parent / "tokenizer")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(folder / "base")
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), initializer_range=0.2, **shape)
        config.eos_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        (folder / "asked.jsonl").write_text(
            json.dumps({"messages": ROWS["tools"][0]["messages"][:3], "tools": [SCHEMA]}) + "\n"
        )
        commands = []
        for name, rows in ROWS.items():
            # A file has one kind of turns.
            kinds = {key: [row for row in rows if key in row] for row in rows for key in row if key.endswith("s")}
            kinds = {key: kinds[key] for key in ("messages", "conversations") if key in kinds} or {"rows": rows}
            for key, part in kinds.items():
                (folder / f"{name}-{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            recipe = {
                "model": {"path": str(folder / "base"), "dtype": "float32",
                          "chat_template": "qwen3" if name == "tools" else "chatml"},
                "attention": {"method": "power", "block": 64, "window": 16, "sinks": 1},
                "data": {"sources": [{"path": str(folder / f"{name}-{key}.jsonl")} for key in kinds]},
                "sequence": {"length": 1024, "packing": False},
                "train": {"steps": 2, "micro_batch": 1, "global_batch_sequences": len(rows), "lr": 1e-3},
                "wandb": {"mode": "disabled"},
            }  # fmt: skip
            (folder / f"{name}.yaml").write_text(json.dumps(recipe))
            run, model = (str(folder / f"{name}-{kind}") for kind in ("run", "model"))
            asked = ["--file", str(folder / "asked.jsonl")] if name == "tools" else ["--prompt", "sky?"]
            asked += ["--chat"] if name in ("alpaca", "sharegpt", "messages") else []
            greedy = ["--max-new-tokens", "4", "--temperature", "0", "--output", f"{model}.jsonl"]
            commands += [["run", str(folder / f"{name}.yaml"), "--output", run], ["export", run, model]]
            commands += [["generate", model, *asked, *greedy]]
        ranks_of(commands, folder / "log").wait()

    return shared("instruct-formats", make)


def learned_ids(tokenizer, stretches):
    """The tokens of a document, and of each whether the assistant says it."""
    ids, learned = [], []
    for number, text in enumerate(stretches):
        own = tokenizer(text)["input_ids"]
        ids += own
        learned += [number % 2 == 1] * len(own)
    return ids, learned


@pytest.mark.parametrize("name", FORMATS)
def test_the_loss_of_an_instruct_set_is_that_of_the_assistants_tokens(name, trained, run_folder):
    """By transformers alone, from texts that are written out here."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "base")
    model = AutoModelForCausalLM.from_pretrained(trained / "base", dtype=torch.float32)
    total, count, seen = 0.0, 0, 0
    for stretches in WRITTEN[name]:
        ids, learned = learned_ids(tokenizer, stretches)
        with torch.no_grad():
            losses = cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        mask = torch.tensor(learned[1:])
        total, count, seen = total + float(losses[mask].sum()), count + int(mask.sum()), seen + len(ids)
    run = run_folder(trained / f"{name}-run")
    assert len(run.steps) == 2
    assert run.values("tokens") == [seen, 2 * seen]
    assert run.values("loss")[0] == pytest.approx(total / count, rel=1e-5)
    assert run.values("loss")[1] < run.values("loss")[0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_export_of_an_instruct_set_answers_to_what_it_learned_from(name, trained):
    """Asked by the same template, tools included; compared with plain transformers, as every key is in the window."""
    tokenizer = AutoTokenizer.from_pretrained(trained / f"{name}-model")
    asked = {"completions": ["sky?"], "tools": WRITTEN["tools"][0][:3]}.get(name, chat("«user\nsky?»«assistant\n"))
    ids = torch.tensor([learned_ids(tokenizer, asked)[0]])
    model = AutoModelForCausalLM.from_pretrained(trained / f"{name}-model", dtype=torch.float32)
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    written = json.loads((trained / f"{name}-model.jsonl").read_text())
    assert written["prompt_tokens"] == ids.shape[1]
    assert written["new_tokens"] == len(answer)
    assert written["completion"] == tokenizer.decode(answer, skip_special_tokens=True)
