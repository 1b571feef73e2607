"""``sparsetrain generate``: what it writes is what ``model.generate`` writes, and what it cannot do it refuses."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch
from small_families import small_model
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import ModelError
from sparsetrain.inference.writer import Writer
from sparsetrain.modeling.adapter_folder import adapter_tensors, save_adapters
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.recipe.schema import ModelSection
from sparsetrain.recipe.yaml_source import dump_yaml

TINY = "sparsetrain:tiny"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return sparsetrain.load(TINY), load_tokenizer(resolve(TINY, "path"), "path")


@pytest.fixture(scope="module")
def power_folder(tmp_path_factory, model_and_tokenizer):
    """A run folder whose model has a method of its own, and a chat template."""
    run = tmp_path_factory.mktemp("run")
    model = sparsetrain.sparsify(sparsetrain.load(TINY), {"method": "power", "block": 8, "window": 2, "sinks": 1})
    sparsetrain.save(model, run / "final")
    tokenizer = load_tokenizer(model_and_tokenizer[1].name_or_path, "path")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(run / "final")
    (run / "recipe.yaml").write_text(dump_yaml({"model": {"path": TINY}}))
    return run


@pytest.fixture
def call(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(("generate", *arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def greedy(model, tokenizer, text, count):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_one_prompt_is_streamed_and_the_cost_is_told(call, model_and_tokenizer):
    code, out, err = call(TINY, "--prompt", "import ", "--max-new-tokens", "12")
    assert code == 0
    assert out.removesuffix("\n") == greedy(*model_and_tokenizer, "import ", 12)
    assert "note: attention full, greedy" in err
    assert "12 new tokens" in err
    assert "tokens/s" in err
    assert "cache" in err


def test_a_run_writes_by_the_method_it_was_trained_with(call, power_folder):
    text = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 2
    code, out, err = call(str(power_folder), "--prompt", text, "--max-new-tokens", "10")
    model, tokenizer = sparsetrain.load(power_folder / "final"), load_tokenizer(power_folder / "final", "path")
    assert code == 0
    assert out.removesuffix("\n") == greedy(model, tokenizer, text, 10)
    assert "note: attention power" in err
    assert "--chat" in err


def test_room_on_the_device_is_limited_and_told(call, power_folder, tmp_path, monkeypatch):
    text = "def add(a, b):\n    return a + b\n" * 6
    arguments = (str(power_folder), "--prompt", text, "--max-new-tokens", "10")
    _, want, _ = call(*arguments)
    for options, told in (
        (("--budget", "auto"), r"cache [\d.]+ .B\n"),
        (("--budget", "4096"), r"cache [\d.]+ .B\n"),
        (("--offload",), r"cache [\d.]+ .B on the device and [\d.]+ .B in host memory\n"),
        (("--offload", "--budget", "96"), r"cache [\d.]+ .B on the device and [\d.]+ .B in host memory\n"),
    ):
        code, out, err = call(*arguments, *options)
        assert (code, out) == (0, want)
        assert re.search(told, err)
    file, rows = tmp_path / "prompts.jsonl", [text[:length] for length in (90, 84, 88, 81, 20, 7, 90)]
    file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in rows))
    arguments = (str(power_folder), "--file", str(file), "--max-new-tokens", "4", "--batch", "2", "--dtype", "float32")
    _, want, _ = call(*arguments)
    assert call(*arguments, "--budget", "auto")[1] == call(*arguments, "--offload")[1] == want
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # before weights are read
    code, out, err = call(*arguments, "--budget", "16")
    assert (code, out) == (2, "")
    assert re.search(r"budget=16: behind a prompt of \d+ tokens .* set budget to \d+ or more", err)


def test_a_model_that_no_sparse_cache_holds_writes_into_one_that_grows(call, tmp_path, model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    model = small_model("falcon_h1", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = (str(tmp_path), "--prompt", "import os", "--max-new-tokens", "6")
    code, out, err = call(*arguments)
    assert code == 0
    assert out.removesuffix("\n") == greedy(model, tokenizer, "import os", 6)
    assert "note: the cache grows with the text, and steps are slower: FalconH1ForCausalLM has layers" in err
    code, out, err = call(*arguments, "--budget", "auto")
    assert (code, out) == (2, "")
    assert "which a SparseCache does not hold" in err


def test_rows_of_a_batch_are_completed_as_alone_and_keep_their_columns(call, power_folder, tmp_path):
    rows = [
        {"id": 1, "prompt": "class Reader:\n    def __init__(self"},
        {"id": 2, "messages": [{"role": "user", "content": "import os"}]},
        {"id": 3, "prompt": "x"},
    ]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    options = (
        "--batch",
        "3",
        "--max-new-tokens",
        "6",
        "--dtype",
        "float32",
    )  # of which no two tokens are equally likely
    code, printed, _ = call(str(power_folder), "--file", str(file), *options, "--output", str(out))
    assert (code, printed) == (0, "")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    model = sparsetrain.load(power_folder / "final", dtype=torch.float32)
    tokenizer = load_tokenizer(power_folder / "final", "path")
    texts = [rows[0]["prompt"], "<user>import os\n<answer>", "x"]
    for row, answer, text in zip(rows, answers, texts, strict=True):
        assert {name: answer[name] for name in row} == row
        assert answer["completion"] == greedy(model, tokenizer, text, 6)
        assert answer["prompt_tokens"] == len(tokenizer(text)["input_ids"])
        assert answer["finish"] in ("stop", "length")


def test_what_a_row_says_beside_its_prompt_is_done_or_refused(call, power_folder, tmp_path):
    """By --chat alone for a text; and a chat that is answered is told."""
    file, answered = tmp_path / "rows.ndjson", tmp_path / "answered.jsonl"
    arguments = (str(power_folder), "--max-new-tokens", "1", "--file")
    file.write_text('{"prompt": "import os", "system": "Be kind."}\n')
    code, out, err = call(*arguments, str(file))
    assert (code, out) == (2, "")
    assert "line 1: column 'system' cannot be honoured: the prompt is plain text; --chat writes it as a user's" in err
    code, out, _ = call(*arguments, str(file), "--chat")
    tokenizer = load_tokenizer(power_folder / "final", "path")
    whole = tokenizer("<system>Be kind.\n<user>import os\n<answer>")["input_ids"]
    assert (code, json.loads(out)["prompt_tokens"]) == (0, len(whole))
    turns = [{"from": "human", "value": "import os"}, {"from": "gpt", "value": "import sys"}]
    named = [{"role": "user", "content": "import os"}, {"role": "Assistant", "content": "import sys"}]
    answered.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (turns, named, turns[:1])))
    assert "behind an answer another one is written (2 chats)" in call(*arguments, str(answered))[2]
    array = tmp_path / "rows.json"
    array.write_text('[{"prompt": "import os"}]')
    assert "rows.json is continued as one text; rows are read from a .jsonl" in call(*arguments, str(array))[2]


def test_fewer_keys_are_read_and_counted(call):
    text = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 4
    arguments = (TINY, "--prompt", text, "--max-new-tokens", "8")
    options = ("--decode.prune.p", "0.5", "--decode.refresh.every", "4", "--decode.dense_layers", "[0]")
    code, _, err = call(*arguments, *options, "--decode.recent", "8")
    assert code == 0
    assert "% of the keys read in a step" in err
    assert "of the softmax weight" in err
    assert "note: steps read fewer keys: select=full, prune.p=0.5, refresh.every=4, refresh.choose=codes\n" in err
    code, _, err = call(*arguments, "--decode", "quest")
    assert (code, "no longer than decode.candidates=4,096, so select=quest passes on every key" in err) == (0, True)
    code, out, _ = call(*arguments, "--decode", "twilight-full", "--decode.prune.p", "1.0")
    assert (code, out) == (0, call(*arguments)[1])


def test_one_row_comes_back_as_a_row(call, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "import os", "id": 7}\n')
    options = ("--max-new-tokens", "3", "--repetition-penalty", "1.5")
    code, out, err = call(TINY, "--file", str(tmp_path / "one.jsonl"), *options)
    assert (code, json.loads(out)["id"]) == (0, 7)
    assert "note: attention full, greedy, repetition_penalty 1.5" in err


def test_a_call_that_ends_before_its_first_row_leaves_no_file(call, tmp_path, monkeypatch):
    def broken_off(*_, **__):
        raise ModelError("no memory")

    monkeypatch.setattr(Writer, "complete", broken_off)
    out = tmp_path / "rows.jsonl"
    code, _, told = call(TINY, "--prompt", "a", "--prompt", "b", "--output", str(out))
    assert (code, "no memory" in told) == (2, True), told
    assert not out.exists()


def test_a_recorded_section_can_be_left_out(call, tmp_path):
    model = sparsetrain.sparsify(sparsetrain.load(TINY), {"method": "full"})
    sparsetrain.set_decode(model, {"prune": {"p": 0.5}})
    sparsetrain.save(model, tmp_path / "few", load_tokenizer(resolve(TINY, "path"), "path"))
    arguments = (str(tmp_path / "few"), "--prompt", "import os\n" * 60, "--max-new-tokens", "3")
    code, _, err = call(*arguments)
    assert (code, "note: steps read fewer keys" in err) == (0, True)
    code, _, err = call(*arguments, "--decode", "none")
    assert (code, "keys" in err) == (0, False)


def test_keys_that_a_method_reads_anyway_are_pruned(call, tmp_path, caplog):
    """Of SparseK, which adds modules of its own, with what it is for."""
    model = sparsetrain.sparsify(sparsetrain.load(TINY), {"method": "sparsek", "topk": 16, "window": 16})
    folder = tmp_path / "sparsek"
    sparsetrain.save(model, folder, load_tokenizer(resolve(TINY, "path"), "path"))
    arguments = (
        str(folder),
        "--prompt",
        "def read(path):\n    return open(path).read()\n" * 4,
        "--max-new-tokens",
        "8",
    )
    code, whole, _ = call(*arguments)
    assert code == 0
    own = ("--decode.select", "own", "--decode.recent", "4", "--decode.prune.min_keys", "1", "--decode.prune.p")
    code, _, err = call(*arguments, *own, "0.5")
    assert code == 0
    assert re.search(r"\d\d\.\d% of the keys read in a step.*of the softmax weight", err)
    assert [record.message for record in caplog.records if "for measurement" in record.message] == [
        "decode.select=own with sparsek is for measurement: each step estimates the few keys that are left anew, so it "
        "is slower than without"
    ]
    code, same, _ = call(*arguments, *own, "1.0")
    assert (code, same) == (0, whole)


@pytest.mark.parametrize(("prompts", "most"), [(["import "], 10), (["import ", "a", "b"], 40)], ids=["text", "rows"])
def test_nothing_more_is_written_once_the_reader_has_gone(capsys, monkeypatch, prompts, most):
    class Head(io.StringIO):
        def write(self, text):
            if self.tell():
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Head())
    given = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    assert main(("generate", TINY, *given, "--max-new-tokens", "40")) == 0
    written = re.search(r"(\d+) new tokens", capsys.readouterr().err)
    assert int(written[1]) <= most


def test_a_seed_repeats_what_is_drawn(call):
    def draw(seed):
        return call(TINY, "--prompt", "import ", "--max-new-tokens", "8", "--temperature", "1.5", "--seed", seed)[1]

    assert draw("1") == draw("1") != draw("2")


def test_a_byte_order_mark_is_no_part_of_a_prompt(call, tmp_path, model_and_tokenizer):
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("import ", encoding="utf-8-sig")
    rows.write_text('{"prompt": "import "}\n', encoding="utf-8-sig")
    want = greedy(*model_and_tokenizer, "import ", 5)
    code, out, _ = call(TINY, "--file", str(text), "--max-new-tokens", "5")
    assert (code, out.removesuffix("\n")) == (0, want)
    code, out, _ = call(TINY, "--file", str(rows), "--max-new-tokens", "5")
    assert (code, json.loads(out)["completion"]) == (0, want)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0 with do_sample"),
        ({"do_sample": True, "repetition_penalty": 1e-300}, "repetition_penalty=1e-300"),
        ({"prompt_lookup_num_tokens": 3}, "set --batch 1"),
        ({"use_cache": False}, None),
        ({"cache_implementation": "static"}, None),
        ({"num_beams": 3}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_generation_config_asks_for_is_done_or_refused(call, power_folder, own, message):
    file = power_folder / "final" / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **own}))
    prompts = ("--prompt", "import ", "--prompt", "def f(x):")
    try:
        code, _, err = call(str(power_folder), *prompts, "--batch", "2", "--max-new-tokens", "3")
        assert code == (2 if message else 0)
        assert (message or "new tokens") in err
        if not message:
            assert call(str(power_folder), *prompts[:2], "--max-new-tokens", "3")[0] == 0
    finally:
        file.write_text(before)


def test_stop_strings_end_a_text():
    """With them transformers hands the tokenizer to every pass, down to the attention."""
    tokenizer = load_tokenizer(resolve(TINY, "path"), "path")
    model = sparsetrain.sparsify(
        sparsetrain.load(TINY), {"method": "power", "block": 8, "window": 2, "sinks": 1}
    ).eval()
    ids = tokenizer("import os\nimport sys\n", return_tensors="pt")
    greedy = {"max_new_tokens": 12, "do_sample": False}
    free = tokenizer.decode(model.generate(**ids, **greedy)[0, ids.input_ids.shape[1] :])
    stop = free[3:5]
    stopped = model.generate(**ids, stop_strings=[stop], tokenizer=tokenizer, **greedy)[0, ids.input_ids.shape[1] :]
    text = tokenizer.decode(stopped)
    assert free.startswith(text)
    assert stop in text
    assert len(text) < len(free)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to continue"),
        (["--prompt", ""], "--prompt number 1: the prompt is empty"),
        (["--prompt", "a", "--chat"], "needs a chat template"),
        (["--prompt", "a", "--top-p", "2"], "--top-p 2"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "5"], "--top-k would have no effect"),
        (["--prompt", "a", "--decode", "best"], "decode=best is not known"),
        (["--prompt", "a", "--decode.prune.p", "2"], "decode.prune.p: must be less than or equal to 1, not 2"),
        (["--prompt", "a", "--decode.prune.p", "90%"], "not '90%'"),
        (
            ["--prompt", "a", "--decode", "none", "--decode.recent", "8"],
            "--decode.recent would have no effect; drop one",
        ),
        (["--prompt", "a", "--decode.dense_layers", "0"], "decode.dense_layers: must be a list such as [0, 1], not 0"),
        (["--prompt", "a", "--decode.select", "quest", "--decode.dense_layers", "[0, 1, 2, 3, 4, 5]"], "no layer"),
        (["--prompt", "a", "--dtype", "int8"], "--dtype int8 is not known"),
        (["--prompt", "a", "--device", "cuda:99"], "--device cuda:99"),
        (["--prompt", "a", "--max-new-tokens", "999999"], "set --max-new-tokens to at most"),
        (["--prompt", "a " * 9000], "leaves none to write"),
        (["--file", "no.jsonl"], "--file no.jsonl: cannot be read"),
        (["--file", "blank.jsonl"], '--file blank.jsonl has no rows; give one prompt a line: {"prompt": "..."}'),
        (["--file", "bad.jsonl"], "bad.jsonl, line 2 is no JSON"),
        (["--file", "wide.txt"], "--file wide.txt: not a text file in UTF-8 (it begins as UTF-16 does)"),
        (["--file", "."], "--file .: cannot be read: Is a directory"),
        (["--file", "both.jsonl"], "give either prompt (a text) or messages"),
        (["--file", "taken.jsonl"], "has a column finish already"),
        (["--file", "twice.jsonl"], "the key 'prompt' appears twice"),
        (["--file", "surrogate.jsonl"], "surrogate.jsonl, line 1 holds half of a surrogate pair"),
        (["--prompt", "a", "--temperature", "1e-45"], "--temperature 1e-45"),
        (["--prompt", "a", "--repetition-penalty", "1e-300"], "--repetition-penalty 1e-300"),
        (
            ["--prompt", "a", "--decode.refresh.keep", "-1"],
            "error: decode.refresh.keep: must be greater than 0, not -1\n",
        ),
        (["--prompt", "a", "--decode.prune.min_keys", "9" * 20], "decode.prune.min_keys"),
        (["--prompt", "a", "--budget", "few"], "budget=few must be auto, or a number of tokens"),
        (["--prompt", "a", "--budget", "64"], "budget=64: the layers of this model have full attention"),
        (["--prompt", "a", "--offload"], "offload=True: the layers of this model have full attention"),
        (["--prompt", "a", "--output", "taken.jsonl"], "exists already"),
        (["--prompt", "a", "--output", "nowhere/a.jsonl"], "there is no folder nowhere"),
        (["--prompt", "a", "--output", "link.jsonl"], "exists already"),
        (["--prompt", "a", "--output", "read-only/a.jsonl"], "nothing can be written in read-only"),
    ],
)
def test_what_cannot_be_done_is_refused(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    # There not even root may write.
    (tmp_path / "read-only").symlink_to("/proc")
    (tmp_path / "link.jsonl").symlink_to("gone")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "wide.txt").write_text("import", encoding="utf-16")
    (tmp_path / "both.jsonl").write_text('{"prompt": "a", "messages": []}\n')
    (tmp_path / "taken.jsonl").write_text('{"prompt": "a", "finish": "b"}\n')
    (tmp_path / "twice.jsonl").write_text('{"prompt": "a", "prompt": "b"}\n')
    (tmp_path / "surrogate.jsonl").write_text('{"prompt": "a", "note": "\\ud800"}\n')
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing needs weights to be refused
    code, out, err = call(TINY, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_adapters_write_on_top_of_their_base_and_are_checked_before_its_weights(call, tmp_path, monkeypatch):
    model = sparsetrain.sparsify(sparsetrain.load(TINY), {"method": "power", "block": 8, "window": 2, "sinks": 1})
    add_adapters(model, LoraSection())
    state = {name: model.state_dict()[of_model] for of_model, name in adapter_tensors(model).items()}
    save_adapters(model, tmp_path / "adapters", base=ModelSection(path=TINY), state_dict=state)
    load_tokenizer(resolve(TINY, "path"), "path").save_pretrained(tmp_path / "adapters")
    arguments = (str(tmp_path / "adapters"), "--prompt", "import ", "--max-new-tokens", "3")
    code, _, err = call(*arguments)
    assert (code, "note: attention power" in err) == (0, True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    code, _, err = call(*arguments, "--decode", "twilight")
    assert (code, "does not go with a block pattern, which the layers of this model have" in err) == (2, True)
