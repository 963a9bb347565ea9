"""Walks through a schedule as an executor would, proves that it is sound, and counts what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sret_scale.memory.schedule import Kind, Schedule


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What a schedule costs. Untaped runs include the initial pass; the taped run of each application comes on top."""

    peak_slots: int
    peak_taped: int  # applications on the tape at once
    untaped: tuple[int, ...]  # runs without a tape, for each application

    @property
    def total_untaped(self) -> int:
        """Untaped runs of all applications together."""
        return sum(self.untaped)

    @property
    def passes(self) -> int:
        """r: the most untaped runs of any one application."""
        return max(self.untaped)


@lru_cache(maxsize=4096)
def account(schedule: Schedule) -> Ledger:
    """The costs of a schedule; AssertionError if an action lacks its input or the gradient does not get through."""
    n = schedule.num_applications
    untaped = [0] * n
    kept: set[int] = set()
    hand, tape, gradient = 0, None, n  # boundary in hand; taped range; the boundary that the gradient has reached
    has_output = False
    peak_slots = peak_taped = 0
    for index, (kind, lo, hi) in enumerate((*schedule.forward, *schedule.backward)):
        where = f"action {index}: {kind.value} {lo} {hi}"
        if index == len(schedule.forward):
            assert has_output, "the forward pass has no output"
        if kind is Kind.KEEP:
            assert hand == lo and lo not in kept, where
            kept.add(lo)
            peak_slots = max(peak_slots, len(kept))
        elif kind is Kind.TAKE:
            kept.remove(lo)
            hand = lo
        elif kind is Kind.BACK:
            assert tape == (lo, hi) and gradient == hi, where
            tape, gradient = None, lo
        else:
            assert hand == lo < hi <= n and tape is None, where
            if kind is Kind.TAPE:
                tape, peak_taped = (lo, hi), max(peak_taped, hi - lo)
            else:
                for i in range(lo, hi):
                    untaped[i] += 1
            hand = lo if kind is Kind.OUTPUT else hi
            has_output = has_output or (hi == n and kind is not Kind.ADVANCE)
    assert gradient == 0 and not kept and tape is None, "the gradient does not reach the chain's input, or slots leak"
    return Ledger(peak_slots=peak_slots, peak_taped=peak_taped, untaped=tuple(untaped))


def draw_rows(schedule: Schedule) -> Sequence[tuple[Kind, int, int, frozenset[int]]]:
    """For each action that runs applications, in time order: kind, range and the boundaries in slots meanwhile."""
    kept: set[int] = set()
    rows = []
    for kind, lo, hi in (*schedule.forward, *schedule.backward):
        if kind is Kind.KEEP:
            kept.add(lo)
        elif kind is Kind.TAKE:
            kept.remove(lo)
        else:
            rows.append((kind, lo, hi, frozenset(kept)))
    return rows
