"""How deep a step is: draws, plans, weights, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.config.run_config import RunConfig, build, override, split_differences, to_plain
from sret_scale.config.step_depth import (
    DepthConfig,
    check_depth,
    deepest_plan,
    depth_plans,
    drawn_loops,
    share_of,
    weighted_loss,
)
from sret_scale.memory import MemoryConfig, apply_recomputation, apply_schedules, schedule
from sret_scale.memory.planning.costs import ApplicationCost
from sret_scale.memory.planning.predict import predict_chain
from sret_scale.memory.planning.unequal_chains import candidates
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.depth_plan import StageDepth, first_loops, planned_config

SHARED = StageConfig(
    width=8, num_heads=2, num_blocks=1, num_loops=24, projections="per_block", conditioning="norm_by_depth"
)
MODEL = SReTConfig(stages=(SHARED, replace(SHARED, width=16, num_loops=8)), image_size=16, num_classes=5)
FITS = {"schedule": "binomial", "zero_stage": 1, "has_features": False}


def counts(config: DepthConfig, *, num: int = 2000, most: int = 24) -> np.ndarray:
    return np.array([drawn_loops(config, most, seed=3, step=step, progress=step / num) for step in range(num)])


def test_uniform_draws_every_count_alike() -> None:
    drawn = counts(DepthConfig(loops="uniform", min_loops=8))
    assert set(drawn) == set(range(8, 25))
    assert np.bincount(drawn)[8:].min() > 0.5 * len(drawn) / 17


@pytest.mark.parametrize("kind", ["poisson", "lognormal_poisson"])
def test_poisson_draws_have_the_mean_and_spread_asked_for(kind: str) -> None:
    drawn = counts(DepthConfig(loops=kind, mean_loops=33), most=10_000)  # type: ignore[arg-type]
    assert drawn.mean() == pytest.approx(33, rel=0.05) and drawn.min() >= 1
    # Poisson's variance is its rate; a log-normal rate adds rate^2 (exp(sigma^2) - 1).
    variance = 32 if kind == "poisson" else 32 + 32**2 * (math.exp(0.25) - 1)
    assert drawn.var() == pytest.approx(variance, rel=0.25)


def test_growing_goes_evenly_from_least_to_most() -> None:
    config = DepthConfig(loops="growing", min_loops=4, max_loops=7)
    drawn = counts(config, num=400)
    assert drawn.tolist() == sorted(drawn.tolist()) and np.bincount(drawn)[4:].tolist() == [100] * 4
    assert drawn_loops(config, 24, seed=0, step=9, progress=3.0) == 7


def test_fixed_and_all() -> None:
    assert set(counts(DepthConfig(loops="fixed", max_loops=5), num=5)) == {5}
    assert set(counts(DepthConfig(), num=5)) == {24}


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "poisson", "lognormal_poisson", "growing"]),
    low=st.integers(1, 24),
    span=st.integers(0, 23),
    mean=st.floats(1, 100),
    step=st.integers(0, 10**6),
    left_out=st.sampled_from(["last", "any"]),
    backprop=st.none() | st.integers(1, 24),
)
def test_every_plan_fits_the_model(
    kind: str, low: int, span: int, mean: float, step: int, left_out: str, backprop: int | None
) -> None:
    config = DepthConfig(
        loops=kind,  # type: ignore[arg-type]
        min_loops=low,
        max_loops=min(24, low + span),
        mean_loops=mean if "poisson" in kind else None,
        left_out=left_out,  # type: ignore[arg-type]
        backprop_loops=backprop,
        mixed_loops=(2,),
        mixed_weights=(0.5,),
    )
    again = [depth_plans(config, MODEL, seed=7, step=step, progress=0.4) for _ in range(2)]
    assert again[0] == again[1] and again[0] is not None
    drawn, mixed = again[0]
    assert low <= len(drawn.stages[0].loops) <= min(24, low + span)
    assert len(mixed.stages[0].loops) == 2 and len(mixed.stages[1].loops) == 1
    for plan in again[0]:
        planned_config(MODEL, plan)
        if backprop:
            live = [len(stage.loops) - stage.num_detached for stage in plan.stages]
            assert live == [
                min(len(p.loops), share_of(backprop, n, 24)) for p, n in zip(plan.stages, (24, 8), strict=True)
            ]


def test_all_loops_need_no_plan() -> None:
    assert depth_plans(DepthConfig(), MODEL, seed=0, step=0, progress=0) is None
    assert depth_plans(DepthConfig(loops="fixed", max_loops=24), MODEL, seed=0, step=0, progress=0) is None


def test_any_loops_differ_by_step_and_stage() -> None:
    config = DepthConfig(loops="fixed", max_loops=12, left_out="any")
    plans = [depth_plans(config, MODEL, seed=0, step=step, progress=0) for step in range(50)]
    assert len({plan[0].stages[0].loops for plan in plans if plan}) == 50
    used = {loop for plan in plans if plan for loop in plan[0].stages[1].loops}
    assert used == set(range(8))


def test_losses_are_a_weighted_mean() -> None:
    config = DepthConfig(
        supervised_loops=(1, 2, 6), supervision_weights=(0.2, 0.3, 0.4), mixed_loops=(3,), mixed_weights=(0.5,)
    )
    plans = depth_plans(replace(config, loops="fixed", max_loops=9), MODEL, seed=0, step=0, progress=0)
    assert plans is not None and plans[0].supervised == (1, 2)  # nine of 24 loops are three of eight
    losses = [torch.tensor(value) for value in (10.0, 100.0, 1000.0, 5.0)]
    assert weighted_loss(config, plans, losses).item() == pytest.approx((2 + 30 + 1000 + 2.5) / 2.0)
    assert weighted_loss(DepthConfig(), [first_loops(MODEL, (2, 2))], [torch.tensor(3.0)]).item() == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_loops": 0}, "depth.min_loops: expected at least 1, got 0"),
        ({"max_loops": 4}, "depth.max_loops: expected a depth.loops that draws counts, got 4"),
        ({"loops": "uniform", "growth_images": 9}, "depth.growth_images: expected depth.loops=growing, got 9"),
        ({"loops": "poisson"}, "depth.mean_loops"),
        ({"mean_loops": 4.0}, "depth.mean_loops: expected with the poisson draws only"),
        ({"loops": "uniform", "min_loops": 5, "max_loops": 4}, "depth.min_loops: expected at most max_loops"),
        ({"loops": "fixed"}, "depth.max_loops: expected a count for fixed"),
        ({"supervised_loops": (1, 2)}, "depth.supervision_weights: expected one for each of supervised_loops"),
        ({"mixed_loops": (3, 1), "mixed_weights": (1.0, 1.0)}, "depth.mixed_loops: expected ascending counts"),
        ({"supervised_loops": (1,), "supervision_weights": (-1.0,)}, "above 0"),
    ],
)
def test_a_wrong_value_names_its_field(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "stage", "where", "message"),
    [
        ({"max_loops": 25, "loops": "uniform"}, {}, {}, "depth.max_loops: expected at most 24, the loops of the model"),
        ({"mixed_loops": (24,), "mixed_weights": (1.0,)}, {}, {}, "depth.mixed_loops: expected less than 24"),
        ({"supervised_loops": (8,), "supervision_weights": (1.0,)}, {}, {}, "less than 8, the loops of the last stage"),
        ({"loops": "uniform"}, {}, {"zero_stage": 3}, "ZeRO 3"),
        (
            {"mixed_loops": (2,), "mixed_weights": (1.0,)},
            {},
            {"schedule": "planned"},
            "memory.schedule=binomial",
        ),
        (
            {"backprop_loops": 2, "loops": "uniform", "supervised_loops": (3,), "supervision_weights": (1.0,)},
            {},
            {"schedule": "planned"},
            "depth.supervise_every",
        ),
        ({"mixed_loops": (1,), "mixed_weights": (1.0,)}, {}, {"has_features": True}, "distill.feature_weight=0"),
        ({"backprop_loops": 2}, {"norm_placement": "deeploop"}, {}, "norm_placement 'deeploop'"),
        (
            {"loops": "uniform"},
            {"projections": "per_loop", "conditioning": "norm_per_loop"},
            {},
            "every loop of stage 0 has its own projections and conditioning.*depth.left_out=any",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_way_out(
    options: dict[str, object], stage: dict[str, object], where: dict[str, object], message: str
) -> None:
    model = replace(MODEL, stages=tuple(replace(one, **stage) for one in MODEL.stages))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_depth(DepthConfig(**options), model, **(FITS | where))  # type: ignore[arg-type]


def test_elastic_depth_suits_shared_models_and_can_be_forced_on_others() -> None:
    elastic = DepthConfig(loops="uniform", min_loops=8)
    check_depth(elastic, MODEL, **FITS)  # type: ignore[arg-type]
    own = replace(MODEL, stages=tuple(replace(stage, projections="per_loop") for stage in MODEL.stages))
    with pytest.raises(ValueError, match="projections"):
        check_depth(elastic, own, **FITS)  # type: ignore[arg-type]
    for way_out in ({"left_out": "any"}, {"late_loops": "allow"}):
        check_depth(replace(elastic, **way_out), own, **FITS)  # type: ignore[arg-type]


def test_the_section_is_read_strictly_and_makes_another_run() -> None:
    config = override(RunConfig(), ["depth.loops=uniform", "depth.min_loops=2", "depth.late_loops=allow"])
    assert build(RunConfig, to_plain(config)) == config and config.depth.min_loops == 2
    refused, allowed = split_differences(
        RunConfig(), replace(config, telemetry=replace(config.telemetry, num_images=3))
    )
    assert len(refused) == 3 and len(allowed) == 1
    with pytest.raises(ValueError, match=r"unknown key 'depth.max_loop'.*max_loops"):
        override(RunConfig(), ["depth.max_loop=3"])


@pytest.mark.lengthy
@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 40), part=st.integers(1, 40), choice=st.integers(0, 10**6))
def test_a_shortened_schedule_holds_at_most_one_boundary_more(length: int, part: int, choice: int) -> None:
    cost = ApplicationCost(
        boundary_bytes=4, output_bytes=4, forward_bytes=9, taped_bytes=17, tape_bytes=11, backward_bytes=25
    )
    options = candidates(length)
    longer = options[choice % len(options)]
    shorter = schedule.shortened(longer, min(part, length))
    # What runs once in the longer chain does so in the shorter one.
    once = [
        sum(action.hi - action.lo for action in one.forward if action.kind is schedule.Kind.TAPE)
        for one in (longer, shorter)
    ]
    assert once[1] == min(once[0], shorter.num_applications)
    before, after = (predict_chain(one, [cost] * one.num_applications) for one in (longer, shorter))
    assert after.forward_peak <= before.forward_peak and after.resting_bytes <= before.resting_bytes
    assert after.backward_peak <= before.backward_peak + cost.boundary_bytes and max(after.untaped) <= max(
        before.untaped
    )


def test_planned_schedules_run_shorter_chains() -> None:
    torch.manual_seed(0)
    plain, model = SReT(MODEL), SReT(MODEL)
    model.load_state_dict(plain.state_dict())
    apply_schedules(model, [schedule.binomial(24, 2, 3, 5), schedule.none(8)], MemoryConfig(is_checked=True))
    apply_recomputation(plain, MemoryConfig(schedule="none"))
    plan = first_loops(MODEL, (7, 3))
    for one in (plain, model):
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        one.train()(images, Noise(1, 2), [plan]).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert (a.grad is None) is (b.grad is None)
        assert a.grad is None or b.grad is None or torch.equal(a.grad, b.grad)
    with pytest.raises(ValueError, match="cannot be made one of 9"):
        schedule.shortened(schedule.none(8), 9)


def test_plans_name_what_is_left_out() -> None:
    plans = depth_plans(DepthConfig(backprop_loops=6), MODEL, seed=0, step=0, progress=0)
    assert plans is not None and plans[0].stages[0] == StageDepth(tuple(range(24)), 18)
    assert plans[0].stages[1] == StageDepth(tuple(range(8)), 6)


def test_a_loss_after_every_second_loop_with_gradient() -> None:
    config = DepthConfig(loops="uniform", min_loops=2, backprop_loops=5, supervise_every=2)
    single = replace(MODEL, stages=(SHARED,))
    deepest = deepest_plan(config, single)
    assert deepest is not None and deepest.stages[0].num_detached == 19 and deepest.supervised == (21, 23)
    for step in range(40):
        (plan,) = depth_plans(config, single, seed=0, step=step, progress=0) or ()
        loops, detached = len(plan.stages[0].loops), plan.stages[0].num_detached
        assert detached == max(0, loops - 5)
        assert plan.supervised == tuple(range(detached + 2, loops, 2))
        losses = torch.arange(1.0, 2.0 + len(plan.supervised)).unbind()
        assert weighted_loss(config, [plan], losses) == torch.stack(losses).mean()
    with pytest.raises(ValueError, match=r"depth.supervise_every: expected no supervised_loops"):
        DepthConfig(supervise_every=2, supervised_loops=(1,), supervision_weights=(1.0,))
