"""The memory settings of a run, and the schedule that they mean for a chain of a given length."""

from dataclasses import dataclass

from sret_scale.memory import schedule as schedules
from sret_scale.memory.schedule import Schedule

SCHEDULES = ("none", "per_application", "segments", "nested", "binomial", "planned")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How each stage recomputes.

    schedule: none, per_application, segments, nested, binomial, or planned: the planner chooses, per stage.
    slots: the number of segments for `segments` and `nested` (default: about the root of the stage's applications)
        and of kept boundaries for `binomial` (default: the fewest with r = 2). More than a stage can use is cut.
    budget_bytes: for all that a rank holds, with `planned`.
    is_checked: compares every recomputed boundary with its first value, bit for bit.
    is_offloaded: keeps boundaries in host memory (the planner counts them as if they stayed on the device).
    """

    schedule: str = "per_application"
    slots: int | None = None
    budget_bytes: int | None = None
    is_checked: bool = False
    is_offloaded: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"memory.schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.slots is not None and self.schedule in ("none", "per_application", "planned"):
            raise ValueError(f"memory.slots: {self.schedule} has no slots to choose, got {self.slots}")
        if (self.schedule == "planned") != (self.budget_bytes is not None):
            raise ValueError(
                "memory.budget_bytes: expected together with memory.schedule=planned and with no other,"
                f" got {self.budget_bytes} with {self.schedule}"
            )
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"memory.slots: expected at least 1, got {self.slots}")


def schedule_for(config: MemoryConfig, num_applications: int) -> Schedule:
    """The schedule of a chain of `num_applications` under `config`; ValueError if only a planner can tell."""
    if config.schedule == "planned":
        raise ValueError("memory.schedule: planned has no schedule of its own; expected the planner to choose first")
    if config.schedule == "none":
        return schedules.none(num_applications)
    if config.schedule == "per_application":
        return schedules.per_application(num_applications)
    if config.schedule == "binomial":
        slots = config.slots or schedules.slots_needed(num_applications, 2)
        return schedules.binomial(num_applications, min(slots, num_applications))
    num_segments = min(config.slots or schedules.default_segments(num_applications), num_applications)
    make = schedules.segments if config.schedule == "segments" else schedules.nested
    return make(num_applications, num_segments)


def stem_repeats_norms(config: MemoryConfig, zero_stage: int) -> bool:
    """Whether a run's stem normalises again in its backward pass: if anything runs twice and parameters are whole."""
    return config.schedule != "none" and zero_stage < 3
