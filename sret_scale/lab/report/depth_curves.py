"""What depth buys: accuracy over applications, compute, parameters, time and memory, with the Pareto front marked.

Runs that differ in nothing but the seed are one point: their mean, with a bar from the lowest to the highest. Points of
one kind (see `series`) are joined by a line.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sret_scale.lab.readable_numbers import binary_size, compact
from sret_scale.lab.report import chart
from sret_scale.lab.report.compare import pareto_front
from sret_scale.lab.report.run_record import RunRecord
from sret_scale.lab.report.series import RATE, Line, Point, gather, lines_of, rates_of
from sret_scale.lab.report.summary import Summary
from sret_scale.runs.metrics_log import Floats

MOST_POINT_LABELS = 10
MOST_LINE_LABELS = 8
LABEL_ROOM_PIXELS = 26.0
LINEAR_BELOW = 4.0  # Largest cost over smallest.
# A training step is a forward pass and a backward pass of twice its cost; a multiply-add is two operations.
# Recomputation and a teacher are left out: they are a choice of memory and of method, not of the model.
FLOPS_PER_MAC_OF_TRAINING = 6

# Name of a figure's file -> title, axis label, cost of one run.
COSTS: dict[str, tuple[str, str, Callable[[Summary], float]]] = {
    "depth_applications": ("Accuracy over depth", "block applications", lambda s: s.applications),
    "depth_compute": (
        "Accuracy over training compute",
        "training FLOPs",
        lambda s: FLOPS_PER_MAC_OF_TRAINING * s.macs * s.images_seen,
    ),
    "depth_parameters": ("Accuracy over parameters", "parameters", lambda s: s.parameters),
    "depth_time": ("Accuracy over time", "training time, s", lambda s: s.time_s),
    "depth_memory": ("Accuracy over memory", "peak memory", lambda s: s.peak_bytes or float("nan")),
}


def depth_figures(runs: Sequence[RunRecord], summaries: Sequence[Summary]) -> list[chart.Chart]:
    """The figures, where at least two evaluated runs differ in depth; none otherwise."""
    points = gather(runs, summaries, {name: cost for name, (_, _, cost) in COSTS.items()})
    if len({point.depth for point in points}) < 2:
        return []
    lines = lines_of(points)
    shown = [point for line in lines for point in line.points]
    charts = [_figure(name, lines) for name in COSTS if any(point.costs[name] > 0 for point in shown)]
    rates = _rate_figure(points)
    return [*charts, rates] if rates else charts


def _figure(name: str, lines: Sequence[Line]) -> chart.Chart:
    title, x_label, _ = COSTS[name]
    drawn = [(index, point) for index, line in enumerate(lines) for point in line.points if point.costs[name] > 0]
    points = [point for _, point in drawn]
    cost = np.array([point.costs[name] for point in points])
    mean = np.array([100 * point.mean for point in points])
    front = pareto_front(cost, mean)
    colours = chart.run_colours(len(lines))
    caption = chart.Caption(name=name, title=title, text=_words(name, points), x_label=x_label, y_label="top-1, %")
    with mpl.rc_context(chart.STYLE):
        has_legend = 1 < len(lines) <= MOST_LINE_LABELS
        figure, axes = chart.canvas_above_legend(caption, len(lines) if has_legend else 0)
        dashed: dict[str, Any] = {"color": chart.MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1}
        axes.step(cost[front], mean[front], where="post", **dashed)
        for index, line in enumerate(lines):
            own = sorted((p.costs[name], 100 * p.mean) for p in line.points if p.costs[name] > 0)
            label = chart.printable(line.label, 60) if has_legend else None
            axes.plot(*zip(*own, strict=True) if own else ((), ()), color=colours[index], linewidth=1.2, label=label)
        for place, (index, point) in enumerate(drawn):
            _draw(axes, point, cost[place], colours[index], on_front=place in front)
        _cost_axis(axes, cost, is_bytes=name == "depth_memory")
        axes.margins(y=0.14)
        if len(points) <= MOST_POINT_LABELS:
            _name_points(axes, points, cost, mean, by_depth=has_legend)
        if has_legend:
            chart.legend(figure)
        return chart.finish(figure, caption, _table(lines, name, front, x_label))


def _draw(axes: Axes, point: Point, cost: float, colour: str, *, on_front: bool) -> None:
    low, high = 100 * min(point.top1), 100 * max(point.top1)
    if len(point.top1) > 1:
        axes.plot([cost, cost], [low, high], color=colour, linewidth=1.4, alpha=0.7)
    fill = colour if on_front else "none"
    axes.plot(cost, 100 * point.mean, "o", markersize=6, color=colour, markerfacecolor=fill, markeredgewidth=1.5)


def _name_points(axes: Axes, points: Sequence[Point], cost: Floats, mean: Floats, *, by_depth: bool) -> None:
    """Each point's depth, or its run where depths repeat and no legend tells the lines apart, where there is room."""
    depths = [point.depth for point in points]
    middle = float(np.exp(np.mean(np.log(axes.get_xlim()))))
    taken: list[Floats] = []
    for point, depth, x, y in zip(points, depths, cost, mean, strict=True):
        pixel = axes.transData.transform((x, y))
        # A label upon another one tells nothing; the first of a crowd has it.
        if any(abs(pixel - other).max() < LABEL_ROOM_PIXELS for other in taken):
            continue
        taken.append(pixel)
        text = f"{depth:g}" if by_depth or depths.count(depth) == 1 else chart.printable(point.runs[0], 16)
        left = x > middle
        axes.annotate(
            text,
            (x, y),
            xytext=(-7 if left else 7, 3),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom",
            color=chart.INK,
        )


