from __future__ import annotations

import math

import pytest

from sparsetrain.recipe.schema import TrainSection
from sparsetrain.training.schedule import share_of_peak


def curve(steps, warmup_steps, **train):
    section = TrainSection(steps=steps, lr=1.0, **train)
    return [2.0 * share_of_peak(section, step, steps, warmup_steps) for step in range(steps)]


def test_warmup_rises_linearly_to_the_peak():
    assert curve(8, 4, schedule="constant") == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_linear_falls_evenly_to_the_floor_at_the_last_step():
    assert curve(7, 2, schedule="linear", min_lr_ratio=0.5) == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0])


def test_cosine_is_half_a_wave_between_the_peak_and_the_floor():
    found = curve(9, 0, schedule="cosine", min_lr_ratio=0.1)
    assert found == pytest.approx([0.2 + 1.8 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)])
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.1)
    assert found[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_without_a_floor_the_last_step_is_at_zero(schedule):
    assert curve(5, 1, schedule=schedule, min_lr_ratio=0.0)[-1] == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 3)])
def test_the_shortest_runs_reach_the_peak(schedule, steps, warmup):
    found = curve(steps, warmup, schedule=schedule)
    assert max(found) == 2.0
    assert all(rate > 0 for rate in found)
