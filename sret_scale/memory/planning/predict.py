"""Predicts the bytes of a chain under a schedule, by walking through its actions with the costs of its applications."""

from collections.abc import Sequence
from dataclasses import dataclass

from sret_scale.memory.planning.costs import ApplicationCost
from sret_scale.memory.planning.ledger import account
from sret_scale.memory.schedule import Kind, Schedule


@dataclass(frozen=True, kw_only=True)
class ChainBytes:
    """Bytes that a chain holds, its input boundary and the gradient of its output included, its output not.

    resting_bytes: between the forward and the backward pass.
    untaped: untaped runs of each application.
    """

    forward_peak: int
    resting_bytes: int
    backward_peak: int
    untaped: tuple[int, ...]


def predict_chain(schedule: Schedule, costs: Sequence[ApplicationCost]) -> ChainBytes:
    """The bytes of `schedule` on a chain whose applications cost `costs`."""
    assert len(costs) == schedule.num_applications
    walk = _Walk(costs)
    for action in schedule.forward:
        walk.perform(action.kind, action.lo, action.hi)
    forward_peak, resting_bytes = walk.peak, walk.resting()
    walk.begin_backward()
    for action in schedule.backward:
        walk.perform(action.kind, action.lo, action.hi)
    return ChainBytes(
        forward_peak=forward_peak,
        resting_bytes=resting_bytes,
        backward_peak=walk.peak,
        untaped=account(schedule).untaped,
    )


class _Walk:
    """The state of a chain in bytes, and the peak since it was last set to 0."""

    def __init__(self, costs: Sequence[ApplicationCost]) -> None:
        self.costs = costs
        self.boundary = [cost.boundary_bytes for cost in costs] + [costs[-1].output_bytes]
        self.slots: dict[int, int] = {}
        self.slot_bytes = 0
        self.hand: int | None = 0
        self.tape_bytes = 0
        self.reached: int | None = None  # the boundary whose gradient is at hand
        self.peak = 0

    def begin_backward(self) -> None:
        """The gradient of the output comes in; the peak is counted from here."""
        self.reached = len(self.costs)
        self.peak = self.resting()

    def resting(self) -> int:
        """Bytes held now."""
        in_hand = 0 if self.hand is None or self.hand in self.slots else self.boundary[self.hand]
        return self.slot_bytes + in_hand + self.tape_bytes + self._gradient()

    def perform(self, kind: Kind, lo: int, hi: int) -> None:
        """Does one action."""
        if kind is Kind.KEEP:
            self.slots[lo] = self.boundary[lo]
            self.slot_bytes += self.boundary[lo]
        elif kind is Kind.TAKE:
            self.slot_bytes -= self.slots.pop(lo)
            self.hand = lo
        elif kind is Kind.TAPE:
            self._tape(lo, hi)
        elif kind is Kind.BACK:
            self._back(lo, hi)
        else:
            self._run(lo, hi, stays=kind is Kind.OUTPUT)
        self.peak = max(self.peak, self.resting())

    def _run(self, lo: int, hi: int, *, stays: bool) -> None:
        base = self.slot_bytes + self._gradient() + (self.boundary[lo] if lo not in self.slots else 0)
        for index in range(lo, hi):
            live = base + self.costs[index].forward_bytes + (self.boundary[index] if index > lo else 0)
            self.peak = max(self.peak, live)
        self.hand = lo if stays else hi

    def _tape(self, lo: int, hi: int) -> None:
        base = self.slot_bytes + self._gradient()
        held = 0
        for index in range(lo, hi):
            self.peak = max(self.peak, base + held + self.boundary[index] + self.costs[index].taped_bytes)
            held += self.costs[index].tape_bytes
        self.hand, self.tape_bytes = None, held

    def _back(self, lo: int, hi: int) -> None:
        held = self.tape_bytes
        for index in reversed(range(lo, hi)):
            held -= self.costs[index].tape_bytes
            # The gradient that comes in is part of the application's bytes.
            self.peak = max(self.peak, self.slot_bytes + held + self.costs[index].backward_bytes)
        self.tape_bytes, self.reached = 0, lo

    def _gradient(self) -> int:
        return 0 if self.reached is None else self.boundary[self.reached]