def _cost_axis(axes: Axes, cost: Floats, *, is_bytes: bool = False) -> None:
    """A logarithmic axis with round labels, or a linear one where costs lie too close for round logarithms."""
    formatter = FuncFormatter(lambda value, _: binary_size(value) if is_bytes else compact(value))
    spread = float(cost.max() / cost.min())
    if spread < LINEAR_BELOW:
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(formatter)
        if is_bytes:
            chart.byte_axis(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(3))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlim(cost.min() / (1.25 * spread**0.03), cost.max() * 1.25 * spread**0.03)
    subs = (1.0, 2.0, 5.0) if spread < 100 else (1.0,)
    locator = LogLocator(base=2, numticks=6) if is_bytes else LogLocator(subs=subs, numticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_minor_locator(NullLocator())


def _words(name: str, points: Sequence[Point]) -> str:
    if name == "depth_applications":
        text = "Filled points are on the Pareto front (dashed): nothing cheaper is as accurate."
        if any(len(point.top1) > 1 for point in points):
            text += " Bars: lowest to highest of the seeds, dots their mean."
        return text
    text = "Labels are block applications." if len(points) <= MOST_POINT_LABELS else ""
    if name == "depth_compute":
        text += " 6 x MACs x samples seen; recomputation and teacher not counted."
    return text.strip()


def _table(lines: Sequence[Line], name: str, front: list[int], x_label: str) -> list[tuple[object, ...]]:
    head = ("line", "runs", "applications", x_label, "top1_mean", "top1_low", "top1_high", "seeds", "on_front")
    table: list[tuple[object, ...]] = [head]
    place = 0
    for line in lines:
        for point in line.points:
            if point.costs[name] > 0:
                spread = (point.mean, min(point.top1), max(point.top1), len(point.top1))
                where = (line.label, " ".join(point.runs), int(point.depth), point.costs[name])
                table.append((*where, *spread, int(place in front)))
                place += 1
    return table


def _rate_figure(points: Sequence[Point]) -> chart.Chart | None:
    """The best learning rate over depth for each kind, where rates were swept at two depths or more."""
    swept = [(line, group) for line, group in rates_of(points) if len(line.points) > 1]
    if not swept:
        return None
    caption = chart.Caption(
        name="rate_transfer",
        title="Best learning rate over depth",
        text="Large: the most accurate rate of each depth; small: the others. A flat line means that a rate found on "
        "a shallow model holds for a deep one.",
        x_label="block applications",
        y_label="learning rate",
    )
    colours = chart.run_colours(len(swept))
    table: list[tuple[object, ...]] = [("line", "applications", "learning_rate", "top1", "eval_loss", "is_best")]
    with mpl.rc_context(chart.STYLE):
        figure, axes = chart.canvas_above_legend(caption, len(swept) if len(swept) > 1 else 0)
        figure.subplots_adjust(left=0.16)
        for (line, group), colour in zip(swept, colours, strict=True):
            for point in group:
                rate, is_best = float(point.fields[RATE]), point in line.points
                axes.plot(point.depth, rate, "o", color=colour, markersize=7 if is_best else 2.5)
                table.append((line.label, int(point.depth), rate, point.mean, point.loss, int(is_best)))
            best = [(point.depth, float(point.fields[RATE])) for point in line.points]
            label = chart.printable(line.label, 60) or None
            axes.plot(*zip(*best, strict=True), color=colour, linewidth=1.2, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        _cost_axis(axes, np.array([point.depth for _, group in swept for point in group]))
        axes.margins(y=0.14)
        if len(swept) > 1:
            chart.legend(figure)
        return chart.finish(figure, caption, table)
