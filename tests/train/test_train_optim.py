"""Schedules, parameter groups and the moving average, against their plain twins."""

import importlib
import math
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sret_scale.config.run_config import ClassConfig, OptimConfig
from sret_scale.model import ParameterTag, SReT
from sret_scale.train.optim import (
    WeightAverage,
    build_optimizer,
    check_optimizer,
    peak_rate,
    schedule_factor,
    set_rates,
)
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
    assert factor(10**6) == pytest.approx(final) == factor(10**6 + images)
    if warmup <= images < 10**6:
        assert factor(images + 1) <= factor(images)
    elif images + 1 < warmup:
        assert factor(images + 1) > factor(images)


def test_schedule_is_the_cosine_of_the_publication() -> None:
    got = schedule_factor(750, total_images=1000, warmup_images=0, final_ratio=0.1)
    assert got == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.75)))


def test_every_trained_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    model = SReT(TINY_MODEL)
    optimizer = build_optimizer(
        model, model.parameter_tags(), OptimConfig(weight_decay=0.3, residual=ClassConfig(rate_ratio=0.1))
    )
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
        average.statistics = {"norm.running_mean": torch.zeros(1)}
        average.update(values, batch_images=10)
        assert average.statistics == {}, "they were measured for other weights"
        newest = max(1 - math.exp(-10 / 40), 1 / update)
        expected = (1 - newest) * expected + newest * values["x"]
        if update == 4:
            assert average.averages["x"][0] == pytest.approx((1 + 4 + 9 + 16) / 4)
    torch.testing.assert_close(average.averages["x"], expected)
    assert average.averages["count"] == 12


def test_linear_then_root_has_no_jump_and_goes_on_with_the_root() -> None:
    def rate(batch: int) -> float:
        return peak_rate(OptimConfig(learning_rate=1e-3, reference_batch_size=512), batch)

    assert rate(1024) == pytest.approx(2e-3)
    assert rate(2048) == pytest.approx(4e-3)
    assert rate(2049) == pytest.approx(4e-3, rel=1e-3)
    assert rate(8192) == pytest.approx(8e-3)


def test_a_class_has_its_own_rate_eps_decay_and_bound() -> None:
    model = SReT(TINY_MODEL)
    own = ClassConfig(rate_ratio=0.5, eps=1e-4, weight_decay=0.0, clip_norm=2.0)
    optimizer = build_optimizer(model, model.parameter_tags(), OptimConfig(weight_decay=0.3, projection=own))
    assert {group["kind"] for group in optimizer.param_groups} > {"projection", "tied"}
    for group in optimizer.param_groups:
        expected = (0.5, 1e-4, 2.0) if group["kind"] == "projection" else (1.0, 1e-8, None)
        assert (group["rate_ratio"], group["eps"], group["clip_norm"]) == expected
        assert group["weight_decay"] in ((0.0,) if group["kind"] == "projection" else (0.0, 0.3))


def test_a_slow_skip_learns_at_the_rate_over_its_applications() -> None:
    stage = replace(TINY_MODEL.stages[0], skip="slow")
    model = SReT(replace(TINY_MODEL, stages=(stage, *TINY_MODEL.stages[1:])))
    optimizer = build_optimizer(model, model.parameter_tags(), OptimConfig())
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    skip, block = "stages.0.blocks.0.residual1.alpha", "stages.0.blocks.0.attention.qkv.weight"
    assert stage.num_applications > 1
    assert rates[skip] == pytest.approx(rates[block] / stage.num_applications)


