"""Chooses micro-batch and schedules for a model and a number of bytes, without a device: images per second come first.

The bytes are predicted (`probe`, `predict`, `step`); the time is only modelled, and ranks plans of the same model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sret_scale.memory.apply import apply_recomputation, apply_schedules
from sret_scale.memory.config import MemoryConfig, schedule_for, stem_repeats_norms
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.predict import predict_chain
from sret_scale.memory.planning.probe import StepCosts, probe_step
from sret_scale.memory.planning.rank_state import StateBytes, format_bytes, state_bytes
from sret_scale.memory.planning.step_cost import DEVICES, step_peak_bytes
from sret_scale.memory.schedule import Schedule
from sret_scale.model import StackConfig, StackModel
from sret_scale.model.depth_plan import DepthPlan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train within `budget_bytes` on a rank.

    schedules: one for each chain: a stage is one, or several where scores are taken on the way.
    activations: their predicted peak. untaped_runs: extra forward runs of an application, on average.
    """

    budget_bytes: int
    micro_batch_size: int
    schedules: tuple[Schedule, ...]
    state: StateBytes
    reserved: int
    activations: int
    untaped_runs: float
    modelled_images_per_s: float

    @property
    def total_bytes(self) -> int:
        """All predicted bytes of a rank at the peak."""
        return self.state.total + self.reserved + self.activations

    def to_json(self) -> dict[str, Any]:
        """The plan for programs; schedules by name."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        return record | {
            "schedules": [schedule.name for schedule in self.schedules],
            "state": asdict(self.state),
            "total_bytes": self.total_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The predicted peak of activation bytes of a model whose recomputation is set, and the plan where one was made."""

    activations: int
    plan: Plan | None = None


def plan_for(
    batches: BatchSearch,
    *,
    budget_bytes: int,
    micro_batch_size: int | None = None,
    micro_batch_sizes: Sequence[int] = (),
    world_size: int = 1,
    zero_stage: int = 1,
    reserved_bytes: int = 0,
) -> Plan:
    """The fitting plan with the most modelled images per second; the micro-batch is chosen too if None.

    micro_batch_sizes: those to choose from, if not all.
    reserved_bytes: for what the planner does not see, such as a teacher and the device's context.
    ValueError if nothing fits; it names the next cheaper choice.
    """
    state = state_bytes(batches.any_costs, world_size=world_size, zero_stage=zero_stage)
    room = budget_bytes - state.total - reserved_bytes
    wanted = micro_batch_size or batches.fastest(room, micro_batch_sizes) or min(micro_batch_sizes, default=1)
    choice = batches.search(wanted).fastest(room)
    if choice is None:
        need = state.total + reserved_bytes + batches.search(wanted).smallest_bytes()
        largest = batches.largest(room)
        cheaper = f"a micro-batch of {largest}" if largest else f"a budget of {format_bytes(need)}"
        raise ValueError(
            f"memory: micro-batch {wanted} needs at least {format_bytes(need)} on a rank and the budget is"
            f" {format_bytes(budget_bytes)}; the next cheaper choice is {cheaper}"
        )
    activations, untaped = _predict(batches.costs(wanted), choice.schedules)
    return Plan(
        budget_bytes=budget_bytes,
        micro_batch_size=wanted,
        schedules=choice.schedules,
        state=state,
        reserved=reserved_bytes,
        activations=activations,
        untaped_runs=untaped / sum(len(stage) for stage in batches.costs(wanted).stages),
        modelled_images_per_s=world_size * wanted / choice.seconds,
    )


def prepare_memory(
    model: StackModel,
    memory: MemoryConfig,
    *,
    micro_batch_size: int,
    precision: str = "fp32",
    world_size: int = 1,
    zero_stage: int = 0,
    reserved_bytes: int = 0,
    depth: DepthPlan | None = None,
) -> Prepared:
    """Sets the recomputation of `model` as `memory` asks, for steps that go no deeper than `depth` (None: all loops).

    ValueError if a budget cannot be kept, before anything is set.
    """
    repeats_norms = stem_repeats_norms(memory, zero_stage)
    if memory.budget_bytes is None:
        activations = predict_activations(
            model.config,
            memory,
            micro_batch_size=micro_batch_size,
            precision=precision,
            repeats_norms=repeats_norms,
            depth=depth,
        )
        apply_recomputation(model, memory, repeats_norms=repeats_norms)
        return Prepared(activations=activations)
    device = "gpu" if next(model.parameters()).is_cuda else "cpu"
    batches = BatchSearch(model.config, precision, DEVICES[device], repeats_norms=repeats_norms, depth=depth)
    plan = plan_for(
        batches,
        budget_bytes=memory.budget_bytes,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        zero_stage=zero_stage,
        reserved_bytes=reserved_bytes,
    )
    stage_of = batches.costs(micro_batch_size).stage_of
    apply_schedules(model, plan.schedules, memory, stage_of=stage_of, repeats_norms=repeats_norms)
    return Prepared(activations=plan.activations, plan=plan)


def predict_activations(
    config: StackConfig,
    memory: MemoryConfig,
    *,
    micro_batch_size: int,
    precision: str = "fp32",
    repeats_norms: bool = False,
    depth: DepthPlan | None = None,
) -> int:
    """The predicted peak of activation bytes in a step; ValueError if `memory` leaves the schedule to the planner.

    repeats_norms: as in `apply_recomputation`. depth: the deepest pass of a step, None for all loops.
    """
    costs = probe_step(
        config, micro_batch_size=micro_batch_size, precision=precision, repeats_norms=repeats_norms, depth=depth
    )
    return _predict(costs, tuple(schedule_for(memory, len(stage)) for stage in costs.stages))[0]


def _predict(costs: StepCosts, schedules: tuple[Schedule, ...]) -> tuple[int, int]:
    """Activation bytes at the peak, and untaped runs of all applications."""
    chains = [predict_chain(schedule, stage) for schedule, stage in zip(schedules, costs.stages, strict=True)]
    return step_peak_bytes(costs, chains), sum(sum(chain.untaped) for chain in chains)
