"""``sparsetrain calibrate``: with the p that it finds, generation loses no more than was asked for, and a section is
used on its own model alone."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from decode_steps import small_llama
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import ModelError
from sparsetrain.generation.settings import parse_decode
from sparsetrain.inference.calibrate import SHARES, calibrate, places
from sparsetrain.inference.heldout import stretches
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe.decode_file import decode_text, read_decode

TINY = "sparsetrain:tiny"
TOKENS = 192
SMALL = {"prune": {"min_keys": 1}, "sinks": 1, "recent": 4, "dense_layers": [0]}
SECTIONS = {
    "full": SMALL,
    "quest": {**SMALL, "select": "quest", "candidates": 128},
    "channels": {**SMALL, "select": "channels", "channels": 6, "candidates": 0.6},
}


make = partial(small_llama, initializer_range=0.2)


@pytest.fixture(scope="module")
def texts():
    return torch.randint(1, 97, (2, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "held-out.txt"
    file.write_text("".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(80)))
    return file


@pytest.fixture
def call(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@torch.no_grad()
def step_outputs(model, text, prompt, places):
    """Attention outputs of the steps that read the tokens at ``places``, ``[Hq, D]`` of each layer, behind a prompt."""
    seen, found = [], []
    with ExitStack() as stack:
        for layer in model.model.layers:
            hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1]))
            stack.callback(hook.remove)
        cache = model(torch.tensor([text[:prompt]]), use_cache=True).past_key_values
        read = prompt
        for at in places:
            # As many tokens at once as are read in steps: more would be taken for another part of the prompt.
            more = [text[start : min(start + 16, at)] for start in range(read, at, 16)]
            for part in (*more, text[at : at + 1]):
                seen.clear()
                model(torch.tensor([part]), past_key_values=cache)
            found.append([out.unflatten(0, (4, 16)) for out in seen])
            read = at + 1
    return found


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_generation_loses_what_was_measured(section, texts):
    """Layer by layer through set_decode and a step, beside dense steps at the same rows."""
    model, target = make(), 0.2
    found, layers = calibrate(model, texts, parse_decode(section), error=target, rows=6)
    sampled = places(2, TOKENS, 6, 0)
    assert [layer.index for layer in layers] == [1, 2]
    assert any(layer.p is not None and layer.p < 1 for layer in layers)

    def steps():
        for text, rows in zip(texts, sampled, strict=True):
            yield from step_outputs(model, text, int(rows[0]), rows.tolist())

    dense = [*steps()]
    for layer in layers:
        if layer.p is None:
            continue
        p, dense_layers = {layer.index: layer.p}, [other for other in range(3) if other != layer.index]
        fields = {**section, "prune": {"min_keys": 1, "p": p}, "dense_layers": dense_layers}
        if found.heavy_channels is not None:
            fields["heavy_channels"] = {layer.index: found.heavy_channels[layer.index]}
        sparsetrain.set_decode(model, fields)
        pairs = [(few[layer.index], want[layer.index]) for few, want in zip(steps(), dense, strict=True)]
        again = torch.stack([(few - want).norm(dim=-1) / want.norm(dim=-1) for few, want in pairs])
        assert again.mean() <= target
        torch.testing.assert_close(float(again.mean()), layer.error, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(float(again.max()), layer.worst, rtol=1e-3, atol=1e-5)
    assert found.prune is not None
    assert found.prune.p == {layer.index: layer.p for layer in layers if layer.p is not None}


def test_less_may_be_read_where_more_may_be_lost(texts):
    model = make()
    by_target = {
        error: calibrate(model, texts, parse_decode(SMALL), error=error, rows=8)[1] for error in (0.0, 0.05, 0.2, 0.5)
    }
    for fewer, more in zip([*by_target.values()][1:], by_target.values(), strict=False):
        for one, other in zip(fewer, more, strict=True):
            assert one.p <= other.p
            assert one.kept <= other.kept
    assert [layer.p for layer in by_target[0.0]] == [1.0, 1.0]
    assert [layer.error for layer in by_target[0.0]] == [0.0, 0.0]
    assert all(layer.p < 1 for layer in by_target[0.5])
    assert "decode" not in model.config.sparsetrain


def test_layers_where_quest_passes_on_too_little_read_all_keys(texts):
    """Heads that look at few keys beside heads that look at all of them: only the first can be read by pages."""
    model = make()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.zero_()
        model.model.layers[2].self_attn.q_proj.weight.mul_(30)
    section = parse_decode({**SMALL, "select": "quest", "candidates": 64})
    found, layers = calibrate(model, texts, section, error=0.4, rows=8)
    assert [layer.p is None for layer in layers] == [True, False]
    assert layers[0].candidate_mass < 0.6 < layers[1].candidate_mass
    assert found.dense_layers == [0, 1]
    sparsetrain.set_decode(model, found)
    with pytest.raises(ModelError, match=r"--error 0 is out of reach.*--decode.candidates"):
        calibrate(model, texts, section, error=0, rows=8)


def test_a_section_is_for_its_model_alone(texts, tmp_path):
    model = make()
    found, _ = calibrate(model, texts, parse_decode(SMALL), error=0.2, rows=2, name="one/model")
    file = tmp_path / "decode.yaml"
    file.write_text(decode_text(found))
    assert read_decode(file) == found
    assert "calibrated" not in sparsetrain.set_decode(model, file).config.sparsetrain["decode"]
    other = make(head_dim=8)
    other.config._name_or_path = "another/model"
    with pytest.raises(ModelError, match=r"calibrated on one/model, and another/model is another.*head_dim is 8 inst"):
        sparsetrain.set_decode(other, str(file))


def test_from_a_text_to_a_completion(call, held_out, tmp_path):
    file, folder = tmp_path / "decode.yaml", tmp_path / "saved"
    options = (
        "--tokens",
        "320",
        "--rows",
        "4",
        "--error",
        "0.1",
        "--decode.recent",
        "8",
        "--decode.prune.min_keys",
        "4",
    )
    given = ("--data", str(held_out), *options, "--output", str(file), "--save", str(folder))
    code, out, err = call("calibrate", TINY, *given)
    assert code == 0, err
    assert "kept keys" in out
    assert "4 rows of" in err
    assert "nothing is written" not in err
    found = read_decode(file)
    assert found.prune is not None
    assert [*found.prune.p] == [2, 3, 4, 5]
    assert set(found.prune.p.values()) <= set(SHARES)
    assert (found.recent, found.prune.min_keys, found.calibrated.error) == (8, 4, 0.1)
    text = held_out.read_text()[:600]
    code, _, err = call("generate", TINY, "--prompt", text, "--max-new-tokens", "4", "--decode", str(file))
    assert code == 0
    assert "% of the keys read in a step" in err
    saved = sparsetrain.load(folder).config.sparsetrain["decode"]
    assert saved["prune"]["p"] == {str(layer): p for layer, p in found.prune.p.items()}
    code, _, err = call("generate", TINY, "--prompt", text, "--decode", str(file), "--decode.dense_layers", "[0, 1, 2]")
    assert (code, "for layer 2 has no effect" in err) == (2, True)


def test_what_a_calibration_did_not_measure_or_keep_is_said(call, held_out, tmp_path):
    options = ("--tokens", "320", "--rows", "2", "--decode.recent", "8", "--decode.prune.min_keys", "4")
    code, _, err = call("calibrate", TINY, "--data", str(held_out), *options, "--decode.select", "quest")
    assert code == 0, err
    assert "no longer than candidates=8,192, so select=quest passed on every key" in err
    assert "nothing is written: give --output decode.yaml" in err
    few = ("--decode.select", "quest", "--decode.candidates", "48", "--error", "0.12")
    file = tmp_path / "decode.json"
    code, _, err = call("calibrate", TINY, "--data", str(held_out), *options, *few, "--output", str(file))
    assert code == 0, err
    assert "passed on every key" not in err
    assert json.loads(file.read_text())["select"] == "quest"
    assert read_decode(file).candidates == 48


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name):
    tokenizer = load_tokenizer(resolve(TINY, "path"), "path")
    text = "import os\n" * 40
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}), encoding="utf-8-sig")
    assert stretches(tmp_path / name, tokenizer, 64, None)[0] == tokenizer(text)["input_ids"][:64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no.txt"], "--data no.txt: cannot be read"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2 is no JSON"),
        (["--data", "prompts.jsonl"], "prompts.jsonl, line 1: expected an object with a text"),
        (["--data", "short.txt"], "its longest text has"),
        (["--tokens", "1024"], "set it to at most 512"),
        (["--data", "some.txt", "--tokens", "512"], "--tokens 512 are needed; lower it"),
        (["--tokens", "128"], "read 132 keys with any p; raise it above 264"),
        (["--rows", "9999"], "rows to measure, one for every 16 tokens"),
        (["--error", "-1"], "--error"),
        (["--decode", "refreshkv"], "--decode: refresh is not measured"),
        (["--decode.prune.p", "0.5"], "No such option"),
        (["--decode.dense_layers", "[0, 1, 2, 3, 4, 5]"], "leaves no layer"),
        (["--output", "a.txt"], "must end in .yaml"),
        (["--output", "nowhere/a.yaml"], "there is no folder nowhere"),
        (["--save", "some.txt"], "exists already"),
        (["--save", "a.yaml", "--output", "./a.yaml"], "one is a file and one a folder"),
    ],
)
def test_what_cannot_be_done_is_refused(call, held_out, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "some.txt").write_text("import os\n" * 40)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing needs weights to be refused
    code, out, err = call("calibrate", TINY, *(() if "--data" in arguments else ("--data", str(held_out))), *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {p: {2: 1.5}}", r"decode.prune.p.2: .*less than or equal to 1"),
        ("[1, 2]", "expected the fields of a decode section"),
        (json.dumps({"prune": {"p": 0.9}, "model": "x"}), "decode.model"),
    ],
)
def test_files_with_faults_are_refused(call, tmp_path, text, message):
    file = tmp_path / "decode.yaml"
    file.write_text(text)
    with pytest.raises(ModelError, match=message) as error:
        read_decode(file)
    assert str(file) in str(error.value)
    assert call("generate", TINY, "--prompt", "a", "--decode", str(file))[0] == 2
