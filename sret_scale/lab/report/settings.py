"""The settings of a sweep: runs that differ in the seed alone are one, with mean, error and range of their accuracy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sret_scale.lab.readable_numbers import compact, duration, grouped
from sret_scale.lab.report.compare import ABSENT
from sret_scale.lab.report.run_record import RunRecord
from sret_scale.lab.report.series import Point, follows, gather
from sret_scale.lab.report.summary import Summary

# Cost of a run -> title of its column and how it is written.
_COSTS: dict[str, tuple[Callable[[Summary], float], str, Callable[[float], str]]] = {
    "depth_applications": (lambda s: s.applications, "Applications", grouped),
    "parameters": (lambda s: s.parameters, "Parameters", compact),
    "macs": (lambda s: s.macs, "MACs per image", compact),
    "images_per_s": (lambda s: s.images_per_s or math.nan, "Images/s", compact),
    "images_seen": (lambda s: s.images_seen, "Images seen", grouped),
    "time_s": (lambda s: s.time_s, "Time", duration),
}


@dataclass(frozen=True, kw_only=True)
class SettingColumn:
    """A column of the table: the text of each setting, and its place where the table is sorted by this column."""

    title: str
    cells: tuple[str, ...]
    places: tuple[int, ...]


def settings_of(runs: Sequence[RunRecord], summaries: Sequence[Summary]) -> list[Point]:
    """The settings that were evaluated, the best mean first."""
    points = gather(runs, summaries, {name: cost for name, (cost, _, _) in _COSTS.items()})
    return sorted(points, key=lambda point: -point.mean)


def standard_error(point: Point) -> float:
    """Of the mean over the seeds; NaN for one."""
    count = len(point.top1)
    return float(np.std(point.top1, ddof=1) / np.sqrt(count)) if count > 1 else math.nan


def varied(points: Sequence[Point]) -> dict[str, list[str]]:
    """Name of each field that tells the settings apart -> its text in each, fields that vary alike once."""
    columns: dict[tuple[str, ...], str] = {}
    for key in dict.fromkeys(key for point in points for key in point.fields):
        values = tuple(point.fields.get(key, ABSENT) for point in points)
        if len(set(values)) > 1 and key != "train.seed" and not follows(key):
            columns.setdefault(values, key)
    leaves = [key.rpartition(".")[2] for key in columns.values()]
    names = [leaf if leaves.count(leaf) == 1 else key for leaf, key in zip(leaves, columns.values(), strict=True)]
    return {name: list(values) for name, values in zip(names, columns, strict=True)}


def labels_of(points: Sequence[Point]) -> list[str]:
    """What is special about each setting, or its run where nothing is."""
    fields = varied(points)
    named = [", ".join(f"{name} {values[row]}" for name, values in fields.items()) for row in range(len(points))]
    return [label or point.runs[0] for label, point in zip(named, points, strict=True)]


def headline(points: Sequence[Point], accuracy: str) -> str:
    """The answer in a sentence: the setting of the best mean with its error, and whether the next one is as good.

    accuracy: what the ratios are of, such as top-1.
    """
    best, label = points[0], labels_of(points)[0]
    text = f"{label}: " if len(points) == 1 else f"Of {len(points)} settings {label} has the best mean: "
    text += (
        f"{_with_error(best)} % {accuracy} ({_seeds(best)}) with {grouped(best.depth)} block applications and "
        f"{compact(best.costs['parameters'])} parameters, after {grouped(best.costs['images_seen'])} samples in "
        f"{duration(best.costs['time_s'])}."
    )
    if len(points) == 1:
        return text
    second, name = points[1], labels_of(points)[1]
    text += f" Next: {name}, {_with_error(second)} %"
    is_close = best.mean - second.mean <= math.hypot(standard_error(best), standard_error(second))
    return f"{text}; that is within one standard error." if is_close else f"{text}."


def _with_error(point: Point) -> str:
    error = standard_error(point)
    return f"{100 * point.mean:.1f}" + ("" if math.isnan(error) else f" \N{PLUS-MINUS SIGN} {100 * error:.1f}")


def _seeds(point: Point) -> str:
    if len(point.top1) == 1:
        return "one seed"
    return f"{len(point.top1)} seeds, {100 * min(point.top1):.1f} to {100 * max(point.top1):.1f}"


def settings_table(points: Sequence[Point], accuracy: str) -> list[SettingColumn]:
    """The varied fields, then accuracy and costs, as columns that a reader can sort by."""
    columns = [_column(name, values, list(map(_number, values))) for name, values in varied(points).items()]
    columns.append(_column("Seeds", [str(len(point.top1)) for point in points], [len(point.top1) for point in points]))
    columns.append(
        _column(f"{accuracy.capitalize()}, %", list(map(_with_error, points)), [point.mean for point in points])
    )
    if any(len(point.top1) > 1 for point in points):
        for title, choose in (("Lowest", min), ("Highest", max)):
            ends = [choose(point.top1) for point in points]
            columns.append(_column(title, [f"{100 * value:.1f}" for value in ends], ends))
    for name, (_, title, text) in _COSTS.items():
        costs = [point.costs[name] for point in points]
        if len(set(costs)) > 1:
            columns.append(_column(title, list(map(text, costs)), costs))
    return columns


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _column(title: str, cells: Sequence[str], values: Sequence[float | str]) -> SettingColumn:
    # Numbers by their size, before words.
    order = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    return SettingColumn(title=title, cells=tuple(cells), places=tuple(order.index(value) for value in values))