def test_layer_decay_is_timms_where_every_block_is_used_once() -> None:
    # Ours first: timm's own import of torchvision fails beside a torch for CPUs.
    adapter = importlib.import_module("sret_scale.timm")
    timm_optim = importlib.import_module("timm.optim")
    # Without projections: timm's patterns number those as if each had a block of its own.
    stages = tuple(replace(stage, num_blocks=2, num_loops=1, projections="none") for stage in TINY_MODEL.stages)
    model = SReT(replace(TINY_MODEL, stages=stages))
    # By its dictionary: the type of a module takes no attributes but tensors and modules.
    vars(model)["group_matcher"] = types.MethodType(adapter.TimmSReT.group_matcher, model)
    theirs: dict[int, float] = {}
    for group in timm_optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5):
        theirs |= {id(value): group["lr_scale"] for value in group["params"]}
    ours = build_optimizer(model, model.parameter_tags(), OptimConfig(layer_decay=0.5))
    for group in ours.param_groups:
        for value in group["params"]:
            assert group["rate_ratio"] == pytest.approx(theirs[id(value)])


def test_a_block_and_all_its_loops_are_one_layer() -> None:
    model = SReT(TINY_MODEL)
    layers = {name: tag.layer for name, tag in model.parameter_tags().items()}
    assert {layer for name, layer in layers.items() if name.startswith("stages.0.")} == {1}
    assert (layers["position"], layers["stem.convs.0.weight"], layers["pools.0.weight"]) == (0, 0, 2)
    assert {layer for name, layer in layers.items() if name.startswith("stages.1.")} == {3} == {layers["norm.bias"]}
    assert {tag.num_layers for tag in model.parameter_tags().values()} == {layers["head.bias"] + 1} == {5}


def test_muon_is_refused_where_zero_cuts_matrices() -> None:
    check_optimizer(OptimConfig(optimizer="muon"), 0)
    check_optimizer(OptimConfig(optimizer="lamb"), 3)
    with pytest.raises(ValueError, match="optimizer=muon does not work at ZeRO stage 1: it needs whole matrices"):
        check_optimizer(OptimConfig(optimizer="muon"), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_decay": 0.0}, "optim.layer_decay: expected above 0 and at most 1, got 0.0"),
        ({"tied": ClassConfig(clip_norm=0.0)}, "optim.tied.clip_norm: expected above 0, or null, got 0.0"),
        ({"residual": ClassConfig(rate_ratio=-1.0)}, "optim.residual.rate_ratio: expected 0 or more, got -1.0"),
    ],
)
def test_a_bad_class_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]  # the point


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tags = {name: ParameterTag("tied", decay=True) for name, _ in model.named_parameters()}
    optimizer = build_optimizer(model, tags, OptimConfig(weight_decay=0.5, learning_rate=0.1))
    twin = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    for used in ((0, 1), (0,), (0, 1), (1,), (0, 1)):
        for network, rule in ((model, optimizer), (twin, plain)):
            rule.zero_grad()
            sum(network[index](torch.ones(1, 2)).square().sum() for index in used).backward()
            rule.step()
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_lamb_moves_what_is_zero_and_keeps_what_has_no_update() -> None:
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(layer.weight)
    bias = layer.bias.detach().clone()
    tags = {name: ParameterTag("tied", decay=False) for name, _ in layer.named_parameters()}
    optimizer = build_optimizer(layer, tags, OptimConfig(optimizer="lamb", weight_decay=0.0, learning_rate=0.1))
    layer.weight.grad, layer.bias.grad = torch.tensor([[2.0, -3.0, 0.5]]).repeat(2, 1), torch.zeros(2)
    optimizer.step()
    # A first update of Adam has the size 1, and the ratio of norms counts as 1.
    assert_close(layer.weight.detach(), torch.tensor([[-0.1, 0.1, -0.1]]).repeat(2, 1))
    assert torch.equal(layer.bias.detach(), bias)


def test_the_fused_update_is_the_plain_one() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5))
    tags = {name: ParameterTag("tied", decay=True) for name, _ in model.named_parameters()}
    optimizer = build_optimizer(model, tags, OptimConfig(weight_decay=0.5, learning_rate=0.01))
    twin = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5))
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.5, fused=False, foreach=False)
    for _ in range(20):
        for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
            got.grad = torch.randn_like(got)
            expected.grad = got.grad.clone()
        optimizer.step()
        plain.step()
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(got, expected, rtol=1e-6, atol=1e-7)
