from __future__ import annotations

import io
import json
from typing import Literal

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from sparsetrain.evaluation import pictures
from sparsetrain.evaluation.base import Drawing, TaskReport, TaskResult
from sparsetrain.evaluation.curve_panels import smooth
from sparsetrain.evaluation.panels import ORANGE as ORANGE_HEX
from sparsetrain.evaluation.panels import few, pooled, short
from sparsetrain.evaluation.pictures import (
    attention_picture,
    drawings,
    loss_curve,
    report_picture,
    selection_picture,
    task_picture,
)
from sparsetrain.evaluation.report import print_results
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.survival import Survival
from sparsetrain.evaluation.tasks.passkey import PasskeyResult
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult
from sparsetrain.evaluation.text.definition import TextDefinition, WindowCount
from sparsetrain.evaluation.text.losses import Losses
from sparsetrain.evaluation.text.positions import buckets
from sparsetrain.methods.registry import parse_attention


class LevelResult(TaskResult):
    """A picture of one panel."""

    task: Literal["level"] = "level"
    level: float

    def metrics(self):
        return {"": self.level}

    def score(self):
        return self.level

    @classmethod
    def report(cls, results):
        return TaskReport("Levels", "Levels", "", [["", "level"]])

    @classmethod
    def drawing(cls, name, results, trained_length):
        levels = [result.level for result in results.values()]
        return Drawing(lambda axes: axes.plot(levels, color=ORANGE_HEX), 4, 4)


PASSKEY = PasskeyResult(lengths=[512, 1024], depths=[0.0, 1.0], trials=4, digits=5, correct=[[4, 3], [1, 0]])
RESULTS = {
    label: EvalResult(tasks={"perplexity": PerplexityResult(perplexity=found, tokens=65536), "passkey": PASSKEY})
    for label, found in {"before": {512: 12.3, 1024: 80.0}, "after": {512: 7.5, 1024: 7.1}}.items()
}


