"""What a run holds in memory: predicted against measured."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np

from sret_scale.lab.readable_numbers import binary_size
from sret_scale.lab.report.chart import MUTED, STYLE, Caption, Chart, byte_axis, canvas, finish
from sret_scale.lab.report.summary import Summary


def memory_figures(summaries: Sequence[Summary], colours: Sequence[str]) -> list[Chart]:
    """Measured peak over predicted activations, where two runs differ in them."""
    points = [
        (s.predicted_activation_bytes, s.peak_bytes, colour, s)
        for s, colour in zip(summaries, colours, strict=True)
        if s.predicted_activation_bytes is not None and s.peak_bytes is not None
    ]
    if len({predicted for predicted, *_ in points}) < 2:
        return []
    predicted, measured = (np.array([point[place] for point in points], dtype=np.float64) for place in (0, 1))
    rest = float(np.median(measured - predicted))
    off = float(np.abs(measured - predicted - rest).max())
    caption = Caption(
        name="memory_prediction",
        title="Predicted against measured memory",
        text=f"Line: predicted activations and {binary_size(rest)} for all else (code, data, weights, optimiser; the "
        f"median of measured minus predicted). The largest deviation is {binary_size(off)}.",
        x_label="predicted activations",
        y_label="measured peak",
    )
    table: list[tuple[object, ...]] = [("run", "predicted_activation_bytes", "peak_bytes", "peak_minus_line")]
    with mpl.rc_context(STYLE):
        figure, axes = canvas(caption)
        figure.subplots_adjust(left=0.17, right=0.95, bottom=0.14, top=0.89)
        ends = np.array([predicted.min(), predicted.max()])
        axes.plot(ends, ends + rest, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        for x, y, colour, summary in points:
            axes.plot(x, y, "o", color=colour, markersize=6)
            table.append((summary.run, x, y, y - x - rest))
        axes.margins(0.12)
        byte_axis(axes.xaxis)
        byte_axis(axes.yaxis)
        return [finish(figure, caption, table)]
