"""The planner: predicted activation peaks against the instrument, plans that keep their budget, refusals that help."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sret_scale.memory import (
    MemoryConfig,
    Prepared,
    apply_recomputation,
    apply_schedules,
    plan_for,
    predict_activations,
    prepare_memory,
)
from sret_scale.memory.config import stem_repeats_norms
from sret_scale.memory.planning.instrument import LiveBytes, measure_peak
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.rank_state import format_bytes, parse_bytes
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.depth_plan import DepthPlan, StageDepth

SHALLOW = SReTConfig(
    image_size=32,
    num_classes=10,
    drop_path=0.1,
    stages=(
        StageConfig(width=16, num_heads=2, num_blocks=2, num_loops=2, groups=(4, 2)),
        StageConfig(width=32, num_heads=2, num_blocks=3, num_loops=2, groups=(2, 1)),
    ),
)
DEEP = replace(
    SHALLOW,
    stages=tuple(replace(stage, num_loops=6, projections="per_loop") for stage in SHALLOW.stages),
)
MODELS = {"shallow": SHALLOW, "deep": DEEP}


def measured_peak(model: SReT, micro_batch_size: int, precision: str, depth: DepthPlan | None = None) -> int:
    """Activation bytes of the second micro-step, by the instrument."""
    side = model.config.image_size
    images = torch.randn(micro_batch_size, 3, side, side)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            scores = [model(images, Noise(0, 0))] if depth is None else model(images, Noise(0, 0), [depth])
            labels = torch.zeros_like(scores[0][:, 0], dtype=torch.int64)
            torch.stack([F.cross_entropy(one.float(), labels) for one in scores]).mean().backward()

    step()
    return measure_peak(model.parameters(), step)


@pytest.mark.lengthy
@pytest.mark.parametrize(("precision", "micro_batch_size"), [("fp32", 2), ("fp32", 5), ("bf16", 3)])
@pytest.mark.parametrize("schedule", ["none", "per_application", "segments", "nested", "binomial"])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_peaks_are_within_ten_percent(
    name: str, schedule: str, micro_batch_size: int, precision: str
) -> None:
    """30 combinations; most agree to the byte, and none needs more than was predicted."""
    memory = MemoryConfig(schedule=schedule)
    repeats_norms = stem_repeats_norms(memory, zero_stage=0)
    predicted = predict_activations(
        MODELS[name], memory, micro_batch_size=micro_batch_size, precision=precision, repeats_norms=repeats_norms
    )
    model = SReT(MODELS[name]).train()
    apply_recomputation(model, memory, repeats_norms=repeats_norms)
    measured = measured_peak(model, micro_batch_size, precision)
    assert 0.9 * predicted <= measured <= predicted


def test_the_instrument_agrees_with_the_profiler() -> None:
    """The profiler sees every allocation on the CPU, also inside kernels; gradients are frozen out of both."""
    layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(4)))
    x = torch.randn(256, 64)

    def step() -> None:
        layers(x).sum().backward()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert measure_peak((), step) == pytest.approx(peak, rel=0.10)


class _TransposedGradient(torch.autograd.Function):
    """A sum over a weight, whose gradient lies transposed."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ones(64, 32).t()


def test_gradients_of_parameters_are_never_activations() -> None:
    """Nor the copy that a first backward pass makes of one in another order, which is `.grad` from then on."""
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    for _ in range(2):
        with LiveBytes([weight]) as counter:
            _TransposedGradient.apply(weight).backward()
        assert counter.live < weight.nbytes


@pytest.fixture(scope="module")
def batches() -> BatchSearch:
    return BatchSearch(DEEP, "fp32", DEVICES["gpu"])


STATE: dict[str, Any] = {"world_size": 2, "zero_stage": 0}


@pytest.mark.lengthy
@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.4, 2.0])
def test_a_plan_keeps_its_budget_when_it_is_trained(batches: BatchSearch, share: float, size: int) -> None:
    """To the byte, also beyond the micro-batches between which others are compared."""
    none = predict_activations(DEEP, MemoryConfig(schedule="none"), micro_batch_size=size)
    fixed = plan_for(batches, budget_bytes=2**40, micro_batch_size=size, **STATE).state.total
    room = max(int(none * share), batches.search(size).smallest_bytes())
    plan = plan_for(batches, budget_bytes=fixed + room, micro_batch_size=size, **STATE)
    model = SReT(DEEP).train()
    apply_schedules(model, plan.schedules, MemoryConfig())
    assert measured_peak(model, size, "fp32") <= room
    assert plan.total_bytes <= plan.budget_bytes