def passkey_heatmaps(results, out):
    return task_picture(drawings(results, wide=True)["passkey"], out, wide=True)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 4 / step, "lr": 1e-3 / step} for step in range(1, 9)]
    lines += [{"step": 4, "eval/perplexity/512": 7.5}, {"step": 9, "loss": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def colours(path) -> set[tuple[int, ...]]:
    """The colours of a picture, as 0..255."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int) @ [2**16, 2**8, 1]
    (found,) = np.nonzero(np.bincount(pixels.ravel()) > 50)
    return {(value >> 16, value >> 8 & 255, value & 255) for value in found.tolist()}


@pytest.fixture
def sizes(monkeypatch):
    """Inches of the pictures that are made, which are then not rendered."""
    found = []
    monkeypatch.setattr(pictures, "_save", lambda figure, out: found.append(figure.get_size_inches().tolist()) or out)
    return found


BLUE, ORANGE, GREEN, RED = (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0)


def test_every_series_is_drawn(metrics, tmp_path):
    assert {BLUE, RED} <= colours(loss_curve(metrics, tmp_path / "loss.png"))
    perplexity = drawings(RESULTS, 1024, wide=True)["perplexity"]
    assert ORANGE in colours(task_picture(perplexity, tmp_path / "perplexity.png", wide=True))


def test_losses_by_position_and_their_differences_are_drawn_beside_perplexity(tmp_path):
    def result(shift, seed):
        losses = np.random.default_rng(seed).normal(3 + shift, 1, 512)
        context = np.arange(512)
        definition = TextDefinition(
            source="book", digest="a", tokenizer="t", stride=None, bos=False, documents="joined", targets_only=False,
            windows={512: WindowCount(windows=1, scored=512, mean_context=256)},
        )  # fmt: skip
        return PerplexityResult(
            perplexity={512: 20.0},
            tokens=512,
            definition=definition,
            losses={512: Losses.of(losses)},
            positions=buckets(losses, context, 512, "log"),
        )

    results = {label: EvalResult(tasks={"perplexity": result(0.1 * i, i)}) for i, label in enumerate(("full", "power"))}
    one, both = (drawings(each, wide=True)["perplexity"] for each in ({"full": results["full"]}, results))
    assert (one.width, both.width) == (13, 19), "a panel of differences more"
    picture = task_picture(both, tmp_path / "perplexity.png", wide=True)
    assert imread(picture).shape[1] == 19 * 130
    assert ORANGE in colours(picture)


def test_a_run_without_steps_still_has_a_picture(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png").stat().st_size > 0


def test_cells_are_coloured_by_accuracy(tmp_path):
    missed, found = (0, 34, 78), (254, 232, 56)
    seen = colours(passkey_heatmaps(RESULTS, tmp_path / "passkey.png"))
    assert {missed, found} <= seen


@pytest.mark.parametrize(
    ("attention", "drawn"),
    [
        ({"method": "power", "block": 32}, {BLUE, ORANGE, GREEN}),
        ({"method": "sliding", "block": 32, "window": 4, "sinks": 1}, {BLUE, ORANGE}),
        ({"method": "full"}, {BLUE, GREEN}),
        ({"method": "longnet", "block": 32, "head_shift": True}, {BLUE, GREEN}),
        ({"method": "power", "block": 32, "split": "layers", "farthest": 16}, {BLUE, ORANGE, GREEN}),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_kinds_of_blocks_have_their_colours(tmp_path, attention, drawn):
    config = parse_attention(attention)
    path = attention_picture(config, tmp_path / "attention.png", length=2000, num_layers=4, num_kv_heads=2)
    assert colours(path) & {BLUE, ORANGE, GREEN} == drawn


def report_of(metrics, results, out, survival=None):
    return report_picture(
        out,
        title="quickstart",
        metrics=metrics,
        results=results,
        attention=parse_attention({"method": "power", "block": 32, "dense_layers": [0]}),
        length=2048,
        num_layers=4,
        survival=survival,
    )


def selection():
    return Survival.of({0: torch.full((2, 2048), 100, dtype=torch.int32)})


def test_the_report_holds_every_panel(metrics, tmp_path, sizes):
    for results, survival in ((RESULTS, None), ({"after": EvalResult()}, None), ({"after": EvalResult()}, selection())):
        report_of(metrics, results, tmp_path / "report.png", survival)
    (_, all_panels), (_, fewer), (_, selected) = sizes
    assert all_panels > fewer, "without passkey results there is one panel less"
    assert selected > fewer, "what a learned selection keeps is a panel, too"


@pytest.mark.parametrize("survival", [None, selection()], ids=["pattern", "selection"])
def test_the_report_has_the_colours_of_its_panels(metrics, tmp_path, survival):
    results = RESULTS if survival is None else {"after": EvalResult()}
    assert {BLUE, ORANGE, GREEN, RED} <= colours(report_of(metrics, results, tmp_path / "report.png", survival))


def test_tasks_of_one_kind_are_drawn_and_named_apart(metrics, tmp_path, sizes):
    first = {"level": LevelResult(level=1.0), "passkey": PASSKEY}
    tasks = first | {f"{name}_far": result for name, result in first.items()}
    more = tasks | {"third": first["level"]}
    for found in (first, tasks, more):
        report_of(metrics, {"after": EvalResult(tasks=found)}, tmp_path / "report.png")
    heights = [height for _, height in sizes]
    assert heights[0] < heights[1] == heights[2], "the second map and the second panel take a row each, a third none"
    results = {"after": EvalResult(tasks=tasks)}
    assert list(drawings(results, wide=True)) == ["passkey", "passkey_far"]
    assert list(drawings(results, wide=False)) == ["level", "level_far"]
    console = Console(file=io.StringIO(), width=120)
    print_results(results, console)
    assert "Levels: level_far" in console.file.getvalue()


def test_many_evaluations_are_thinned_to_the_first_and_last(tmp_path, sizes):
    many = {f"step {step}": RESULTS["after"] for step in range(9)}
    assert list(few(many)) == ["step 0", "step 1", "step 7", "step 8"]
    four = {label: many[label] for label in list(many)[:4]}
    for results in (many, four):
        passkey_heatmaps(results, tmp_path / "passkey.png")
    assert sizes[0] == sizes[1]


def test_pooling_keeps_thin_diagonals():
    tiles = pooled(np.eye(1000, dtype=int), 256, 256)
    assert tiles.shape == (250, 250)
    assert (np.diag(tiles) == 1).all()
    assert tiles.sum() == 250
    assert (pooled(np.eye(10, dtype=int), 256, 256) == np.eye(10)).all()


def test_smoothing_does_not_lag():
    ramp = [(step, float(step)) for step in range(200)]
    assert smooth(ramp)[10:-10] == ramp[10:-10]


def test_a_few_steps_are_not_smoothed():
    assert smooth([(step, float(step % 2)) for step in range(39)]) is None


def test_lengths_are_short():
    assert [short(length) for length in (512, 1000, 1024, 1536, 131072)] == ["512", "1,000", "1K", "1.5K", "128K"]


def test_tokens_that_live_longer_are_drawn_differently(tmp_path):
    short, long = torch.zeros(2, 3000, dtype=torch.int32), torch.zeros(2, 3000, dtype=torch.int32)
    short[:, 1500], long[:, 1500] = 3, 2000
    pictures = [
        imread(selection_picture(Survival.of({0: rows, 4: rows}), tmp_path / f"{i}.png"))
        for i, rows in enumerate((short, long))
    ]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()
    assert imread(selection_picture(Survival.of({0: 0 * short}), tmp_path / "empty.png")).size
