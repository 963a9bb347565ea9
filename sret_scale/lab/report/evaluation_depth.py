"""Accuracy over the depth of evaluation: what `evaluate --applications` found of a run, as figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib as mpl
import pydantic
from typing_extensions import TypedDict

from sret_scale.lab.report import chart
from sret_scale.lab.report.run_record import RunRecord
from sret_scale.runs.metrics_log import Line, number

MOST_CURVES = 8


class _Line(TypedDict):
    """What a curve's line of metrics.jsonl must have; `best` names the number in its points that is drawn."""

    __pydantic_config__ = pydantic.ConfigDict(extra="ignore")  # type: ignore[misc]
    split: str
    best: str
    best_in_words: str
    points: list[dict[str, int | float | str | None]]


@dataclass(frozen=True, kw_only=True)
class DepthCurve:
    """What one evaluation of a run found at many depths. `points` are in the order of their applications."""

    run: str
    split: str
    best: str
    best_in_words: str
    points: tuple[dict[str, Any], ...]

    def of(self, read_out: str) -> list[dict[str, Any]]:
        return [point for point in self.points if point["read_out"] == read_out]


def curves_of(run: RunRecord) -> list[DepthCurve]:
    """A run's curves, the newest of each split; what is none of this version is left out."""
    curves = [curve_of(run.name, line) for line in run.of_kind("depth")]
    return list({curve.split: curve for curve in curves if curve}.values())


def curve_of(run: str, line: Line) -> DepthCurve | None:
    """The curve in a line of metrics.jsonl, without the points and the numbers of them that are none."""
    try:
        known = pydantic.TypeAdapter(_Line).validate_python(line)
    except pydantic.ValidationError:
        return None
    needed = ("applications", known["best"], f"{known['best']}_low", f"{known['best']}_high")
    points = []
    for point in known["points"]:
        sound = {name: value for name, value in point.items() if isinstance(value, str) or isfinite(number(value))}
        if all(number(sound.get(name)) >= 0 for name in needed) and sound.get("read_out") in ("last", "mean"):
            points.append(sound)
    points = [point for point in points if point["applications"]]
    return DepthCurve(run=run, **{**known, "points": tuple(points)}) if points else None  # type: ignore[arg-type]


def evaluation_depth_figures(curves: Sequence[DepthCurve]) -> list[chart.Chart]:
    """Accuracy over applications of all curves, then of each with an attribute its accuracy by bins of that."""
    if not curves:
        return []
    by_bin = [_by_bin(curve, index) for index, curve in enumerate(curves)]
    return [_accuracy(curves), *(chart for chart in by_bin if chart)]


def _accuracy(curves: Sequence[DepthCurve]) -> chart.Chart:
    words = " or ".join(dict.fromkeys(curve.best_in_words for curve in curves))
    caption = chart.Caption(
        name="evaluation_depth",
        title="Accuracy over the depth of evaluation",
        text="Solid: scores after the last application. Dashed: mean of those after the last 30 loops. Shaded: 95 % of "
        "bootstrap samples. One pass gives a whole curve.",
        x_label="block applications in evaluation",
        y_label=f"{words}, %",
    )
    shown = curves[:MOST_CURVES]
    lines = [
        (f"{curve.run}: {curve.split}" if kind == "last" else "", colour, kind, curve.of(kind), curve.best)
        for curve, colour in zip(shown, chart.run_colours(len(shown)), strict=True)
        for kind in ("last", "mean")
    ]
    names = list(dict.fromkeys(name for curve in curves for point in curve.points for name in point))
    table: list[tuple[object, ...]] = [("run", "split", *names)]
    table += [(c.run, c.split, *(point.get(name, "") for name in names)) for c in curves for point in c.points]
    return _figure(caption, lines, table)


def _by_bin(curve: DepthCurve, index: int) -> chart.Chart | None:
    names = [name for name in curve.points[-1] if re.fullmatch(r".+_\d+_\d+", name)]
    if not names:
        return None
    attribute = {"before": "path length"}.get(name := names[0].rsplit("_", 2)[0], name)  # Before a passage is closed.
    caption = chart.Caption(
        name=f"evaluation_depth_{index}",
        title=f"Accuracy by {attribute}: {chart.printable(curve.run, 30)}",
        text=f"{curve.split}: right tokens of those whose {attribute} lies in a range, after the last application.",
        x_label="block applications in evaluation",
        y_label="right tokens, %",
    )
    lines = [
        (f"{attribute} {' to '.join(name.rsplit('_', 2)[1:])}", colour, "last", curve.of("last"), name)
        for name, colour in zip(names, chart.run_colours(len(names)), strict=True)
    ]
    table: list[tuple[object, ...]] = [("applications", *names)]
    table += [(point["applications"], *(point.get(name, "") for name in names)) for point in curve.of("last")]
    return _figure(caption, lines, table)


def _figure(caption: chart.Caption, lines: Sequence[tuple[Any, ...]], table: list[tuple[object, ...]]) -> chart.Chart:
    """Lines of (label or nothing, colour, read-out, points, name of the number)."""
    counts = sorted({point["applications"] for *_, points, _ in lines for point in points})
    with mpl.rc_context(chart.STYLE):
        figure, axes = chart.canvas_above_legend(caption, sum(bool(label) for label, *_ in lines))
        for label, colour, kind, points, name in lines:
            known = (name, f"{name}_low", f"{name}_high")
            own = [point for point in points if all(isinstance(point.get(one), int | float) for one in known)]
            depth = [point["applications"] for point in own]
            value, low, high = ([100 * point[one] for point in own] for one in known)
            line = "-" if kind == "last" else (0, (4, 3))
            text = chart.printable(label, 60) or None
            axes.plot(depth, value, linestyle=line, marker="o", markersize=3.5, color=colour, label=text)
            if kind == "last":
                axes.fill_between(depth, low, high, color=colour, alpha=0.12, linewidth=0)
        chart.log_count_axis(axes, counts[:: -(-len(counts) // 8)])
        axes.set_ylim(-3, 103)
        chart.legend(figure)
        return chart.finish(figure, caption, table)
