"""Curves over samples seen, with direct labels instead of legends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sret_scale.lab.report.chart import STYLE, Caption, Chart, canvas, count_axis, finish, printable
from sret_scale.runs.metrics_log import Series

MOST_LABELS = 8  # More direct labels than this cannot be read; the table's colour marks then tell the runs.
LABEL_LENGTH = 13
SMOOTH_FROM, SMOOTH_BINS = 80, 60


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line with the name and colour of its run; `faint` is drawn behind it (raw weights, the unsmoothed loss).

    `kinds` names the two in the CSV.
    """

    label: str
    colour: str
    series: Series
    faint: Series | None = None
    kinds: tuple[str, str] = ("", "")


def line_chart(curves: Sequence[Curve], caption: Caption, *, form: str, named: bool = True) -> Chart:
    """Curves over samples seen; up to MOST_LABELS of them are named at their end, with their last value as `form`."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(caption)
        named = named and len(curves) <= MOST_LABELS
        figure.subplots_adjust(left=0.1, right=0.7 if named else 0.96, bottom=0.14, top=0.89)
        for curve in curves:
            _draw(axes, curve, strong=named)
        axes.set_xlim(left=0)
        axes.margins(y=0.06)
        count_axis(axes.xaxis)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if named:
            _name_ends(axes, curves, form)
        return finish(figure, caption, _table(curves, caption))


def smoothed(series: Series) -> Series:
    """Means of equal bins of a long series, itself if short. A bin with a value that is not finite is a gap too."""
    if len(series.images) < SMOOTH_FROM:
        return series
    return Series(
        images=np.array([part.mean() for part in np.array_split(series.images, SMOOTH_BINS)]),
        values=np.array([part.mean() for part in np.array_split(series.values, SMOOTH_BINS)]),
    )


def spread(wanted: npt.NDArray[np.float64], gap: float) -> npt.NDArray[np.float64]:
    """Places in [0, 1] at least `gap` apart, in the order of `wanted` and as near to it as can be (least squares).

    With i * gap taken off, "at least a gap apart" becomes "not decreasing": isotonic regression by pooling neighbours.
    """
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(wanted))
    pools: list[list[float]] = []
    for value in wanted[order] - offsets:
        pools.append([float(value)])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    places = np.empty(len(wanted))
    places[order] = np.clip(flat, 0.0, max(0.0, 1.0 - gap * (len(wanted) - 1))) + offsets
    return places


def _draw(axes: Axes, curve: Curve, *, strong: bool) -> None:
    width = 1.8 if strong else 0.8
    if curve.faint is not None and len(curve.faint.images) > 1 and strong:
        axes.plot(curve.faint.images, curve.faint.values, color=curve.colour, linewidth=0.9, alpha=0.35)
    # A run that was evaluated once has no line.
    marker = "o" if len(curve.series.images) == 1 else None
    axes.plot(
        curve.series.images, curve.series.values, color=curve.colour, linewidth=width, marker=marker, markersize=4
    )
    lost = curve.series.images[~np.isfinite(curve.series.values)]
    # A diverged run must not look like one that merely ended: crosses on the floor where its curve has no value.
    floor: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(lost, np.zeros_like(lost), "x", color=curve.colour, markersize=4, **floor)


def _name_ends(axes: Axes, curves: Sequence[Curve], form: str) -> None:
    """Each curve's name and last value right of the plot, at its height as far as the others leave room."""
    ends = []
    for curve in curves:
        finite = np.flatnonzero(np.isfinite(curve.series.values))
        if len(finite):
            ends.append((float(curve.series.values[finite[-1]]), float(curve.series.images[finite[-1]]), curve))
    if not ends:
        return
    low, high = axes.get_ylim()
    wanted = np.array([(value - low) / (high - low) for value, _, _ in ends])
    for place, (value, images, curve) in zip(spread(wanted, 0.075), ends, strict=True):
        axes.plot(images, value, "o", color=curve.colour, markersize=4, clip_on=False)
        axes.annotate(
            f"{printable(curve.label, LABEL_LENGTH)} {value:{form}}",
            (1, place),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=curve.colour,
        )


def _table(curves: Sequence[Curve], caption: Caption) -> list[tuple[object, ...]]:
    table: list[tuple[object, ...]] = [("run", "series", caption.x_label, caption.y_label)]
    for curve in curves:
        for kind, series in zip(curve.kinds, (curve.series, curve.faint), strict=True):
            if series is not None:
                table += [(curve.label, kind, int(x), y) for x, y in zip(series.images, series.values, strict=True)]
    return table
