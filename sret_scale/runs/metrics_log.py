"""Reads metrics.jsonl: which of its lines count, and what about them the reader must be told.

The file is appended to by a process that may be killed at any byte and restarted from an older checkpoint. So a line
that was cut off is left out and counted, a step that was repeated counts once, a value that is not finite stays a gap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.checked_files import parse_checked, read_bounded
from sret_scale.runs.rank_errors import counted

# Values whose loss of finiteness the reader must hear of, with the kind of line they stand in.
WATCHED = (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("eval", "top1"), ("eval", "exact"))

# Beyond what a float holds, and far beyond what a run counts.
MOST = 1e300
MOST_BYTES, MOST_LINE_BYTES = 2**30, 2**20

Line = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One quantity over the images seen; a value that was not finite is NaN, so that a curve shows a gap."""

    images: Floats
    values: Floats


def read_metrics(path: Path) -> tuple[list[Line], list[str]]:
    """The valid lines of a metrics.jsonl in order, and remarks on the others. A file that is not there yet has none."""
    broken: list[int] = []
    kept: dict[tuple[object, ...], Line] = {}
    restarts = 0
    raw_lines = read_bounded(path, MOST_BYTES).split(b"\n") if path.is_file() else []
    for number, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        line = parse_line(raw)
        if line is None:
            broken.append(number)
            continue
        if line["kind"] == "restart":
            restarts += 1
            # What came after the checkpoint did not happen in the history that the run now continues.
            kept = {key: old for key, old in kept.items() if old["step"] <= line.get("from_step", line["step"])}
        key = (line["kind"], line["step"], line.get("weights"), line.get("split"))
        kept.pop(key, None)
        kept[key] = line
    remarks = []
    if broken:
        where = ", ".join(map(str, broken[:3])) + (" ..." if len(broken) > 3 else "")
        remarks.append(f"{counted(len(broken), 'half-written line')} of metrics.jsonl left out (line {where}).")
    if restarts:
        remarks.append(f"{counted(restarts, 'restart')}; the steps that were repeated are counted once.")
    return list(kept.values()), remarks


def parse_line(raw: bytes) -> Line | None:
    """The metric line, or None if it is cut off: no JSON object, too long, or without the fields of every line."""
    try:
        line = parse_checked(raw[:MOST_LINE_BYTES], dict[str, Any], "a line of metrics.jsonl")
    except ValueError:
        return None
    if not isinstance(line.get("kind"), str):
        return None
    if not isinstance(line.get("weights"), str | None) or not isinstance(line.get("split"), str | None):
        return None
    if line["kind"] == "restart" and not is_count(line.get("from_step", 0)):
        return None
    return line if all(is_count(line.get(key)) for key in ("step", "images", "time_s")) else None


def not_finite(lines: Sequence[Line]) -> list[str]:
    """A sentence for each watched quantity that lost its finiteness: how often, and where first."""
    remarks = []
    for kind, field in WATCHED:
        present = [line for line in lines if line["kind"] == kind and field in line]
        lost = [line for line in present if math.isnan(number(line[field]))]
        if lost:
            remarks.append(
                f"{kind} {field} is not finite in {len(lost)} of {counted(len(present), 'line')}, first at "
                f"{lost[0]['images']:,} images: shown as a gap."
            )
    return remarks


def number(value: object) -> float:
    """A finite float, or NaN for everything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < MOST else math.nan


def is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST
