"""The ways to run one stage within a number of bytes: slots against taped applications, in closed form for all at once.

A stage's applications are counted alike, at the highest cost that any of them has. Its schedules are those of
`schedule.tapered`, whose leaves fill what the boundaries in slots leave of the bytes at every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sret_scale.memory.planning.costs import ApplicationCost
from sret_scale.memory.schedule import Schedule, tapered

SHARES = 16
"""A taped tail is a whole number of these parts of a stage, so that more bytes never take a choice away."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that a stage may hold while its forward pass runs and while its backward pass runs."""

    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices for a stage, one an element: slots, applications taped by the forward pass, and what these cost.

    resting: bytes held from the forward pass to the backward pass. runs: untaped runs of all applications together.
    """

    slots: Numbers
    taped: Numbers
    resting: Numbers
    runs: Numbers

    def best(self) -> "Options":
        """Those that no other one beats in bytes at rest and in runs, fewest bytes first."""
        order = np.lexsort((self.runs, self.resting))
        runs = self.runs[order]
        is_better = np.r_[True, runs[1:] < np.minimum.accumulate(runs)[:-1]] if len(runs) else np.zeros(0, bool)
        chosen = order[is_better]
        return Options(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


class StageOptions:
    """The choices of one stage under any room.

    is_last: nothing comes between the stage's passes, so its taped tail may also be as long as fits.
    """

    def __init__(self, costs: Sequence[ApplicationCost], max_passes: int, *, is_last: bool = True) -> None:
        self.length, self.max_passes, self.is_last = len(costs), max_passes, is_last
        self.cost = highest(costs)
        boundary = max(self.cost.boundary_bytes, self.cost.output_bytes)
        # To tape one application and come back, the gradient that it gets included.
        self.one_bytes = max(self.cost.backward_bytes, self.cost.taped_bytes + 2 * boundary)
        self.boundary, self.tape = boundary, max(1, self.cost.tape_bytes)

    def leaves(self, room: Room) -> Numbers:
        """How many applications can be taped at once while 0, 1, 2 ... boundaries are in slots, as long as one can."""
        most = min(self.length, (room.backward - self.one_bytes) // self.boundary)
        # The forward pass runs one application with an input and an output in hand.
        run_bytes = self.cost.forward_bytes + 2 * self.boundary
        most = min(most, (room.forward - run_bytes) // self.boundary)
        used = np.arange(max(0, most + 1))
        left = room.backward - self.one_bytes - used * self.boundary
        return np.minimum(self.length, 1 + left // self.tape)

    def within(self, room: Room) -> Options:
        """All choices that keep within the room."""
        leaves = self.leaves(room)
        found = [self._untaped(leaves), *self._taped(leaves, room)]
        joined = {f.name: np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Options)}
        return Options(**joined).best()

    def schedule(self, room: Room, slots: int, taped: int) -> Schedule:
        """The schedule of a choice."""
        leaves = self.leaves(room)[: slots + 1] if slots else [max(1, self.length - taped)]
        return tapered(self.length, tuple(int(leaf) for leaf in leaves), taped)

    def _untaped(self, leaves: Numbers) -> Options:
        """Choices that tape nothing in the forward pass; the last boundary waits in the hand."""
        slots = np.arange(len(leaves))
        lengths = np.full(len(leaves), self.length)
        return self._options(slots, np.zeros_like(slots), (slots + 1) * self.boundary, self._runs(leaves, lengths))

    def _taped(self, leaves: Numbers, room: Room) -> list[Options]:
        """Choices that tape the last applications in the forward pass."""
        slots = np.arange(len(leaves))
        bytes_left = np.minimum(room.backward - self.one_bytes, room.forward - self.cost.taped_bytes - self.boundary)
        longest = np.clip(1 + (bytes_left - slots * self.boundary) // self.tape, 0, self.length)
        tails = [np.full(len(slots), taped) for taped in {-(-self.length * k // SHARES) for k in range(1, SHARES + 1)}]
        found = []
        for taped in [*tails, longest] if self.is_last else tails:
            runs = self._runs(leaves, self.length - taped, is_before_tail=True)
            resting = slots * self.boundary + taped * self.tape
            keep = (taped > 0) & (taped <= longest)
            found.append(self._options(slots[keep], taped[keep], resting[keep], runs[keep]))
        return found

    def _options(self, slots: Numbers, taped: Numbers, resting: Numbers, runs: Numbers) -> Options:
        keep = runs >= 0
        return Options(slots=slots[keep], taped=taped[keep], resting=resting[keep], runs=runs[keep])

    def _runs(self, leaves: Numbers, lengths: Numbers, *, is_before_tail: bool = False) -> Numbers:
        """Untaped runs to reverse chains of these lengths with 0, 1, 2 ... slots; -1 where r would be too large.

        r runs reverse the sum of C(u + r - 1, r - 1) leaves[u] over all u up to the number of slots (`schedule._Reach`
        in closed form); what r - 1 runs reverse has one run less, and so on down to one run, the first pass.
        """
        runs = np.where(lengths == 0, 0, -1)
        total = np.zeros(len(lengths), np.int64)  # runs that lengths within the reach of fewer passes save
        used = np.arange(len(leaves))
        for passes in range(1, self.max_passes + 1):
            weights = np.array([min(comb(int(u) + passes - 1, passes - 1), 10**9) for u in used], np.int64)
            reach = np.cumsum(weights * leaves) - (leaves if is_before_tail else 0)
            fits = (runs < 0) & (reach >= lengths)
            runs[fits] = (passes * lengths - total)[fits]
            total += np.minimum(reach, lengths)
        return runs


def highest(costs: Sequence[ApplicationCost]) -> ApplicationCost:
    """The highest of each cost."""
    found: dict[str, Any] = {f.name: max(getattr(cost, f.name) for cost in set(costs)) for f in fields(ApplicationCost)}
    return ApplicationCost(**found)
