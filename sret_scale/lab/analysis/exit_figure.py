"""The curve of early exit, accuracy against multiply-adds, as lines and as a figure."""

from collections.abc import Sequence
from dataclasses import asdict

import matplotlib as mpl

from sret_scale.lab.early_exit import ExitKind, ExitPoint
from sret_scale.lab.report.chart import STYLE, Caption, Chart, canvas, finish


def exit_table(points: Sequence[ExitPoint]) -> str:
    """The curve as aligned lines."""
    whole = points[0]
    lines = [f"{'threshold':>9} {'top-1':>8} {'loss':>8} {'MACs':>16} {'of all':>7} {'applications':>13}"]
    for point in points:
        name = "all loops" if point.threshold is None else f"{point.threshold:g}"
        lines.append(
            f"{name:>9} {point.top1:>8.2%} {point.loss:>8.4f} {point.macs:>16,.0f} {point.macs / whole.macs:>7.1%} "
            f"{point.applications:>13.1f}"
        )
    return "\n".join(lines)


def exit_chart(name: str, kind: ExitKind, points: Sequence[ExitPoint]) -> Chart:
    """The curve as a figure; the hollow mark is the model with all its loops."""
    caption = Caption(
        name=f"early_exit_{kind}",
        title="Early exit",
        text=f"{name}: images stop by {kind}; the hollow mark runs all loops.",
        x_label="multiply-adds an image, millions",
        y_label="top-1, %",
    )
    with mpl.rc_context(STYLE):
        figure, axes = canvas(caption)
        figure.subplots_adjust(left=0.12, right=0.96, bottom=0.15, top=0.89)
        whole, *rest = [(point.macs / 1e6, 100 * point.top1) for point in points]
        axes.plot(*zip(*sorted(rest), strict=True), marker="o", markersize=4, color="#1f6fb4")
        axes.plot(*whole, marker="o", markersize=8, markerfacecolor="none", color="#1f6fb4")
        axes.margins(x=0.08, y=0.12)
        rows = [tuple("" if value is None else value for value in asdict(point).values()) for point in points]
        return finish(figure, caption, [tuple(asdict(points[0])), *rows])
