"""Which boundaries of a chain of applications are kept, and when each application runs again: pure, without tensors.

A schedule is an explicit list of actions on one chain. It is grown from splits: to reverse applications [lo, hi) from
boundary `lo`, either tape all of them at once (a leaf), or keep `lo`, advance to `middle`, reverse [middle, hi), come
back to `lo` and reverse [lo, middle). The rightmost splits happen in the forward pass, all others in the backward pass.

Words: boundary i is the input of application i; a slot is a kept boundary; the state in hand (the boundary that the
next action starts from) is not a slot, as in Griewank and Walther, "Algorithm 799: Revolve" (ACM TOMS 2000).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil, comb, isqrt
from typing import NamedTuple

Split = Callable[[int, int, int], int | None]
"""(lo, hi, room) -> where to split [lo, hi), or None to tape it; `room` is what is left for slots."""


class Kind(Enum):
    """What an action does with the state in hand."""

    KEEP = "keep"  # puts boundary lo, which is in hand, into a slot
    TAKE = "take"  # takes boundary lo out of its slot into the hand
    ADVANCE = "advance"  # runs [lo, hi) without a tape; boundary hi is in hand afterwards
    OUTPUT = "output"  # runs [lo, hi) without a tape for the chain's output; boundary lo stays in hand
    TAPE = "tape"  # runs [lo, hi) with a tape
    BACK = "back"  # propagates the gradient through the tape of [lo, hi) and frees it


class Action(NamedTuple):
    """One step of a schedule on applications [lo, hi); KEEP and TAKE concern boundary `lo` alone and have hi == lo."""

    kind: Kind
    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a chain does in its forward and in its backward pass. Hashed by identity: the constructors are cached.

    shape: (leaves, num_taped) of `tapered`, with which it makes schedules of other lengths too; None of others.
    """

    name: str
    num_applications: int
    forward: tuple[Action, ...]
    backward: tuple[Action, ...]
    shape: tuple[tuple[int, ...], int] | None = None


def grow(
    name: str,
    num_applications: int,
    split: Split,
    *,
    room: int,
    sizes: Sequence[int] | None = None,
    is_last_taped: bool = False,
) -> Schedule:
    """The schedule of a split rule. `sizes[i]` is what keeping boundary i takes of `room` (default: one slot each).

    With `is_last_taped` the last leaf is taped by the forward pass, so that its applications never run twice.
    """
    assert num_applications >= 1
    kept: list[tuple[int, int, int]] = []  # (lo, middle, room before lo was kept), innermost last

    def descend(lo: int, hi: int, room: int) -> tuple[list[Action], int]:
        actions = []
        while (middle := split(lo, hi, room)) is not None:
            assert lo < middle < hi, (name, lo, middle, hi)
            actions += [Action(Kind.KEEP, lo, lo), Action(Kind.ADVANCE, lo, middle)]
            kept.append((lo, middle, room))
            room -= 1 if sizes is None else sizes[lo]
            lo = middle
        return actions, lo

    forward, lo = descend(0, num_applications, room)
    forward.append(Action(Kind.TAPE if is_last_taped else Kind.OUTPUT, lo, num_applications))
    backward = [] if is_last_taped else [Action(Kind.TAPE, lo, num_applications)]
    backward.append(Action(Kind.BACK, lo, num_applications))
    while kept:
        lo, middle, room = kept.pop()
        backward.append(Action(Kind.TAKE, lo, lo))
        actions, lo = descend(lo, middle, room)
        backward += [*actions, Action(Kind.TAPE, lo, middle), Action(Kind.BACK, lo, middle)]
    return Schedule(name, num_applications, tuple(forward), tuple(backward))


@lru_cache(maxsize=4096)
def binomial(num_applications: int, slots: int, leaf: int = 1, num_taped: int = 0) -> Schedule:
    """Revolve: the fewest untaped runs that `slots` kept boundaries allow.

    At most `leaf` applications are taped at a time. The last `num_taped` are taped by the forward pass and never run
    again.
    """
    _require("leaf", leaf, 1, num_applications)
    return tapered(num_applications, (leaf,) * (max(0, slots) + 1), num_taped)