@pytest.mark.lengthy
def test_a_budget_between_recomputation_and_none_is_used(batches: BatchSearch) -> None:
    """The more bytes, the faster: 25 budgets from what `per_application` needs to what `none` needs, without a gap."""
    search = batches.search(4)
    low, high = (
        predict_activations(DEEP, MemoryConfig(schedule=name), micro_batch_size=4)
        for name in ("per_application", "none")
    )
    choices = [search.fastest(low + (high - low) * step // 24) for step in range(25)]
    rates = [1 / choice.seconds for choice in choices if choice is not None]
    assert len(rates) == 25 and rates == sorted(rates)
    assert all(choice is not None and choice.schedules != choices[-1].schedules for choice in choices[:20])
    assert max(b - a for a, b in pairwise(rates)) <= 0.1 * (rates[-1] - rates[0])


@pytest.mark.lengthy
def test_a_micro_batch_is_chosen_among_those_allowed(batches: BatchSearch) -> None:
    sizes = (3, 6, 12)
    plan = plan_for(batches, budget_bytes=2**29, micro_batch_sizes=sizes, **STATE)
    others = [plan_for(batches, budget_bytes=2**29, micro_batch_size=size, **STATE) for size in sizes]
    assert plan.micro_batch_size in sizes
    assert plan.modelled_images_per_s == max(other.modelled_images_per_s for other in others)
    with pytest.raises(ValueError, match="micro-batch 3 needs at least"):
        plan_for(batches, budget_bytes=2**16, micro_batch_sizes=sizes, **STATE)


@pytest.mark.lengthy
def test_more_memory_never_makes_a_plan_slower(batches: BatchSearch) -> None:
    smallest = batches.search(4).smallest_bytes()
    rates = []
    for factor in (1.0, 1.2, 1.5, 2, 3, 5, 10, 30, 100):
        choice = batches.search(4).fastest(int(smallest * factor))
        assert choice is not None
        rates.append(choice.seconds)
    assert rates == sorted(rates, reverse=True)
    assert batches.search(4).fastest(int(0.97 * smallest)) is None


@pytest.mark.lengthy
def test_a_free_micro_batch_uses_the_memory(batches: BatchSearch) -> None:
    plan = plan_for(batches, budget_bytes=2**29, **STATE)
    for size in (1, 2, 8):
        other = plan_for(batches, budget_bytes=2**29, micro_batch_size=size, **STATE)
        assert plan.modelled_images_per_s >= other.modelled_images_per_s
    assert plan.micro_batch_size > 8


@pytest.mark.lengthy
def test_the_state_shrinks_with_the_zero_stage(batches: BatchSearch) -> None:
    totals = []
    for zero_stage in (1, 2, 3):
        plan = plan_for(batches, budget_bytes=2**34, micro_batch_size=2, world_size=8, zero_stage=zero_stage)
        totals.append(plan.state.total - plan.state.buckets)
    assert totals == sorted(totals, reverse=True)


@pytest.mark.lengthy
def test_an_impossible_budget_names_the_next_cheaper_choice(batches: BatchSearch) -> None:
    with pytest.raises(ValueError, match=r"needs at least .* next cheaper choice is a budget of .* (KiB|MiB)"):
        plan_for(batches, budget_bytes=2**16, micro_batch_size=64, **STATE)
    state = plan_for(batches, budget_bytes=2**40, micro_batch_size=1, **STATE).state.total
    room = 2 * batches.search(1).smallest_bytes()
    with pytest.raises(ValueError, match=r"next cheaper choice is a micro-batch of [1-9]"):
        plan_for(batches, budget_bytes=state + room, micro_batch_size=512, **STATE)


@pytest.mark.lengthy
def test_training_is_prepared_within_a_budget_or_refused() -> None:
    model = SReT(DEEP).train()
    state: dict[str, Any] = {"micro_batch_size": 4, "precision": "fp32", "world_size": 1, "zero_stage": 0}
    budget = MemoryConfig(schedule="planned", budget_bytes=20 * 2**20)
    prepared = prepare_memory(model, budget, **state)
    predicted = prepared.activations
    assert measured_peak(model, 4, "fp32") == pytest.approx(predicted, rel=0.10)
    assert predicted < 20 * 2**20
    assert prepared.plan is not None and prepared.plan.activations == predicted
    with pytest.raises(ValueError, match="next cheaper choice"):
        prepare_memory(model, MemoryConfig(schedule="planned", budget_bytes=2**20), **state)
    fixed = MemoryConfig(schedule="nested")
    for zero_stage in (0, 3):
        activations = predict_activations(DEEP, fixed, micro_batch_size=4, repeats_norms=zero_stage < 3)
        prepared = prepare_memory(model, fixed, **{**state, "zero_stage": zero_stage})
        assert prepared == Prepared(activations=activations)
        assert measured_peak(model, 4, "fp32") == pytest.approx(activations, rel=0.10)


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 * 2**30), ("1.5 MiB", 3 * 2**19), ("16GB", 16 * 10**9), ("80G", 80 * 2**30), ("2e6B", 2 * 10**6)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "80 gigs", "inf", "nan", "80", "40e9", "GiB", "9e999GB", "80g"])
def test_wrong_sizes_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 80G, 80GB or 80GiB"):
        parse_bytes(text)


