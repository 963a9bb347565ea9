"""Finds the fastest schedules of a model's stages that keep a step within a number of activation bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from sret_scale.memory.predict import predict_chain
from sret_scale.memory.probe import StepCosts
from sret_scale.memory.schedule import Schedule, binomial, none, slots_needed
from sret_scale.memory.step import Device, chain_seconds, outside_seconds, stage_peak_bytes

MAX_PASSES = 4
TAPED_STEPS = 8


@dataclass(frozen=True)
class Choice:
    """A schedule for each of the first stages, the bytes they hold at rest, and their modelled time."""

    schedules: tuple[Schedule, ...]
    resting_bytes: int
    seconds: float


@lru_cache(maxsize=64)
def candidates(num_applications: int) -> tuple[Schedule, ...]:
    """Schedules worth considering for a chain of equal applications, from no recomputation to r = MAX_PASSES."""
    leaves = [leaf for power in range(12) for leaf in (2**power, 3 * 2**power) if leaf <= num_applications]
    found = {none(num_applications): None}
    for leaf in leaves:
        for slots in _slot_counts(-(-num_applications // leaf)):
            found[binomial(num_applications, slots, leaf)] = None
    for eighth in range(1, TAPED_STEPS):
        num_taped = num_applications * eighth // TAPED_STEPS
        head = num_applications - num_taped
        for leaf in leaves if num_taped else ():
            found[binomial(num_applications, num_applications, min(leaf, head), num_taped)] = None
    return tuple(found)


class Search:
    """All candidates of all stages with their costs, worked out once; then any budget is answered quickly.

    max_passes: the most untaped runs (r) of any application.
    """

    def __init__(self, costs: StepCosts, device: Device, *, max_passes: int = MAX_PASSES) -> None:
        self.costs = costs
        self.outside_seconds = outside_seconds(costs, device)
        # (schedule, peak, bytes at rest, seconds) per candidate and stage
        self.options: list[list[tuple[Schedule, int, int, float]]] = []
        for index, stage in enumerate(costs.stages):
            row = []
            for schedule in candidates(len(stage)):
                chain = predict_chain(schedule, stage)
                if max(chain.untaped) > max_passes:
                    continue
                seconds = chain_seconds(stage, chain.untaped, device)
                row.append((schedule, stage_peak_bytes(costs, index, chain), chain.resting_bytes, seconds))
            self.options.append(row)

    def fastest(self, budget_bytes: int) -> Choice | None:
        """The choice of least modelled time whose predicted activation peak fits; None if no candidate does."""
        partial = [Choice((), 0, self.outside_seconds)]
        for row in self.options:
            partial = _pareto(
                Choice((*before.schedules, schedule), before.resting_bytes + resting, before.seconds + seconds)
                for before in partial
                for schedule, peak, resting, seconds in row
                if before.resting_bytes + peak <= budget_bytes
            )
        last_peak = self.costs.peaks_before[-1]
        fitting = [choice for choice in partial if last_peak + choice.resting_bytes <= budget_bytes]
        return min(fitting, key=lambda choice: choice.seconds, default=None)

    def smallest_bytes(self) -> int:
        """The fewest activation bytes with which `fastest` finds a choice, to within 1 percent (upwards)."""
        low, high = 0, 1
        while self.fastest(high) is None:
            low, high = high, 2 * high
        while high - low > high // 100 + 1:
            middle = (low + high) // 2
            if self.fastest(middle) is None:
                low = middle
            else:
                high = middle
        return high


def _pareto(choices: Iterable[Choice]) -> list[Choice]:
    """The choices that no other one beats in bytes at rest and in time."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.resting_bytes, choice.seconds)):
        if not front or choice.seconds < front[-1].seconds:
            front.append(choice)
    return front


def _slot_counts(num_leaves: int) -> Iterator[int]:
    """Numbers of slots from r = 1 to r = MAX_PASSES: the fewest for each r, and two between."""
    for passes in range(1, MAX_PASSES + 1):
        fewest = slots_needed(num_leaves, passes)
        yield fewest
        after = slots_needed(num_leaves, passes + 1)
        yield from {after + (fewest - after) * third // 3 for third in (1, 2)} - {fewest, after}
