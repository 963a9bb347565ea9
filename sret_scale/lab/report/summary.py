"""The figures of one run that go into the report's table, and how each is written."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from sret_scale.lab.readable_numbers import binary_size, compact, duration, grouped, percent
from sret_scale.lab.report.compare import role
from sret_scale.lab.report.run_record import RunRecord

Number = float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run in numbers; None where the run did not (yet) measure it. Accuracies are ratios, and named `accuracy`."""

    run: str
    role: str
    state: str
    applications: float
    residual_sublayers: float
    weight_layers: float
    parameters: float
    macs: float
    peak_bytes: Number
    peak_is_device: bool
    predicted_activation_bytes: Number
    images_per_s: Number
    images_seen: float
    time_s: float
    top1_raw: Number
    top1_ema: Number
    accuracy: str = "top-1"

    @property
    def top1(self) -> Number:
        """The accuracy the run stands for: that of the averaged weights where it keeps them."""
        return self.top1_raw if self.top1_ema is None else self.top1_ema


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: what it shows of a Summary, in which unit. `best` is +1 to mark the largest value."""

    title: str
    unit: str
    value: Callable[[Summary], Number]
    text: Callable[[Number], str]
    best: int = 0


COLUMNS = (
    Column(title="Applications", unit="", value=lambda s: s.applications, text=grouped),
    Column(title="Residual sublayers", unit="", value=lambda s: s.residual_sublayers, text=grouped),
    Column(title="Weight layers", unit="", value=lambda s: s.weight_layers, text=grouped),
    Column(title="Parameters", unit="", value=lambda s: s.parameters, text=compact),
    Column(title="MACs", unit="per image", value=lambda s: s.macs, text=compact),
    Column(title="Peak memory", unit="", value=lambda s: s.peak_bytes, text=binary_size),
    Column(title="Speed", unit="images/s", value=lambda s: s.images_per_s, text=compact),
    Column(title="Images seen", unit="", value=lambda s: s.images_seen, text=grouped),
    Column(title="Time", unit="", value=lambda s: s.time_s, text=duration),
    Column(title="Top-1 raw", unit="%", value=lambda s: s.top1_raw, text=percent, best=1),
    Column(title="Top-1 EMA", unit="%", value=lambda s: s.top1_ema, text=percent, best=1),
)


def columns_for(summaries: Sequence[Summary]) -> list[Column]:
    """The columns, with what the runs' accuracies are of in their titles."""
    words = " or ".join(dict.fromkeys(summary.accuracy for summary in summaries)).capitalize()
    return [replace(column, title=column.title.replace("Top-1", words)) for column in COLUMNS]


def summarise(run: RunRecord) -> Summary:
    """The figures of a run as it stands: the last evaluation, the median speed, the largest memory."""
    speeds = run.series("train", "images_per_s").values
    speeds = speeds[np.isfinite(speeds)]
    device_bytes = run.largest("memory", "peak_device_bytes")
    split = evaluation_split(run)
    return Summary(
        run=run.name,
        role=role(run),
        state=str(run.status.get("state", "")),
        applications=run.model["applications"],
        residual_sublayers=run.model["residual_sublayers"],
        weight_layers=run.model["weight_layers"],
        parameters=run.model["parameters"],
        macs=run.model["macs"],
        peak_bytes=run.largest("memory", "peak_rss_bytes") if device_bytes is None else device_bytes,
        peak_is_device=device_bytes is not None,
        predicted_activation_bytes=run.largest("memory", "predicted_activation_bytes"),
        # The median leaves out the first steps, which warm up caches and compilers.
        images_per_s=float(np.median(speeds)) if len(speeds) else None,
        images_seen=run.images_seen,
        time_s=run.time_s,
        top1_raw=run.last("eval", run.accuracy[0], weights="raw", split=split),
        top1_ema=run.last("eval", run.accuracy[0], weights="ema", split=split),
        accuracy=run.accuracy[1],
    )


def evaluation_split(run: RunRecord) -> str:
    """The split that the run's accuracy is reported on: `test` if it was evaluated there, else its last one."""
    splits = [str(line.get("split")) for line in run.of_kind("eval")]
    return "test" if "test" in splits or not splits else splits[-1]


def best_rows(column: Column, summaries: list[Summary]) -> set[int]:
    """The rows that hold the column's best value, none where fewer than two rows can be compared."""
    values = [column.value(summary) for summary in summaries]
    present = [value for value in values if value is not None and math.isfinite(value)]
    if not column.best or len(present) < 2:
        return set()
    best = max(present, key=lambda value: column.best * value)
    return {row for row, value in enumerate(values) if value == best}


def summary_table(summaries: list[Summary]) -> list[tuple[object, ...]]:
    """Header and rows of the summary as CSV takes them, in plain units."""
    names = [field.name for field in fields(Summary)]
    return [tuple(names), *(tuple(getattr(summary, name) for name in names) for summary in summaries)]
