"""Which loops of each stage run in one pass, and through which the gradient goes: a choice made outside the model.

A stage of n of its loops is the stage that a config of n loops would have: slices, permutations, the branch multiplier
and the depth coordinate are those of n loops, and only what a loop owns (its projection, its conditioning) stays with
it. So `model(x, plans=[first_loops(model.config, 4)])` gives the scores of `model.with_loops(4)`, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from sret_scale.model.applications import (
    ApplicationSpec,
    LoopPosition,
    application_slots,
    drop_path_rates,
    post_norm,
    projection_index,
    residual_constants,
    resolved_scheme,
    resolved_skip,
)
from sret_scale.model.config import StackConfig


@dataclass(frozen=True)
class StageDepth:
    """The loops of one stage that run, ascending. The branches of the first `num_detached` of them get no gradient."""

    loops: tuple[int, ...]
    num_detached: int = 0


@dataclass(frozen=True)
class DepthPlan:
    """One `StageDepth` a stage. `supervised` are numbers of loops of the last stage, ascending, fewer than it runs:
    the stream after so many loops of its last block gives scores too."""

    stages: tuple[StageDepth, ...]
    supervised: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The numbers of loops of the last stage that give scores, in their order."""
        return (*self.supervised, len(self.stages[-1].loops))


def first_loops(config: StackConfig, num_loops: Sequence[int]) -> DepthPlan:
    """The plan of the first loops of every stage, with gradient through all of them."""
    return DepthPlan(tuple(StageDepth(tuple(range(count))) for count in num_loops))


def check_plan(config: StackConfig, plan: DepthPlan) -> None:
    """ValueError unless the model has what the plan asks for."""
    if len(plan.stages) != len(config.stages):
        raise ValueError(f"a depth plan needs one entry for each of {len(config.stages)} stages, got {plan.stages}")
    for index, (stage, depth) in enumerate(zip(config.stages, plan.stages, strict=True)):
        loops = depth.loops
        if not loops or list(loops) != sorted(set(loops)) or loops[0] < 0 or loops[-1] >= stage.num_loops:
            raise ValueError(f"stage {index}: expected ascending loops of 0 to {stage.num_loops - 1}, got {loops}")
        if not 0 <= depth.num_detached < len(loops):
            raise ValueError(
                f"stage {index}: expected 0 to {len(loops) - 1} of {len(loops)} loops to be detached, "
                f"got {depth.num_detached}"
            )
        if depth.num_detached and post_norm(stage):
            raise ValueError(
                f"stage {index}: norm_placement {stage.norm_placement!r} norms the stream itself, so there is no skip "
                "that carries gradient past a detached branch: use 'pre' or 'subln'"
            )
    last = len(plan.stages[-1].loops)
    if list(plan.supervised) != sorted(set(plan.supervised)) or not all(0 < n < last for n in plan.supervised):
        raise ValueError(
            f"supervised loop counts: expected ascending numbers of 1 to {last - 1}, got {plan.supervised}"
        )


@lru_cache(maxsize=1024)
def planned_config(config: StackConfig, plan: DepthPlan) -> StackConfig:
    """The config of the model that a plan makes of another one."""
    check_plan(config, plan)
    stages = tuple(
        replace(stage, num_loops=len(depth.loops), branch_scheme=resolved_scheme(stage), skip=resolved_skip(stage))
        for stage, depth in zip(config.stages, plan.stages, strict=True)
    )
    return replace(config, stages=stages)


@lru_cache(maxsize=1024)
def planned_slots(config: StackConfig, plan: DepthPlan, index: int) -> tuple[ApplicationSpec, ...]:
    """The applications of a stage under a plan: as many loops as it runs, each with what it owns."""
    stage, shorter = config.stages[index], planned_config(config, plan)
    loops = plan.stages[index].loops
    block, projection = residual_constants(shorter.stages[index])
    return tuple(
        replace(
            slot,
            loop=loops[slot.loop],
            projection=projection_index(stage, slot.block, loops[slot.loop]),
            place=LoopPosition(position=slot.loop, num_loops=len(loops), block=block, projection=projection),
        )
        for slot in application_slots(shorter, index)
    )


@lru_cache(maxsize=1024)
def planned_rates(config: StackConfig, plan: DepthPlan, index: int) -> tuple[float, ...]:
    """The drop-path rate of each application of a stage under a plan."""
    rates = drop_path_rates(planned_config(config, plan))[index]
    return tuple(rates[slot.block] for slot in planned_slots(config, plan, index))
