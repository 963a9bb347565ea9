"""Plans any chain of modules within a number of bytes: exact dynamic programming over unequal applications."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sret_scale.memory.planning.costs import ApplicationCost, measure_application
from sret_scale.memory.planning.predict import predict_chain
from sret_scale.memory.planning.rank_state import format_bytes
from sret_scale.memory.planning.search import MAX_PASSES
from sret_scale.memory.planning.step_cost import DEVICES, application_seconds
from sret_scale.memory.recompute import Chained
from sret_scale.memory.schedule import Schedule, binomial, grow, none, slots_needed

MAX_EXACT = 64
"""Longest chain for the exact program, whose time grows with the cube; longer ones take the best of `candidates`."""

TAPED_STEPS = 8

LEVELS = 400
"""Steps into which a budget is divided; boundaries are rounded up to them."""


def plan_chain(applications: Sequence[Chained], x: Tensor, budget_bytes: int) -> Schedule:
    """The schedule of least modelled time with which a chain keeps within `budget_bytes` of activations.

    x: an input like those to come. Each application runs a few times on it, to be measured; gradients are not touched.
    ValueError if no schedule fits.
    """
    costs = measure_chain(applications, x)
    seconds = [application_seconds(cost, DEVICES["gpu" if x.is_cuda else "cpu"]) for cost in costs]
    return schedule_within(costs, seconds, budget_bytes)


def measure_chain(applications: Sequence[Chained], x: Tensor) -> list[ApplicationCost]:
    """The cost of each application; one that was met before with the same shape is not measured again."""
    known: dict[tuple[object, ...], tuple[ApplicationCost, Tensor]] = {}
    costs = []
    x = x.detach()
    for application in applications:
        kind = (id(application), x.shape, x.dtype)
        if kind not in known:
            with torch.no_grad():
                known[kind] = measure_application(application, x), application(x)
        cost, x = known[kind]
        costs.append(cost)
    return costs


def schedule_within(costs: Sequence[ApplicationCost], seconds: Sequence[float], budget_bytes: int) -> Schedule:
    """The schedule of least recomputed time whose predicted peak fits; ValueError if none does.

    seconds: the time of one forward run of each application.
    """
    if len(costs) > MAX_EXACT:
        fitting: list[tuple[float, int, Schedule]] = []
        for schedule in candidates(len(costs)):
            chain = predict_chain(schedule, costs)
            if max(chain.forward_peak, chain.backward_peak) <= budget_bytes:
                extra = sum(runs * time for runs, time in zip(chain.untaped, seconds, strict=True))
                fitting.append((extra, len(fitting), schedule))
        best = min(fitting)[2] if fitting else None
    else:
        best = _Program(costs, seconds, budget_bytes).schedule()
    if best is None:
        raise ValueError(
            f"memory: no schedule of this chain of {len(costs)} applications fits into {format_bytes(budget_bytes)};"
            f" expected at least about {format_bytes(_least_bytes(costs))}"
        )
    return best


class _Program:
    """Least time to reverse [lo, hi) from boundary lo, for every number of bytes left: a table over intervals."""

    def __init__(self, costs: Sequence[ApplicationCost], seconds: Sequence[float], budget_bytes: int) -> None:
        self.costs, self.n = costs, len(costs)
        self.quantum = max(1, -(-budget_bytes // LEVELS))
        self.levels = budget_bytes // self.quantum
        self.boundary = [cost.boundary_bytes for cost in costs] + [costs[-1].output_bytes]
        self.kept_levels = [-(-size // self.quantum) for size in self.boundary]
        self.elapsed = [0.0, *accumulate(seconds)]
        self.best: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        self.middle: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        for length in range(1, self.n + 1):
            for lo in range(self.n - length + 1):
                self._solve(lo, lo + length)

    def schedule(self) -> Schedule | None:
        """The best schedule, or None. The last leaf stays taped: nothing comes between the passes of a single chain."""
        if not np.isfinite(self.best[0, self.n][self.levels]):
            return None

        def split(lo: int, hi: int, room: int) -> int | None:
            middle = int(self.middle[lo, hi][room])
            return None if middle < 0 else middle

        return grow(f"planned({self.n})", self.n, split, room=self.levels, sizes=self.kept_levels, is_last_taped=True)

    def _solve(self, lo: int, hi: int) -> None:
        room_bytes = np.arange(self.levels + 1) * self.quantum
        best = np.where(room_bytes >= self._leaf_peak(lo, hi), 0.0, np.inf)
        middle = np.full(self.levels + 1, -1)
        kept = self.kept_levels[lo]
        run_peak = 0
        for m in range(lo + 1, hi):
            # Running [lo, m) untaped, with the gradient at hi alive.
            run_peak = max(run_peak, self.costs[m - 1].forward_bytes + (self.boundary[m - 1] if m - 1 > lo else 0))
            if kept > self.levels:
                break
            right = np.full(self.levels + 1, np.inf)
            right[kept:] = self.best[m, hi][: self.levels + 1 - kept]
            total = self.elapsed[m] - self.elapsed[lo] + right + self.best[lo, m]
            total[room_bytes < self.boundary[lo] + run_peak + self._gradient(hi)] = np.inf
            is_better = total < best
            best[is_better], middle[is_better] = total[is_better], m
        self.best[lo, hi], self.middle[lo, hi] = best, middle

    def _leaf_peak(self, lo: int, hi: int) -> int:
        """Bytes to tape [lo, hi) and go back, as `predict` counts them."""
        held, peak = 0, 0
        for index in range(lo, hi):
            cost = self.costs[index]
            taped = held + self.boundary[index] + cost.taped_bytes + self._gradient(hi)
            peak = max(peak, taped, held + cost.backward_bytes)
            held += cost.tape_bytes
        return peak

    def _gradient(self, at: int) -> int:
        return self.boundary[at] if at < self.n else 0


@lru_cache(maxsize=64)
def candidates(num_applications: int) -> tuple[Schedule, ...]:
    """Schedules worth considering for a long chain of whatever costs, from no recomputation to r = MAX_PASSES."""
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


def _slot_counts(num_leaves: int) -> Iterator[int]:
    """Numbers of slots from r = 1 to r = MAX_PASSES: the fewest for each r, and two between."""
    for passes in range(1, MAX_PASSES + 1):
        fewest = slots_needed(num_leaves, passes)
        yield fewest
        after = slots_needed(num_leaves, passes + 1)
        yield from {after + (fewest - after) * third // 3 for third in (1, 2)} - {fewest, after}


def _least_bytes(costs: Sequence[ApplicationCost]) -> int:
    """The smallest predicted peak of the binomial schedules."""
    chains = (predict_chain(schedule, costs) for schedule in candidates(len(costs)))
    return min(max(chain.forward_peak, chain.backward_peak) for chain in chains)
