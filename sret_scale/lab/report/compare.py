"""What tells runs apart: differing config fields, the part a run plays, seeds of one experiment, the Pareto front."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sret_scale.lab.report.run_record import ROLES, RunRecord

ABSENT = "-"  # How a field is shown in a run whose config does not have it.
SEED_KEYS = ("train.seed",)
_WITHOUT_EFFECT = frozenset(
    (
        *("train.hang_timeout_s", "train.keep_checkpoints", "train.log_interval_steps", "train.trackers"),
        *("data.workers", "data.worker_kind", "data.prefetch_batches", "data.cache_folder", "data.cache_gib"),
        *("data.fetch_threads", "data.fetch_ahead_steps", "data.stall_s", "data.fetch_attempts"),
        "data.quarantine_file",
    )
)


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """`section.field` -> value as text, for every leaf; items of a list are numbered, an empty one is a leaf."""
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, Mapping | list) for value in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: _text(tree)}
    return {key: text for name, value in items for key, text in flatten(value, f"{prefix}.{name}".lstrip(".")).items()}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.10g}"
    return "none" if value is None else str(value)


def differing(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The fields that are not equal in all runs -> their text in each run, in the order of the first run."""
    keys = dict.fromkeys(key for fields in runs for key in fields)
    columns = {key: [fields.get(key, ABSENT) for fields in runs] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def role(run: RunRecord) -> str:
    """The part a run plays, from its name, else from whether it learns from a teacher; empty if neither tells."""
    for word in ROLES:
        if word in run.name.lower():
            return word
    return "student" if teacher_of(run) else ""


def teacher_of(run: RunRecord) -> str | None:
    """Where the run's teacher came from, None without one."""
    section = run.config.get("distill")
    teacher = section.get("teacher") if isinstance(section, Mapping) else None
    return str(teacher) if teacher else None


def decisive(config: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a run's config that its result may depend on, flat: not how it was watched or fed."""
    return {key: text for key, text in flatten(config).items() if key not in _WITHOUT_EFFECT}


def seed_groups(runs: Sequence[RunRecord]) -> list[list[int]]:
    """Indices of the runs whose decisive fields are equal but for the seed, in the order of their first run."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, run in enumerate(runs):
        fields = decisive(run.config)
        groups.setdefault(tuple((k, v) for k, v in fields.items() if k not in SEED_KEYS), []).append(index)
    return list(groups.values())


def pareto_front(cost: npt.NDArray[np.float64], gain: npt.NDArray[np.float64]) -> list[int]:
    """Indices, by rising cost, of the points that no other beats: none is as cheap and better, or cheaper and as good.

    Points that are not finite are on no front.
    """
    finite = [index for index in range(len(cost)) if np.isfinite(cost[index]) and np.isfinite(gain[index])]
    front: list[int] = []
    best = -np.inf
    for index in sorted(finite, key=lambda i: (cost[i], -gain[i])):
        if gain[index] > best:
            front.append(index)
            best = gain[index]
    return front