def test_sizes_are_written_in_their_unit() -> None:
    assert [format_bytes(n) for n in (5, 2**11, 3 * 2**20, 2**31)] == ["5 B", "2.00 KiB", "3.00 MiB", "2.00 GiB"]


SETTLING = SReTConfig(
    stages=(
        StageConfig(
            width=16,
            num_heads=4,
            num_blocks=1,
            num_loops=60,
            slices="windows",
            projections="none",
            norm_placement="outer",
            conditioning="input_tied",
        ),
    ),
    image_size=13,
    num_classes=2,
    stem_strides=(1, 1, 1),
    stem="pixels",
    positions="none",
    head="tokens",
)


@pytest.mark.lengthy
@pytest.mark.parametrize("share", [0.2, 0.5, 2.0])
@pytest.mark.parametrize(("config", "num_detached", "supervised"), [(SETTLING, 36, (42, 48, 54)), (DEEP, 2, (4,))])
def test_losses_on_the_way_and_a_start_without_gradient_are_planned(
    config: SReTConfig, num_detached: int, supervised: tuple[int, ...], share: float
) -> None:
    """A budget is kept by the pass that was planned for and by shallower ones; one below what is needed is refused."""
    config = replace(config, stages=tuple(replace(stage, loop_order="model") for stage in config.stages))
    loops = tuple(range(config.stages[0].num_loops))
    depth = DepthPlan(tuple(StageDepth(loops, num_detached) for _ in config.stages), supervised)
    none = predict_activations(config, MemoryConfig(schedule="none"), micro_batch_size=4, depth=depth)
    batches = BatchSearch(config, "fp32", DEVICES["cpu"], repeats_norms=True, depth=depth)
    room = max(int(none * share), batches.search(4).smallest_bytes())
    state = plan_for(batches, budget_bytes=2**40, micro_batch_size=4, zero_stage=0).state.total
    budget = MemoryConfig(schedule="planned", budget_bytes=state + room)
    settings: dict[str, Any] = {"micro_batch_size": 4, "precision": "fp32", "world_size": 1, "zero_stage": 0}
    model = SReT(config).train()
    prepared = prepare_memory(model, budget, **settings, depth=depth)
    assert prepared.activations <= room
    assert measured_peak(model, 4, "fp32", depth) <= 1.03 * prepared.activations
    shallow = DepthPlan(
        tuple(StageDepth(loops[:-1], num_detached - 1) for _ in config.stages), tuple(n - 1 for n in supervised)
    )
    assert measured_peak(model, 4, "fp32", shallow) <= 1.03 * prepared.activations
    with pytest.raises(ValueError, match="next cheaper choice"):
        prepare_memory(model, replace(budget, budget_bytes=state + 1000), **settings, depth=depth)


@pytest.mark.lengthy
@pytest.mark.parametrize("config", [SETTLING, DEEP])
def test_planned_chains_keep_the_gradients(config: SReTConfig) -> None:
    config = replace(config, drop_path=0.0)
    loops = tuple(range(config.stages[0].num_loops))
    depth = DepthPlan(tuple(StageDepth(loops, 2) for _ in config.stages), (3, 5))
    found = []
    for schedule_name in ("none", "planned"):
        torch.manual_seed(0)
        model = SReT(config).train()
        batches = BatchSearch(config, "fp32", DEVICES["cpu"], repeats_norms=True, depth=depth)
        state = plan_for(batches, budget_bytes=2**40, micro_batch_size=2, zero_stage=0).state.total
        memory = MemoryConfig(schedule="none")
        if schedule_name == "planned":
            memory = MemoryConfig(schedule="planned", budget_bytes=state + batches.search(2).smallest_bytes())
        prepare_memory(model, memory, micro_batch_size=2, precision="fp32", world_size=1, zero_stage=0, depth=depth)
        images = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))
        model(images, Noise(0, 0), [depth]).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
