"""``sparsetrain generate`` with each decode section, and ``sparsetrain calibrate``, on a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.generation.settings import PUBLISHED, Decode
from sparsetrain.inference.calibrate import SHARES
from sparsetrain.inference.writer import Writer
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe.decode_file import read_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
TINY = "sparsetrain:tiny"
TEXT = "".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(18))
EVERYTHING = {
    "top-p": ("--decode.prune.p", "1.0"),
    "Quest": ("--decode.select", "quest", "--decode.candidates", "4096"),
    "top-p of Quest": ("--decode.select", "quest", "--decode.prune.p", "1.0"),
    "top-k, used again": ("--decode.refresh.keep", "4096", "--decode.refresh.every", "4"),
}
FEW = {
    "top-p": ("--decode.prune.p", "0.7"),
    "top-p of the mean": ("--decode.prune.p", "0.7", "--decode.prune.group", "mean"),
    "Quest": ("--decode.select", "quest", "--decode.candidates", "64"),
    "top-p of Quest": ("--decode.select", "quest", "--decode.candidates", "128", "--decode.prune.p", "0.7"),
    "top-p, used again": ("--decode.prune.p", "0.7", "--decode.refresh.every", "4"),
    "top-k by similarity": ("--decode.refresh.keep", "0.25", "--decode.refresh.similarity", "0.8"),
}
SMALL = ("--decode.recent", "8", "--decode.dense_layers", "[0]")

Call = Callable[..., tuple[str, list[list[int]]]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a command; gives what it says on standard error, and the tokens that it wrote."""
    rows: list[list[int]] = []
    original = Writer._completion

    def noted(writer: Writer, row: list[int], prompt_tokens: int) -> Any:
        completion = original(writer, row, prompt_tokens)
        rows.append(row[: completion.new_tokens])
        return completion

    monkeypatch.setattr(Writer, "_completion", noted)

    def run(*arguments: str) -> tuple[str, list[list[int]]]:
        rows.clear()
        code = main((*arguments, "--device", DEVICE))
        told = capsys.readouterr().err
        assert code == 0, told
        return told, list(rows)

    return run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of unequal lengths."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": TEXT[:length]}) + "\n" for length in (len(TEXT), 40, 230)))
    return file


@pytest.mark.parametrize("section", EVERYTHING.values(), ids=EVERYTHING)
@torch.no_grad()
def test_a_choice_of_everything_writes_what_the_dense_model_finds_likeliest(
    section: tuple[str, ...], call: Call, prompts: Path
) -> None:
    model = sparsetrain.load(TINY).to(DEVICE)
    tokenizer = load_tokenizer(resolve(TINY, "path"), "path")
    told, rows = call("generate", TINY, "--file", str(prompts), "--batch", "3", "--max-new-tokens", "16", *section)
    assert "100.0% of the keys read in a step" in told
    for line, row in zip(prompts.read_text().splitlines(), rows, strict=True):
        ids = [*tokenizer(json.loads(line)["prompt"])["input_ids"], *row]
        logits = model(torch.tensor([ids], device=DEVICE), use_cache=False).logits[0, -len(row) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(row, device=DEVICE)[:, None])[:, 0]
        assert (chosen >= logits.amax(-1) - 0.5).all()


@pytest.mark.parametrize("section", FEW.values(), ids=FEW)
def test_fewer_keys_are_read(section: tuple[str, ...], call: Call, prompts: Path) -> None:
    arguments = ("generate", TINY, "--max-new-tokens", "16", *section, *SMALL)
    for given, count in ((("--file", str(prompts), "--batch", "3"), 3), (("--prompt", TEXT), 1)):
        told, rows = call(*arguments, *given)
        assert len(rows) == count
        assert all(0 < len(row) <= 16 for row in rows)
        kept = re.search(r"([\d.]+)% of the keys read in a step.* hold ([\d.]+)% of the softmax weight", told)
        assert kept is not None
        assert 3 < float(kept[1]) < 95
        assert 30 < float(kept[2]) <= 100.1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_run(name: str, call: Call) -> None:
    told, rows = call("generate", TINY, "--prompt", TEXT, "--max-new-tokens", "16", "--decode", name)
    assert "of the keys read in a step" in told
    assert len(rows) == 1


def shares(section: Decode) -> list[int]:
    """The place of each layer's p among those that are tried; behind them where it reads all keys."""
    assert section.prune is not None
    assert isinstance(section.prune.p, dict)
    found = section.prune.p
    return [SHARES.index(found[layer]) if layer in found else len(SHARES) for layer in range(1, 6)]


@pytest.mark.parametrize("selection", [(), ("--decode.select", "quest", "--decode.candidates", "128")], ids=str)
def test_what_is_calibrated_is_what_the_plain_path_finds_and_is_written_with(
    selection: tuple[str, ...], call: Call, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 2)
    options = ("--data", str(tmp_path / "text.txt"), "--tokens", "256", "--rows", "8", "--error", "0.1")
    options = (*options, "--decode.prune.min_keys", "4", *SMALL, *selection, "--dtype", "float32")
    call("calibrate", TINY, *options, "--output", str(tmp_path / "here.yaml"))
    assert main(("calibrate", TINY, *options, "--output", str(tmp_path / "there.yaml"), "--device", "cpu")) == 0
    here, there = (shares(read_decode(tmp_path / f"{name}.yaml")) for name in ("here", "there"))
    # Rounding may move an error over the limit.
    assert all(abs(one - other) <= 1 for one, other in zip(here, there, strict=True))
    told, _ = call(
        "generate", TINY, "--prompt", TEXT, "--max-new-tokens", "16", "--decode", str(tmp_path / "here.yaml")
    )
    assert "of the keys read in a step" in told
