"""What depth buys: accuracy over applications, compute, parameters, time and memory, with the Pareto front marked.

Runs that differ in nothing but the seed are one point: their mean, with a bar from the lowest to the highest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sret_scale.lab.chart import INK, MUTED, STYLE, Caption, Chart, canvas, finish, printable
from sret_scale.lab.compare import pareto_front, seed_groups
from sret_scale.lab.metrics import Floats
from sret_scale.lab.numbers import binary_size, compact
from sret_scale.lab.runs import Run
from sret_scale.lab.summary import Summary

MOST_POINT_LABELS = 10
LABEL_ROOM_PIXELS = 26.0
LINEAR_BELOW = 4.0  # Largest cost over smallest.
# A training step is a forward pass and a backward pass of twice its cost; a multiply-add is two operations.
# Recomputation and a teacher are left out: they are a choice of memory and of method, not of the model.
FLOPS_PER_MAC_OF_TRAINING = 6


@dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one configuration: their top-1 ratios, and what each cost."""

    runs: tuple[str, ...]
    colour: str
    top1: tuple[float, ...]
    costs: dict[str, float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.top1))


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


def depth_figures(runs: Sequence[Run], summaries: Sequence[Summary], colours: Sequence[str]) -> list[Chart]:
    """The figures, where at least two evaluated runs differ in depth; none otherwise."""
    points = gather(runs, summaries, colours)
    if len({point.costs["depth_applications"] for point in points}) < 2:
        return []
    return [_figure(name, points) for name in COSTS if any(point.costs[name] > 0 for point in points)]


def gather(runs: Sequence[Run], summaries: Sequence[Summary], colours: Sequence[str]) -> list[Point]:
    """One point for each configuration that was evaluated, whatever its number of seeds."""
    points = []
    for group in seed_groups(runs):
        scored = [i for i in group if (top1 := summaries[i].top1) is not None and np.isfinite(top1)]
        if scored:
            points.append(
                Point(
                    runs=tuple(summaries[i].run for i in scored),
                    colour=colours[scored[0]],
                    top1=tuple(summaries[i].top1 or 0.0 for i in scored),
                    costs={k: float(np.mean([c(summaries[i]) for i in scored])) for k, (_, _, c) in COSTS.items()},
                )
            )
    return points


def _figure(name: str, points: Sequence[Point]) -> Chart:
    title, x_label, _ = COSTS[name]
    drawn = [point for point in points if point.costs[name] > 0]
    cost = np.array([point.costs[name] for point in drawn])
    mean = np.array([100 * point.mean for point in drawn])
    front = pareto_front(cost, mean)
    caption = Caption(name=name, title=title, text=_words(name, drawn), x_label=x_label, y_label="top-1, %")
    with mpl.rc_context(STYLE):
        figure, axes = canvas(caption)
        figure.subplots_adjust(left=0.1, right=0.95, bottom=0.14, top=0.89)
        axes.step(cost[front], mean[front], where="post", color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        for index, point in enumerate(drawn):
            _draw(axes, point, cost[index], on_front=index in front)
        _cost_axis(axes, cost, binary_size if name == "depth_memory" else compact)
        axes.margins(y=0.14)
        if len(drawn) <= MOST_POINT_LABELS:
            _name_points(axes, drawn, cost, mean)
        return finish(figure, caption, _table(drawn, cost, front, x_label))


def _draw(axes: Axes, point: Point, cost: float, *, on_front: bool) -> None:
    low, high = 100 * min(point.top1), 100 * max(point.top1)
    if len(point.top1) > 1:
        axes.plot([cost, cost], [low, high], color=point.colour, linewidth=1.4, alpha=0.7)
    fill = point.colour if on_front else "none"
    axes.plot(cost, 100 * point.mean, "o", markersize=6, color=point.colour, markerfacecolor=fill, markeredgewidth=1.5)


def _name_points(axes: Axes, points: Sequence[Point], cost: Floats, mean: Floats) -> None:
    """Each point's depth, or its run where depths repeat, on the side where the plot leaves room."""
    depths = [point.costs["depth_applications"] for point in points]
    middle = float(np.exp(np.mean(np.log(axes.get_xlim()))))
    taken: list[Floats] = []
    for point, depth, x, y in zip(points, depths, cost, mean, strict=True):
        pixel = axes.transData.transform((x, y))
        # A label upon another one tells nothing; the first of a crowd has it.
        if any(abs(pixel - other).max() < LABEL_ROOM_PIXELS for other in taken):
            continue
        taken.append(pixel)
        text = f"{depth:g}" if depths.count(depth) == 1 else printable(point.runs[0], 16)
        left = x > middle
        axes.annotate(
            text,
            (x, y),
            xytext=(-7 if left else 7, 3),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom",
            color=INK,
        )


def _cost_axis(axes: Axes, cost: Floats, text: Callable[[float], str]) -> None:
    """A logarithmic axis with round labels, or a linear one where costs lie too close for round logarithms."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    spread = float(cost.max() / cost.min())
    if spread < LINEAR_BELOW:
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.set_xlim(cost.min() / (1.25 * spread**0.03), cost.max() * 1.25 * spread**0.03)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < 100 else (1.0,), numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())


def _words(name: str, points: Sequence[Point]) -> str:
    if name == "depth_applications":
        text = "Filled: on the Pareto front (dashed), where nothing cheaper is as accurate."
        if any(len(point.top1) > 1 for point in points):
            text += " Bars: lowest to highest of the seeds, dots their mean."
        return text
    text = "Numbers are block applications." if len(points) <= MOST_POINT_LABELS else ""
    if name == "depth_compute":
        text += " 6 x MACs x images seen; recomputation and teacher not counted."
    return text.strip()


def _table(points: Sequence[Point], cost: Floats, front: list[int], x_label: str) -> list[tuple[object, ...]]:
    table: list[tuple[object, ...]] = [("runs", x_label, "top1_mean", "top1_low", "top1_high", "seeds", "on_front")]
    for index, point in enumerate(points):
        spread = (point.mean, min(point.top1), max(point.top1), len(point.top1))
        table.append((" ".join(point.runs), cost[index], *spread, int(index in front)))
    return table
