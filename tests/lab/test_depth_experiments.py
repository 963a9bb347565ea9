"""What the experiments on depth promise of their puzzles: no maze of the training, windows as the model has them."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain_windows import cone
from sret_scale.tasks.grid import symmetric
from tests.tiny import ROOT


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports an experiment by its name."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module


def test_mazes_of_the_training_are_known_in_all_symmetries_and_left_out(scripts: Any) -> None:
    reach = scripts("reach")
    images = reach.training_batch(0, 1)[0]
    known = reach.trained_on(7, 1, 1)
    assert 40 < len(known) <= 64 and not reach.trained_on(39, 1, 10)
    for number in range(8):
        assert reach.canonical(symmetric(images[3, :, 8:, :7], number).numpy()) in known
    made = reach.test_pairs(13, 4, 0.0, set())
    one = symmetric(torch.from_numpy(made[2][0][1]), 5).numpy()
    left = reach.test_pairs(13, 4, 0.0, {reach.canonical(one)})
    assert list(made) == [0, 1, 2, 3] and list(left) == [0, 1, 3]


def test_braided_mazes_have_loops_and_twins_differ_in_what_is_reached(scripts: Any) -> None:
    reach = scripts("reach")
    free = reach.tree(15, np.random.default_rng(0), 1.0)
    assert free[::2, 1::2].sum() + free[1::2, ::2].sum() > 48
    images, target, distance = reach.twins(15, np.random.default_rng(1), 0.3)
    for image, reached in zip(images, (False, True), strict=True):
        far = reach.distances(image[0] + image[1] > 0, tuple(np.argwhere(image[1])[0]))
        assert (far[target] < reach.UNREACHED) == reached
    assert distance > 0


def test_the_oracle_sees_what_windows_bring(scripts: Any) -> None:
    oracle, target = scripts("reach_oracle"), (4, 2)
    for count in range(5):
        seen = oracle.cone(target, count, oracle.windows(9))
        for pixel in np.ndindex(9, 9):
            assert seen[pixel] == bool(cone(9, 3, pixel, count)[target]), (count, pixel)


def test_the_oracle_knows_what_a_search_of_the_seen_part_tells(scripts: Any) -> None:
    oracle = scripts("reach_oracle")
    free = np.zeros((15, 15), bool)
    free[1, 1:14] = True
    source, target, whole = (1, 1), (1, 13), np.ones((15, 15), bool)
    # By hand: windows end at columns 2, 4, 5, 7, 8, 10, 11, 13.
    assert oracle.flooded(free, source, target, oracle.windows(15), 20) == 8
    assert oracle.belief(free, source, target, whole) == 1
    assert oracle.belief(free, source, target, np.arange(15) > np.full((15, 1), 5)) == 0
    free[1, 8] = False
    assert oracle.belief(free, source, target, np.arange(15) > np.full((15, 1), 5)) == -1
    assert oracle.flooded(free, source, target, oracle.windows(15), 20) == 21


@pytest.mark.lengthy
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of inductor's own imports
def test_a_step_beyond_its_budget_is_refused_and_a_planned_one_fits(scripts: Any) -> None:
    carry = scripts("carry")
    reader = carry.Reader(40, 0.0)
    with pytest.raises(ValueError, match=r"schedule none: expected at most 1,000,000 bytes of activations a step, got"):
        carry.schedule_of(reader, 40, "none", 1_000_000)
    schedule, taken = carry.schedule_of(reader, 40, "planned", 1_000_000)
    assert taken <= 1_000_000 and schedule.num_applications == 40
    # Fewer applications with gradient than a row of every symbol, and its mark, has.
    assert carry.schedule_of(reader, 12, "none", None)[0].num_applications == 12