@lru_cache(maxsize=4096)
def tapered(num_applications: int, leaves: tuple[int, ...], num_taped: int = 0) -> Schedule:
    """Revolve with longer leaves where fewer boundaries wait, so that a number of bytes is used in full at every time.

    `leaves[u]` applications at most are taped at a time while u boundaries are in slots: a sequence that never rises,
    one longer than the number of slots. No schedule that keeps to it has a smaller r (see `reach`). The last
    `num_taped` applications are taped by the forward pass and never run again.
    """
    tail, slots = num_applications - num_taped, len(leaves) - 1
    _require("num_taped", num_taped, 0, num_applications)
    assert leaves[-1] >= 1 and all(a >= b for a, b in pairwise(leaves)), leaves
    if tail and not slots and (num_taped or tail > leaves[0]):
        raise ValueError(f"slots: expected at least 1 for a chain of {num_applications} applications, got 0")
    reach = _Reach(leaves)

    def split(lo: int, hi: int, room: int) -> int | None:
        used, is_before_tail = slots - room, num_taped > 0 and hi == num_applications
        length = min(hi, tail) - lo
        if length <= (0 if is_before_tail else leaves[used]):
            return None
        return lo + reach.first_step(length, used, is_before_tail=is_before_tail)

    longest, shortest = leaves[0], leaves[-1]
    leaf = f", leaf={longest}" if longest == shortest else f", leaf={shortest} to {longest}"
    name = f"binomial({slots}" + leaf * (longest > 1) + f", taped={num_taped}" * (num_taped > 0) + ")"
    schedule = grow(name, num_applications, split, room=slots, is_last_taped=num_taped > 0)
    return replace(schedule, shape=(leaves, num_taped))


class _Reach:
    """How long a chain can be: `(r, u)` is the length that r untaped runs reverse while u boundaries wait elsewhere.

    A chain of that length has a first segment of `(r - 1, u)`, reversed last, and then a chain of `(r, u + 1)`. With
    leaves of one application this is the binomial coefficient of `capacity`.
    """

    def __init__(self, leaves: tuple[int, ...]) -> None:
        self.leaves = leaves
        self.rows = [list(leaves)]

    def __call__(self, passes: int, used: int, *, is_before_tail: bool = False) -> int:
        """The length. Before a taped tail every segment's boundary waits in a slot, that of the last one too."""
        while passes >= len(self.rows):
            self.rows.append([*accumulate(reversed(self.rows[-1]))][::-1])
        if not is_before_tail:
            return self.rows[passes][used]
        return self.rows[passes][used] - self.leaves[-1] if passes and used < len(self.leaves) else 0

    def first_step(self, length: int, used: int, *, is_before_tail: bool) -> int:
        """Where to keep the next boundary: the farthest of the optimal places, as the fewest then wait."""
        passes = 1
        while self(passes, used, is_before_tail=is_before_tail) < length:
            passes += 1
        return min(self(passes - 1, used), length - self(passes - 1, used + 1, is_before_tail=is_before_tail))


@lru_cache(maxsize=4096)
def shortened(schedule: Schedule, num_applications: int) -> Schedule:
    """The schedule of a shorter chain that never holds more than `schedule`, and runs nothing oftener.

    It has as many slots, taped applications and leaves no longer. Raises ValueError for a longer chain, and for a
    schedule that is not binomial.
    """
    if schedule.shape is None or not 1 <= num_applications <= schedule.num_applications:
        raise ValueError(
            f"schedule {schedule.name} of {schedule.num_applications} applications cannot be made one of "
            f"{num_applications}"
        )
    leaves, num_taped = schedule.shape
    return tapered(num_applications, leaves, min(num_taped, num_applications))


@lru_cache(maxsize=64)
def none(num_applications: int) -> Schedule:
    """Tapes everything in the forward pass: nothing runs twice."""
    return replace(binomial(num_applications, 0, num_taped=num_applications), name="none")


@lru_cache(maxsize=64)
def per_application(num_applications: int) -> Schedule:
    """Keeps every boundary and tapes one application at a time (r = 1)."""
    return replace(binomial(num_applications, num_applications), name="per_application")


@lru_cache(maxsize=64)
def segments(num_applications: int, num_segments: int) -> Schedule:
    """Keeps the boundaries of `num_segments` equal segments and tapes one whole segment at a time (r = 1)."""
    _require("segments", num_segments, 1, num_applications)
    length = ceil(num_applications / num_segments)
    return replace(binomial(num_applications, num_segments, length), name=f"segments({num_segments})")


@lru_cache(maxsize=64)
def nested(num_applications: int, num_segments: int) -> Schedule:
    """Keeps segment boundaries; inside a segment, `per_application`: one application on the tape at a time (r = 2)."""
    _require("segments", num_segments, 1, num_applications)
    length = ceil(num_applications / num_segments)

    def split(lo: int, hi: int, room: int) -> int | None:
        if hi - lo > length:
            return lo + length
        return lo + 1 if hi - lo > 1 else None

    return grow(f"nested({num_segments})", num_applications, split, room=num_applications)


def capacity(slots: int, passes: int) -> int:
    """The longest chain that `slots` slots reverse with at most `passes` (r) untaped passes of any application."""
    return comb(slots + passes, slots)


def slots_needed(num_applications: int, passes: int) -> int:
    """The fewest slots with which no application runs more than `passes` (at least 1) times without a tape."""
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, got {passes}")
    slots = 1
    while capacity(slots, passes) < num_applications:
        slots += 1
    return slots


def default_segments(num_applications: int) -> int:
    """Segments for two levels with the fewest boundaries alive, about sqrt(n)."""
    return max(1, isqrt(num_applications))


def _require(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: expected {lowest} to {highest}, got {value}")
