"""Finds the fastest schedules of a model's stages that keep a step within a number of activation bytes."""

from dataclasses import dataclass

import numpy as np

from sret_scale.memory.planning.options import Room, StageOptions
from sret_scale.memory.planning.probe import StepCosts
from sret_scale.memory.planning.step_cost import TAPED_RUNS, Device, application_seconds, outside_seconds
from sret_scale.memory.schedule import Schedule

MAX_PASSES = 4
MAX_FRONT = 200
"""Choices of the first stages that are followed up, evenly spread over those that no other one beats."""


@dataclass(frozen=True)
class Choice:
    """A schedule for each stage, and their modelled time."""

    schedules: tuple[Schedule, ...]
    seconds: float


@dataclass(frozen=True)
class _Partial:
    """Slots and taped applications of the first stages, the room that each had, what they hold at rest, their time."""

    picks: tuple[tuple[Room, int, int], ...]
    resting: int
    seconds: float


class Search:
    """The best schedules of all stages for any budget, from the bytes that each stage leaves to the next ones.

    max_passes: the most untaped runs (r) of any application.
    """

    def __init__(self, costs: StepCosts, device: Device, *, max_passes: int = MAX_PASSES) -> None:
        self.costs = costs
        self.outside_seconds = outside_seconds(costs, device)
        last = len(costs.stages) - 1
        self.stages = [
            StageOptions(stage, max_passes, is_last=index == last) for index, stage in enumerate(costs.stages)
        ]
        self.seconds = [sum(application_seconds(cost, device) for cost in stage) for stage in costs.stages]

    def fastest(self, budget_bytes: int) -> Choice | None:
        """The choice of least modelled time whose activation peak fits; None if there is none."""
        front = [_Partial((), 0, self.outside_seconds)]
        for index in range(len(self.stages)):
            front = _spread(
                _undominated([after for before in front for after in self._after(before, index, budget_bytes)])
            )
        last_peak = self.costs.peaks_before[-1]
        fitting = [partial for partial in front if last_peak + partial.resting <= budget_bytes]
        best = min(fitting, key=lambda partial: partial.seconds, default=None)
        if best is None:
            return None
        schedules = tuple(stage.schedule(*pick) for stage, pick in zip(self.stages, best.picks, strict=True))
        return Choice(schedules, best.seconds)

    def smallest_bytes(self, accuracy: float = 0.01) -> int:
        """The fewest activation bytes with which `fastest` finds a choice, to within this part of them (upwards)."""
        low, high = 0, 1
        while self.fastest(high) is None:
            low, high = high, 2 * high
        while high - low > high * accuracy + 1:
            middle = (low + high) // 2
            if self.fastest(middle) is None:
                low = middle
            else:
                high = middle
        return high

    def _after(self, before: _Partial, index: int, budget_bytes: int) -> list[_Partial]:
        """The choices of one more stage, in the bytes that the stages before it leave."""
        costs, stage = self.costs, self.stages[index]
        left = budget_bytes - before.resting
        if left < max(costs.peaks_before[index], costs.peaks_after[index]):
            return []
        input_bytes = costs.stages[index][0].boundary_bytes  # the caller holds it too while the forward pass runs
        room = Room(forward=left - costs.held_forward[index] + input_bytes, backward=left - costs.held_backward[index])
        options = stage.within(room)
        seconds = before.seconds + self.seconds[index] * (options.runs / stage.length + TAPED_RUNS)
        return [
            _Partial((*before.picks, (room, slots, taped)), before.resting + resting, time)
            for slots, taped, resting, time in zip(
                options.slots.tolist(), options.taped.tolist(), options.resting.tolist(), seconds.tolist(), strict=True
            )
        ]


def _undominated(choices: list[_Partial]) -> list[_Partial]:
    """The choices that no other one beats in bytes at rest and in time."""
    front: list[_Partial] = []
    for choice in sorted(choices, key=lambda choice: (choice.resting, choice.seconds)):
        if not front or choice.seconds < front[-1].seconds:
            front.append(choice)
    return front


def _spread(front: list[_Partial]) -> list[_Partial]:
    if len(front) <= MAX_FRONT:
        return front
    return [front[index] for index in np.linspace(0, len(front) - 1, MAX_FRONT).round().astype(int).tolist()]
