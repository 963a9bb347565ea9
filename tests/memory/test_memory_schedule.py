"""Schedules: every action finds its input, slots are never exceeded, and the binomial counts are the true optimum."""

from functools import cache
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.memory import schedule as schedules
from sret_scale.memory.config import SCHEDULES, MemoryConfig, schedule_for
from sret_scale.memory.planning.ledger import account, draw_rows
from sret_scale.memory.schedule import Schedule

lengths = st.integers(1, 60)
FIXED_SCHEDULES = [name for name in SCHEDULES if name != "planned"]


@cache
def fewest_untaped(length: int, slots: int) -> float:
    """By brute force: untaped runs to reverse `length` applications, the last one taped when first reached."""
    if length == 1:
        return 0
    if slots == 0:
        return float("inf")
    return min(m + fewest_untaped(length - m, slots - 1) + fewest_untaped(m, slots) for m in range(1, length))


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 12))
def test_binomial_needs_exactly_the_optimal_number_of_passes(length: int, slots: int) -> None:
    ledger = account(schedules.binomial(length, slots))
    assert ledger.total_untaped == fewest_untaped(length, slots) + 1
    assert ledger.peak_slots <= slots
    assert ledger.peak_taped == 1
    # Griewank and Walther 2000: so many applications fit into these slots with r passes.
    assert ledger.passes <= max(1, next(r for r in count() if schedules.capacity(slots, r) >= length))


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 11))
def test_more_slots_never_cost_more_passes(length: int, slots: int) -> None:
    fewer, more = (account(schedules.binomial(length, s)).total_untaped for s in (slots, slots + 1))
    assert more <= fewer


@settings(max_examples=50, deadline=None)
@given(lengths, st.data())
def test_two_level_schedules_are_sound(length: int, data: st.DataObject) -> None:
    num_segments = data.draw(st.integers(1, length))
    flat, deep = account(schedules.segments(length, num_segments)), account(schedules.nested(length, num_segments))
    assert flat.passes == 1 and flat.peak_slots < num_segments
    assert flat.peak_taped == -(-length // num_segments)
    assert deep.passes <= 2 and deep.peak_taped == 1


@settings(max_examples=30, deadline=None)
@given(lengths, st.data())
def test_a_kept_tape_saves_exactly_its_applications(length: int, data: st.DataObject) -> None:
    num_taped = data.draw(st.integers(0, length))
    ledger = account(schedules.binomial(length, length, num_taped=num_taped))
    assert ledger.total_untaped == length - num_taped
    assert ledger.peak_taped == max(1, num_taped)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 12), st.data())
def test_leaves_and_a_kept_tape_keep_within_the_slots(length: int, slots: int, data: st.DataObject) -> None:
    leaf, num_taped = data.draw(st.integers(1, length)), data.draw(st.integers(0, length))
    ledger = account(schedules.binomial(length, slots, leaf, num_taped))
    assert ledger.peak_slots <= slots
    assert ledger.peak_taped <= max(leaf, num_taped)


@st.composite
def tapers(draw: st.DrawFn) -> tuple[int, ...]:
    """Leaves for up to four slots."""
    return tuple(sorted(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)), reverse=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), tapers(), st.data())
def test_no_schedule_with_these_leaves_has_a_smaller_r(
    length: int, leaves: tuple[int, ...], data: st.DataObject
) -> None:
    num_taped = data.draw(st.integers(0, length))
    tail = length - num_taped

    @cache
    def passes(count: int, used: int, is_spine: bool) -> float:
        """By brute force: r of the best way to reverse `count` applications while `used` boundaries wait."""
        if count <= (0 if is_spine else leaves[used]):
            return 0
        if used == len(leaves) - 1:
            return float("inf")
        return min(
            max(1 + passes(middle, used, False), passes(count - middle, used + 1, is_spine))
            for middle in range(1, count + is_spine)
        )

    schedule = schedules.tapered(length, leaves, num_taped)
    ledger = account(schedule)
    assert ledger.passes == max(0 if num_taped == length else 1, passes(tail, 0, num_taped > 0))
    for kind, lo, hi, kept in draw_rows(schedule):
        assert len(kept) < len(leaves)
        if kind is schedules.Kind.TAPE and hi <= tail:
            assert hi - lo <= leaves[len(kept)]


def test_none_runs_nothing_twice() -> None:
    assert account(schedules.none(5)).total_untaped == 0


def test_published_figures_of_the_binomial_law() -> None:
    assert schedules.slots_needed(1000, 2) == 44
    assert schedules.slots_needed(1000, 3) == 17
    assert account(schedules.binomial(1000, 44)).passes == 2
    assert account(schedules.binomial(1000, 17)).passes == 3


@pytest.mark.parametrize("name", FIXED_SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 3, 10, 101])
def test_every_configured_schedule_is_sound(name: str, length: int) -> None:
    schedule = schedule_for(MemoryConfig(schedule=name), length)
    # `account` raises where a backward pass does not find its input; these are the applications that were taped.
    account(schedule)
    taped = [n for kind, lo, hi, _ in draw_rows(schedule) if kind is schedules.Kind.TAPE for n in range(lo, hi)]
    assert sorted(taped) == list(range(length))


def test_a_schedule_that_loses_a_boundary_is_found() -> None:
    good = schedules.binomial(10, 3)
    broken = Schedule(good.name, 10, good.forward, tuple(a for a in good.backward if a.kind is not schedules.Kind.TAKE))
    with pytest.raises(AssertionError):
        account(broken)


@pytest.mark.parametrize(
    ("settings_", "word"),
    [
        ({"schedule": "sqrt"}, "memory.schedule"),
        ({"schedule": "none", "slots": 3}, "memory.slots"),
        ({"schedule": "binomial", "slots": 0}, "memory.slots"),
        ({"schedule": "planned"}, "memory.budget_bytes"),
        ({"schedule": "nested", "budget_bytes": 5}, "memory.budget_bytes"),
    ],
)
def test_bad_settings_are_named(settings_: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MemoryConfig(**settings_)  # type: ignore[arg-type]


def test_bad_counts_are_named() -> None:
    with pytest.raises(ValueError, match="slots: expected at least 1"):
        schedules.binomial(5, 0)
    with pytest.raises(ValueError, match="segments: expected 1 to 5"):
        schedules.segments(5, 6)
    with pytest.raises(ValueError, match="num_taped"):
        schedules.binomial(5, 2, num_taped=6)
    with pytest.raises(ValueError, match="passes"):
        schedules.slots_needed(5, 0)
