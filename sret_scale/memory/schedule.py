"""Which boundaries of a chain of applications are kept, and when each application runs again: pure, without tensors.

A schedule is an explicit list of actions on one chain. It is grown from splits: to reverse applications [lo, hi) from
boundary `lo`, either tape all of them at once (a leaf), or keep `lo`, advance to `middle`, reverse [middle, hi), come
back to `lo` and reverse [lo, middle). The rightmost splits happen in the forward pass, all others in the backward pass.

Words: boundary i is the input of application i; a slot is a kept boundary; the state in hand (the boundary that the
next action starts from) is not a slot, as in Griewank and Walther, "Algorithm 799: Revolve" (ACM TOMS 2000).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
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


@dataclass(frozen=True)
class Schedule:
    """What a chain does in its forward and in its backward pass."""

    name: str
    num_applications: int
    forward: tuple[Action, ...]
    backward: tuple[Action, ...]


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


@lru_cache(maxsize=64)
def none(num_applications: int) -> Schedule:
    """Tapes everything in the forward pass: nothing runs twice."""
    return grow("none", num_applications, lambda lo, hi, room: None, room=0, is_last_taped=True)


@lru_cache(maxsize=64)
def per_application(num_applications: int, num_taped: int = 0) -> Schedule:
    """Keeps every boundary and tapes one application at a time; the last `num_taped` stay taped from the forward."""
    if not 0 <= num_taped <= num_applications:
        raise ValueError(f"num_taped: expected 0 to {num_applications}, got {num_taped}")
    tail = num_applications - num_taped

    def split(lo: int, hi: int, room: int) -> int | None:
        return None if hi - lo == 1 or lo >= tail else lo + 1

    return grow("per_application", num_applications, split, room=num_applications, is_last_taped=num_taped > 0)


@lru_cache(maxsize=64)
def segments(num_applications: int, num_segments: int) -> Schedule:
    """Keeps the boundaries of `num_segments` equal segments and tapes one whole segment at a time (r = 1)."""
    length = _segment_length(num_applications, num_segments)

    def split(lo: int, hi: int, room: int) -> int | None:
        return lo + length if hi - lo > length else None

    return grow(f"segments({num_segments})", num_applications, split, room=num_applications)


@lru_cache(maxsize=64)
def nested(num_applications: int, num_segments: int) -> Schedule:
    """Keeps segment boundaries; inside a segment, `per_application`: one application on the tape at a time (r = 2)."""
    length = _segment_length(num_applications, num_segments)

    def split(lo: int, hi: int, room: int) -> int | None:
        if hi - lo > length:
            return lo + length
        return lo + 1 if hi - lo > 1 else None

    return grow(f"nested({num_segments})", num_applications, split, room=num_applications)


@lru_cache(maxsize=64)
def binomial(num_applications: int, slots: int) -> Schedule:
    """Revolve: the fewest untaped runs that `slots` kept boundaries allow, one application on the tape at a time."""
    if slots < 1 and num_applications > 1:
        raise ValueError(f"slots: expected at least 1 for a chain of {num_applications} applications, got {slots}")

    def split(lo: int, hi: int, room: int) -> int | None:
        return lo + _binomial_split(hi - lo, room) if hi - lo > 1 else None

    return grow(f"binomial({slots})", num_applications, split, room=slots)


def capacity(slots: int, passes: int) -> int:
    """The longest chain that `slots` slots reverse with at most `passes` (r) untaped passes of any application."""
    return comb(slots + passes, slots)


def passes_needed(num_applications: int, slots: int) -> int:
    """The smallest r for which a chain fits into `slots` slots."""
    passes = 0
    while capacity(slots, passes) < num_applications:
        passes += 1
    return passes


def slots_needed(num_applications: int, passes: int) -> int:
    """The fewest slots with which no application runs more than `passes` (at least 1) times without a tape."""
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, got {passes}")
    slots = 1
    while capacity(slots, passes) < num_applications:
        slots += 1
    return slots


def untaped_passes(num_applications: int, slots: int) -> int:
    """Untaped runs of applications that `binomial` needs in all, the initial forward pass of the whole chain included.

    Revolve's optimum r n - C(s + r, r - 1) tapes the last application in the initial pass. A stage cannot, unless it
    holds that tape until its backward pass begins, so the last application has one run more.
    """
    r = passes_needed(num_applications, slots)
    return r * num_applications - (comb(slots + r, r - 1) if r else 0) + 1


def default_segments(num_applications: int) -> int:
    """Segments for two levels with the fewest boundaries alive, about sqrt(n)."""
    return max(1, isqrt(num_applications))


def _segment_length(num_applications: int, num_segments: int) -> int:
    if not 1 <= num_segments <= num_applications:
        raise ValueError(f"segments: expected 1 to {num_applications} (the applications), got {num_segments}")
    return ceil(num_applications / num_segments)


def _binomial_split(length: int, slots: int) -> int:
    """How far to advance before the next boundary is kept: an optimal first step of `length` >= 2 with `slots` >= 1."""
    r = passes_needed(length, slots)
    shortest = capacity(slots, r - 2) if r >= 2 else 1
    return max(shortest, length - capacity(slots - 1, r))
