"""Schedules, parameter groups and the moving average, against their plain twins."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.model import SReT
from sret_scale.train.config import OptimConfig
from sret_scale.train.optim import WeightAverage, build_optimizer, peak_rate, schedule_factor, set_rates
from tests.tiny import TINY_MODEL


def test_batch_scaling_rules() -> None:
    rates = {
        rule: peak_rate(OptimConfig(learning_rate=1e-3, reference_batch_size=512, batch_scaling=rule), 2048)
        for rule in ("none", "linear", "sqrt")
    }
    assert rates == {"none": 1e-3, "linear": 4e-3, "sqrt": 2e-3}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**5), st.floats(0, 1))
def test_schedule_is_bounded_and_falls_after_its_peak(images: int, warmup: int, final: float) -> None:
    def factor(at: int) -> float:
        return schedule_factor(at, total_images=10**6, warmup_images=warmup, final_ratio=final)

    assert 0 <= factor(images) <= 1
    assert factor(warmup) == pytest.approx(1)
    assert factor(10**6) == pytest.approx(final)
    if warmup <= images < 10**6:
        assert factor(images + 1) <= factor(images)
    elif images + 1 < warmup:
        assert factor(images + 1) > factor(images)


def test_schedule_is_the_cosine_of_the_publication() -> None:
    got = schedule_factor(750, total_images=1000, warmup_images=0, final_ratio=0.1)
    assert got == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.75)))


def test_every_trained_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    model = SReT(TINY_MODEL)
    optimizer = build_optimizer(model, model.parameter_tags(), OptimConfig(weight_decay=0.3, residual_rate_ratio=0.1))
    grouped = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(grouped) == sorted(id(value) for value in model.parameters() if value.requires_grad)
    set_rates(optimizer.param_groups, 2.0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.2 if group["kind"] == "residual" else 2.0)
        for value in group["params"]:
            assert value.ndim > 1 or group["weight_decay"] == 0.0
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


def test_average_is_a_mean_while_young_and_then_exponential() -> None:
    values = {"x": torch.zeros(3, dtype=torch.float64), "count": torch.tensor(0)}
    average = WeightAverage(values, horizon_images=40)
    expected = torch.zeros(3, dtype=torch.float64)
    for update in range(1, 13):
        values["x"].fill_(update**2)
        values["count"].fill_(update)
        average.update(values, batch_images=10)
        newest = max(1 - math.exp(-10 / 40), 1 / update)
        expected = (1 - newest) * expected + newest * values["x"]
        if update == 4:
            assert average.averages["x"][0] == pytest.approx((1 + 4 + 9 + 16) / 4)
    torch.testing.assert_close(average.averages["x"], expected)
    assert average.averages["count"] == 12
