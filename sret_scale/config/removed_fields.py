"""Fields that configurations of earlier releases hold and this one does not have."""

from typing import Any

REMOVED_FIELDS: dict[str, tuple[Any, str]] = {
    "distill.num_teacher_ranks": (
        0,
        "each rank has the teacher beside it; where that needs too much memory, set distill.teacher_placement=sharded "
        "or store the teacher's answers (sret-scale labels write)",
    ),
    "train.tensorboard": (False, "set train.trackers=[tensorboard]"),
}
"""Dotted name -> (the default that it had, what to do instead where it was set)."""


def is_removed(name: str, value: object) -> bool:
    """True for a removed field at its old default, which may be passed over; ValueError at another value."""
    if name not in REMOVED_FIELDS:
        return False
    default, advice = REMOVED_FIELDS[name]
    if value != default:
        raise ValueError(f"{name}={value!r} is no longer a field: {advice}")
    return True
